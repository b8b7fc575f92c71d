"""The interview-access command. A subcommand's module is imported when the subcommand runs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

import click


class _Subcommand(NamedTuple):
    """Where a subcommand is: ``module:function`` below this package, and its help in the list."""

    path: str
    help: str


_SUBCOMMANDS: Mapping[str, _Subcommand] = {
    "attempt": _Subcommand(
        "enqueueing:attempt", "Enqueue a job that creates an interview attempt."
    ),
    "cancel": _Subcommand("jobs:cancel", "Cancel a job, or all that wait for a user or a task."),
    "dead-letters": _Subcommand(
        "dead_letters:dead_letters", "Inspect, requeue and delete dead letters."
    ),
    "demo": _Subcommand("local:demo", "Run the main job on local servers, and check it."),
    "erase": _Subcommand("database:erase", "Erase one person from jobs, results and messages."),
    "explain": _Subcommand(
        "database:explain", "Report which job gave a user access to an interview."
    ),
    "grant": _Subcommand(
        "enqueueing:grant", "Enqueue a job that grants access, and optionally wait for its result."
    ),
    "jobs": _Subcommand(
        "jobs:jobs", "List finished jobs by user, interview, actor, state or time."
    ),
    "lost-jobs": _Subcommand(
        "database:lost_jobs", "List finished jobs that a restored PostgreSQL does not have."
    ),
    "migrate": _Subcommand("database:migrate", "Migrate the tables to the newest revision."),
    "pause": _Subcommand("queue:pause", "Pause the queue: workers claim no more jobs."),
    "prune": _Subcommand("database:prune", "Delete old finished jobs and dead letters."),
    "purge": _Subcommand("jobs:purge", "Cancel all waiting jobs and remove their messages."),
    "queue": _Subcommand("queue:queue", "Show what waits in the queue, for how long, and why."),
    "resume": _Subcommand("queue:resume", "Resume a paused queue."),
    "status": _Subcommand("jobs:status", "Report a job's state and result."),
    "up": _Subcommand("local:up", "Run servers, a worker and Flower here until Ctrl-C."),
}


class _LazyGroup(click.Group):
    """A group that imports a subcommand when it runs, not when it is listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in _SUBCOMMANDS:
            return None
        module, function = _SUBCOMMANDS[cmd_name].path.split(":")
        command: click.Command = getattr(import_module(f"{__name__}.{module}"), function)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, _SUBCOMMANDS[name].help) for name in self.list_commands(ctx)]
            )


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="interview-access-worker")
def main() -> None:
    """Grant users access to interviews, and operate the workers that do it."""
