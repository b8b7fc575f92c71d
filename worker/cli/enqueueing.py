"""interview-access grant and attempt, which enqueue jobs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import IO, TypeVar

import click
from interview_access.contracts import JobProgress
from interview_access.contracts.jobs import JobOptions
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    NoAnswerInTimeError,
    QueueUnavailableError,
)
from interview_access.producer import InterviewAccessClient
from interview_access.redis_address import FORMS

from worker.cli.terminal import FAILED, UNAVAILABLE, end, one_line

F = TypeVar("F", bound=Callable[..., object])

_DEFAULT_TIMEOUT = 60.0


class _Seconds(click.ParamType[float]):
    name = "seconds"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        with suppress(ValueError):
            if (seconds := float(str(value))) >= 0:  # false for NaN
                return seconds
        raise click.BadParameter(
            f"got {one_line(value)!r}, expected seconds, 0 or more.", ctx, param
        )


class _Expiry(click.ParamType[float | datetime]):
    name = "expiry"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | datetime:
        text = str(value)
        for parse in (float, datetime.fromisoformat):
            try:
                return parse(text)
            except ValueError:
                continue
        raise click.BadParameter(
            f"got {one_line(text)!r}, expected seconds or a time in ISO 8601, such as "
            "2030-01-31T12:00:00Z.",
            ctx,
            param,
        )


_ID_FILE = click.File(encoding="utf-8-sig", errors="surrogateescape")  # Windows writes a BOM

_OPTIONS = (
    click.option(
        "--job-id",
        metavar="ID",
        help="The job's ID, 1 to 255 printable characters; by default a random UUID. Sending the "
        "same request again under its ID is safe: it takes effect once.",
    ),
    click.option(
        "--countdown",
        type=_Seconds(),
        metavar="SECONDS",
        help="Time before which no worker starts the job.",
    ),
    click.option(
        "--expires",
        type=_Expiry(),
        metavar="SECONDS|TIME",
        help="Seconds, or a time in ISO 8601 (UTC if it has no offset), after which no worker "
        "starts the job.",
    ),
    click.option(
        "--actor",
        metavar="NAME",
        help="Who requests the job, for the audit: 1 to 255 printable characters.",
    ),
    click.option(
        "--reason",
        metavar="TEXT",
        help="Why, for the audit: 1 to 1,000 printable characters.",
    ),
    click.option("--wait", is_flag=True, help="Wait for the result and print it."),
    click.option(
        "--timeout",
        type=_Seconds(),
        metavar="SECONDS",
        help="How long --wait waits at most, the countdown included.  "
        f"[default: {_DEFAULT_TIMEOUT:g}]",
    ),
)


def _with_options(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.option(
    "--user",
    "users",
    multiple=True,
    metavar="ID",
    help="Who is granted access: 1 to 36 characters, taken literally. Repeat it for a cohort: one "
    "job that grants each user access to each interview.",
)
@click.option(
    "--users-from",
    "users_file",
    type=_ID_FILE,
    metavar="FILE|-",
    help="A file of the users of a cohort, one ID in a line; - is standard input.",
)
@click.option(
    "--interview", "interviews", multiple=True, metavar="ID", help="An interview; repeatable."
)
@click.option(
    "--interviews-from",
    "interviews_file",
    type=_ID_FILE,
    metavar="FILE|-",
    help="A file of interviews, one ID in a line; - is standard input.",
)
@_with_options
def grant(
    *,
    users: tuple[str, ...],
    users_file: IO[str] | None,
    interviews: tuple[str, ...],
    interviews_file: IO[str] | None,
    wait: bool,
    timeout: float | None,
    **options: object,
) -> None:
    """Enqueue a job that grants users access to interviews, and print its ID.

    With --wait, standard output gets the result as a line of JSON, and standard error the rest. The
    exit status is 0 on success, 1 if the job failed or its ID belongs to another request, 2 for a
    usage error, and 3 if there was no result in time or Redis is unavailable.

    Blank lines of a file, and spaces around an ID, are ignored. CELERY_BROKER_URL names the Redis
    of the workers.
    """
    if users_file and interviews_file and users_file.name == interviews_file.name:
        raise click.UsageError("--users-from and --interviews-from read the same file.")
    user_ids = _ids("user", users, users_file)
    interview_ids = _ids("interview", interviews, interviews_file)

    def enqueue(client: InterviewAccessClient, options: JobOptions) -> str:
        if users_file or len(user_ids) > 1:
            return client.enqueue_cohort(user_ids, interview_ids, **options)
        return client.enqueue(user_ids[0], interview_ids, **options)

    _run(enqueue, options, wait=wait, timeout=timeout)


def _only(_: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str:
    """Return the value of an option that may be given once; click takes the last of several."""
    if len(values) > 1:
        raise click.UsageError(f"{option.opts[0]}: got {len(values)} values, expected one.")
    return values[0]


@click.command()
@click.option(
    "--user",
    "user_id",
    required=True,
    multiple=True,
    callback=_only,
    metavar="ID",
    help="Whose attempt: 1 to 36 characters.",
)
@click.option(
    "--interview",
    "interview_id",
    required=True,
    multiple=True,
    callback=_only,
    metavar="ID",
    help="The interview.",
)
@_with_options
def attempt(
    *, user_id: str, interview_id: str, wait: bool, timeout: float | None, **options: object
) -> None:
    """Enqueue a job that creates an interview attempt of a user, and print its ID.

    The attempt starts when a worker executes the job. Output and exit status are those of `grant`.
    """
    _run(
        lambda client, options: client.enqueue_attempt(interview_id, user_id, **options),
        options,
        wait=wait,
        timeout=timeout,
    )


def _ids(noun: str, given: Sequence[str], file: IO[str] | None) -> list[str]:
    """Return the IDs of either source, and print a note if a file has none."""
    if bool(given) == bool(file):
        raise click.UsageError(f"Give the {noun}s either by --{noun} or by --{noun}s-from.")
    if not file:
        return list(given)
    ids = [text for line in file if (text := line.strip())]
    if not ids:
        click.echo(f"{one_line(file.name)} has no {noun} IDs: the job grants nothing.", err=True)
    return ids


def _run(
    enqueue: Callable[[InterviewAccessClient, JobOptions], str],
    options: dict[str, object],
    *,
    wait: bool,
    timeout: float | None,
) -> None:
    """Enqueue a job, print its ID or its result, and exit with the documented status."""
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is how long --wait waits: give both, or neither.")
    if not os.environ.get("CELERY_BROKER_URL"):
        end(2, f"CELERY_BROKER_URL: not set, expected {FORMS['redis']}")
    try:
        client = InterviewAccessClient()
        job_id = enqueue(client, options)  # type: ignore[arg-type] # click passes no others
    except (ValueError, InvalidGrantRequestException) as error:
        end(2, one_line(error))
    except QueueUnavailableError as error:
        end(UNAVAILABLE, one_line(error))
    except InterviewAccessError as error:
        end(FAILED, one_line(f"{type(error).__name__}: {error}"))
    if not wait:
        click.echo(job_id)
        return
    click.echo(f"job {one_line(job_id)} is queued", err=True)
    try:
        with _progress_bar() as on_progress:
            result = client.wait(
                job_id,
                timeout=_DEFAULT_TIMEOUT if timeout is None else timeout,
                on_progress=on_progress,
            )
    except (NoAnswerInTimeError, QueueUnavailableError) as error:
        end(UNAVAILABLE, one_line(error))
    except InterviewAccessError as error:
        end(FAILED, one_line(f"{type(error).__name__}: {error}"))
    click.echo(json.dumps(result))


@contextmanager
def _progress_bar() -> Iterator[Callable[[JobProgress], None] | None]:
    """Show a progress bar if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - slow, and needed on a terminal only
    from rich.progress import (  # noqa: PLC0415 - likewise
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
    )

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("granting", total=None)
        yield lambda seen: progress.update(task, completed=seen.done, total=seen.total)
