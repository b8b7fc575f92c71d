"""The interview-access command. What a subcommand works with is imported when it runs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, TypeVar

import click

if TYPE_CHECKING:  # a command that only enqueues loads no database, and --help loads nothing
    from collections.abc import Callable

    from interview_access.contracts import JobProgress, JobStatus
    from redis import Redis

    from worker.broker.dead_letters import DeadLetter, DeadLetters
    from worker.services.job_status import JobStatusService
    from worker.settings import DatabaseSettings

S = TypeVar("S", bound="DatabaseSettings")

_REASON = 100  # characters of a reason in a list
_FIELD, _MESSAGE = 2_000, 20_000  # characters of a value, and of a message, on a terminal
_SHOWN_BYTES = 8 * 1024 * 1024  # of a message that is decoded to be shown

_FAILED, _NO_ANSWER = 1, 3  # exit codes; 0 is success and 2 click's own for a wrong call


def _letter_id(_: object, __: object, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for one in [given] if isinstance(given, str) else given:
        if not re.fullmatch(r"\d{1,20}-\d{1,20}", one):
            raise click.BadParameter(
                f"got {one!r}, expected an id of the list, such as 1764000000000-0."
            )
    return given


def _job_id(_: object, __: object, given: str) -> str:
    from interview_access.contracts import JOB_ID_RULE, describe, is_job_id

    if not is_job_id(given):
        raise click.BadParameter(f"got {describe(given)}, expected {JOB_ID_RULE}.")
    return given


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="interview-access-worker")
def main() -> None:
    """Grant users access to interviews, and run what does it."""


@main.command(short_help="Enqueue a job, and wait for its result if asked to.")
@click.option("--user", "user_id", required=True, metavar="ID", help="Who is granted access.")
@click.option("--interview", "interview_ids", multiple=True, metavar="ID", help="An interview.")
@click.option(
    "--interviews-from",
    "file",
    type=click.File(encoding="utf-8", errors="surrogateescape"),
    metavar="FILE|-",
    help="The interviews, an id a line.",
)
@click.option("--job-id", metavar="ID", help="The job's id; a new one unless given.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait.",
)
def grant(
    user_id: str,
    interview_ids: tuple[str, ...],
    file: IO[str] | None,
    job_id: str | None,
    wait: bool,
    timeout: float,
) -> None:
    """Enqueue a job that grants a user access to interviews, and print its id.

    With --wait, its result comes as a line of JSON on standard output, all else on standard error.
    Ends 0 on success, 1 where the job failed, 2 for a wrong call, 3 where no answer came in time or
    Redis is away.
    """
    from interview_access.errors import (
        InterviewAccessError,
        NoAnswerInTimeError,
        QueueUnavailableError,
    )
    from interview_access.producer import InterviewAccessClient

    if bool(interview_ids) == bool(file):
        raise click.UsageError("Give the interviews either by --interview or by --interviews-from.")
    ids = [line.strip() for line in file if line.strip()] if file else list(interview_ids)
    try:
        client = InterviewAccessClient()
    except ValueError as error:
        _end(2, str(error))
    try:
        job_id = client.enqueue(user_id, ids, job_id=job_id)
        if not wait:
            click.echo(job_id)
            return
        click.echo(f"job {job_id} is queued", err=True)
        with _bar() as on_progress:
            result = client.wait(job_id, timeout=timeout, on_progress=on_progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (NoAnswerInTimeError, QueueUnavailableError) as error:
        _end(_NO_ANSWER, _one_line(error))
    except InterviewAccessError as error:
        _end(_FAILED, _one_line(f"{type(error).__name__}: {error}"))
    import json

    click.echo(json.dumps(result))


@main.command(short_help="Report a job's state and result.")
@click.argument("job_id", callback=_job_id)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def status(job_id: str, as_json: bool) -> None:
    """Report a job's state and result, from the ledger, the result backend and its announcement.

    Ends 0 whatever the state is; 3 if Redis or PostgreSQL is away.
    """
    with _job_status() as (jobs, redis):
        known = jobs.status(redis, job_id)
    _print_status(known, as_json=as_json)


@main.command(short_help="Cancel a job.")
@click.argument("job_id", callback=_job_id)
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def cancel(job_id: str, as_json: bool) -> None:
    """Cancel a job: if it has not begun, it never will; if it runs, it stops at its next chunk.

    Reports the job's state then. Ends 0 if the job is cancelled, or will be unless it is about to
    finish; 1 if it had ended before; 3 if Redis or PostgreSQL is away: cancel it again then.
    """
    with _job_status() as (jobs, redis):
        known = jobs.cancel(redis, job_id)
    _print_status(known, as_json=as_json)
    sys.exit(0 if known.cancel_requested or known.state == "cancelled" else _FAILED)


@main.command(short_help="Bring the tables to the newest revision.")
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be done.")
def migrate(dry_run: bool) -> None:
    """Bring the database's tables to the newest revision, also while they are in use.

    Creates what is missing, and adopts what the platform's Django service has made. Duplicate
    grants are removed, the lowest id of each stays: --dry-run tells how many first.
    """
    from worker.settings import DatabaseSettings

    settings = _read(DatabaseSettings)
    from storage.interface import StorageError
    from storage.schema import migrate as migrate_schema

    try:
        migrate_schema(settings.database_url, dry_run=dry_run, report=click.echo)
    except StorageError as error:
        _end(_FAILED, str(error))


@main.command(short_help="Run servers, worker and Flower here until Ctrl-C.")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".local"),
    show_default=True,
    help="The folder that keeps the data.",
)
def up(data: Path) -> None:
    """Run PostgreSQL, Valkey, a worker and Flower here until Ctrl-C."""
    with _local_extra():
        from devstack.up import run_up

    # A killed `make` does not signal its commands.
    sys.exit(run_up(data, with_parent="MAKELEVEL" in os.environ))


@main.command(short_help="Show the main job on real servers, and check it.")
def demo() -> None:
    """Show the main job on real servers of its own, and check what it shows."""
    with _local_extra():
        from devstack.demo import run_demo

    sys.exit(run_demo())


@main.group("dead-letters", short_help="Inspect, requeue and delete dead letters.")
def dead_letters() -> None:
    """Inspect dead letters, messages that could not be processed; requeue or delete them."""


@dead_letters.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_letters(as_json: bool) -> None:
    """List the dead letters, oldest first: ID, time, attempts, size, task, job, reason."""
    import json

    with _letters() as letters:
        letter = None
        for letter in letters:
            if as_json:
                click.echo(json.dumps(letter.model_dump(mode="json")))
                continue
            attempts = "1 attempt" if letter.attempts == 1 else f"{letter.attempts} attempts"
            click.echo(
                f"{letter.id}  {letter.time:%Y-%m-%d %H:%M:%S}Z  {attempts}  "
                f"{letter.size:,} B  {_one_line(letter.task, 255) or '-'}  "
                f"{_one_line(letter.job_id, 255) or '-'}  "
                f"{_one_line(' '.join(letter.reason.split()), _REASON)}"
            )
        if letter is None:
            click.echo("There are no dead letters.", err=True)


@dead_letters.command()
@click.argument("letter_id", metavar="ID", callback=_letter_id)
@click.option("--raw", is_flag=True, help="Write the bytes of the message to a file or a pipe.")
def show(letter_id: str, raw: bool) -> None:
    """Show one dead letter with its message."""
    from worker.broker.dead_letters import readable

    if raw and sys.stdout.isatty():
        raise click.UsageError("--raw writes any bytes: redirect the output to a file or a pipe.")
    with _letters() as letters:
        letter = letters.get(letter_id)
        message = letters.message(letter_id, at_most=None if raw else _SHOWN_BYTES)
        if letter is None or message is None:
            _end(_FAILED, _unknown_letter(letter_id))
    if raw:
        click.echo(message, nl=False)
        return
    for name, value in letter.model_dump(mode="json").items():
        click.echo(f"{name:<9} {_one_line(value)}")
    text = readable(message, at_most=_MESSAGE)
    click.echo(f"message\n{text[:_MESSAGE]}")
    if len(text) > _MESSAGE or letter.size > len(message):
        click.echo("The message is cut here: --raw writes all of it.", err=True)


@dead_letters.command()
@click.argument("letter_ids", metavar="ID...", nargs=-1, required=True, callback=_letter_id)
def requeue(letter_ids: tuple[str, ...]) -> None:
    """Send dead letters back to their queues; their attempts are counted from 0 again."""
    _for_each(letter_ids, lambda letters, one: letters.requeue(one), "requeued", note=_result_of)


@dead_letters.command()
@click.argument("letter_ids", metavar="ID...", nargs=-1, required=True, callback=_letter_id)
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(letter_ids: tuple[str, ...], yes: bool) -> None:
    """Delete dead letters for good, after asking."""
    if not yes:
        click.confirm(f"Delete {len(letter_ids)} messages for good?", abort=True, err=True)
    _for_each(letter_ids, lambda letters, one: letters.drop(one), "dropped")


@contextmanager
def _job_status() -> Iterator[tuple[JobStatusService, Redis]]:
    from worker.settings import Settings

    _read(Settings)
    from celery.exceptions import CeleryError
    from kombu.exceptions import OperationalError
    from redis.exceptions import RedisError

    from storage.interface import StorageError
    from worker.celery import app
    from worker.services.job_status import JobStatusService

    try:
        with app.connection_for_write() as connection:
            yield JobStatusService(app.storage, app.backend), connection.default_channel.client
    except StorageError as error:
        _end(_NO_ANSWER, _one_line(f"The job's state cannot be read: {error}"))
    except (CeleryError, OperationalError, RedisError, OSError) as error:
        reason = error.__cause__ or error
        _end(_NO_ANSWER, _one_line(f"The job's state cannot be read: {reason}"))


def _print_status(known: JobStatus, *, as_json: bool) -> None:
    import json

    fields = known.model_dump(mode="json", exclude_none=True)
    if as_json:
        click.echo(json.dumps(fields))
        return
    for name, value in fields.items():
        if isinstance(value, list):
            shown = f"{len(value):,} (--json names them)"
        else:
            shown = _one_line(json.dumps(value) if isinstance(value, dict) else value)
        click.echo(f"{name:<24} {shown}")


def _one_line(value: object, at_most: int = _FIELD) -> str:
    """Make a value safe to print: other people chose it, and a terminal obeys its escapes."""
    from interview_access.errors import shortened

    return shortened(str(value), quoted=False, at_most=at_most)


def _for_each(
    letter_ids: tuple[str, ...],
    operation: Callable[[DeadLetters, DeadLetter], bool],
    done: str,
    *,
    note: Callable[[DeadLetter], str | None] = lambda _: None,
) -> None:
    """Apply an operation to dead letters, and print a line and the note, if any, for each."""
    missing = False
    with _letters() as letters:
        for letter_id in letter_ids:
            letter = letters.get(letter_id)
            if letter is None or not operation(letters, letter):
                missing = True
                click.echo(_unknown_letter(letter_id), err=True)
                continue
            job_id = _one_line(letter.job_id, 255) or "unknown"
            click.echo(f"{letter_id}: {done} (job {job_id})")
            if noted := note(letter):
                click.echo(f"{letter_id}: {noted}", err=True)
    if missing:
        sys.exit(_FAILED)


def _result_of(letter: DeadLetter) -> str | None:
    """What requeueing a dead letter comes to where the ledger has a result of its job, if so."""
    from interview_access.contracts import is_job_id

    from storage.interface import StorageError
    from storage.postgres import PostgresStorage
    from worker.settings import DatabaseSettings

    in_ledger = letter.in_ledger
    try:
        if in_ledger is None and is_job_id(letter.job_id):  # by an earlier release
            with closing(PostgresStorage(_read(DatabaseSettings).database_url)) as ledger:
                in_ledger = ledger.get_finished_job(letter.job_id) is not None
    except StorageError as error:
        return _one_line(f"it is not known whether the ledger has a result of its job: {error}")
    if not in_ledger:
        return None
    return (
        f"the ledger has a result of job {_one_line(letter.job_id, 255)}, which stays; to run the "
        "request, send it under a new job ID."
    )


def _unknown_letter(letter_id: str) -> str:
    return f"{letter_id}: there is no such dead letter; `dead-letters list` prints their IDs."


@contextmanager
def _letters() -> Iterator[DeadLetters]:
    from interview_access.producer import CLIENT_NAME, connect
    from redis.exceptions import RedisError

    from worker.broker.dead_letters import DeadLetters
    from worker.settings import Settings

    broker = _read(Settings).broker
    try:
        with connect(broker, client_name=CLIENT_NAME) as redis:
            yield DeadLetters(redis)
    except (RedisError, OSError) as error:
        _end(_NO_ANSWER, _one_line(f"The dead letters cannot be read: {error}"))


@contextmanager
def _local_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        _end(
            _FAILED,
            f"No module {error.name}: install the local servers with "
            "`pip install 'interview-access-worker[local]'`.",
        )


def _read(kind: type[S]) -> S:
    from worker.settings import SettingsError

    try:
        return kind.from_environment()
    except SettingsError as error:
        _end(2, str(error))


def _end(code: int, sentence: str) -> NoReturn:
    click.echo(sentence, err=True)
    sys.exit(code)


@contextmanager
def _bar() -> Iterator[Callable[[JobProgress], None] | None]:
    """A bar on a terminal; in a pipe nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("granting", total=None)
        yield lambda seen: progress.update(task, completed=seen.done, total=seen.total)


if __name__ == "__main__":
    main()
