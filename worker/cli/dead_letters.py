"""interview-access dead-letters."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import click
from interview_access.connections import CLIENT_NAME, connect
from interview_access.contracts import is_job_id
from redis.exceptions import NoPermissionError, RedisError

from storage.errors import StorageError
from storage.postgres import PostgresStorage
from worker.broker.dead_letters import DeadLetter, DeadLetters, readable
from worker.cli.environment import read_settings
from worker.cli.terminal import FAILED, PERMIT, UNAVAILABLE, end, one_line
from worker.settings import DatabaseSettings, Settings

_REASON_CHARACTERS = 100  # in the list
_MESSAGE_CHARACTERS = 20_000
_SHOWN_BYTES = 8 * 1024 * 1024  # of a message that is decoded to be shown


def _letter_id(_: object, __: object, given: str | tuple[str, ...]) -> str | tuple[str, ...]:
    for one in [given] if isinstance(given, str) else given:
        if not re.fullmatch(r"\d{1,20}-\d{1,20}", one):
            raise click.BadParameter(
                f"got {one!r}, expected an ID of the list, such as 1764000000000-0."
            )
    return given


@click.group()
def dead_letters() -> None:
    """Inspect dead letters, messages that could not be processed; requeue or delete them."""


@dead_letters.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in a line.")
def list_letters(*, as_json: bool) -> None:
    """List the dead letters, oldest first: ID, time, attempts, size, task, job, reason."""
    with _letters() as letters:
        letter = None
        for letter in letters:
            if as_json:
                click.echo(json.dumps(letter.model_dump(mode="json")))
                continue
            attempts = "1 attempt" if letter.attempts == 1 else f"{letter.attempts} attempts"
            click.echo(
                f"{letter.id}  {letter.time:%Y-%m-%d %H:%M:%S}Z  {attempts}  "
                f"{letter.size:,} B  {one_line(letter.task, 255) or '-'}  "
                f"{one_line(letter.job_id, 255) or '-'}  "
                f"{one_line(' '.join(letter.reason.split()), _REASON_CHARACTERS)}"
            )
        if letter is None:
            click.echo("There are no dead letters.", err=True)


@dead_letters.command()
@click.argument("letter_id", metavar="ID", callback=_letter_id)
@click.option("--raw", is_flag=True, help="Write the bytes of the message to a file or a pipe.")
def show(letter_id: str, *, raw: bool) -> None:
    """Show one dead letter with its message."""
    if raw and sys.stdout.isatty():
        raise click.UsageError("--raw writes any bytes: redirect the output to a file or a pipe.")
    with _letters() as letters:
        letter = letters.get(letter_id)
        message = letters.message(letter_id, at_most=None if raw else _SHOWN_BYTES)
        if letter is None or message is None:
            end(FAILED, _unknown(letter_id))
    if raw:
        click.echo(message, nl=False)
        return
    for name, value in letter.model_dump(mode="json").items():
        click.echo(f"{name:<9} {one_line(value)}")
    text = readable(message, at_most=_MESSAGE_CHARACTERS)
    click.echo(f"message\n{text[:_MESSAGE_CHARACTERS]}")
    if len(text) > _MESSAGE_CHARACTERS or letter.size > len(message):
        click.echo("The message is cut here: --raw writes all of it.", err=True)


@dead_letters.command()
@click.argument("letter_ids", metavar="ID...", nargs=-1, required=True, callback=_letter_id)
def requeue(letter_ids: tuple[str, ...]) -> None:
    """Requeue dead letters, with their attempts reset."""
    _for_each(letter_ids, lambda letters, one: letters.requeue(one), "requeued", note=_outcome_of)


@dead_letters.command()
@click.argument("letter_ids", metavar="ID...", nargs=-1, required=True, callback=_letter_id)
@click.option("--yes", is_flag=True, help="Do not ask.")
def drop(letter_ids: tuple[str, ...], *, yes: bool) -> None:
    """Delete dead letters permanently, after a confirmation."""
    if not yes:
        click.confirm(f"Delete {len(letter_ids)} messages for good?", abort=True, err=True)
    _for_each(letter_ids, lambda letters, one: letters.drop(one), "dropped")


def _for_each(
    letter_ids: tuple[str, ...],
    operation: Callable[[DeadLetters, DeadLetter], bool],
    done: str,
    *,
    note: Callable[[DeadLetter], str | None] = lambda _: None,
) -> None:
    """Apply an operation to dead letters, and print a line and a note for each."""
    missing = False
    with _letters() as letters:
        for letter_id in letter_ids:
            letter = letters.get(letter_id)
            if letter is None or not operation(letters, letter):
                missing = True
                click.echo(_unknown(letter_id), err=True)
                continue
            job_id = one_line(letter.job_id, 255) or "unknown"
            click.echo(f"{letter_id}: {done} (job {job_id})")
            if noted := note(letter):
                click.echo(f"{letter_id}: {noted}", err=True)
    if missing:
        sys.exit(FAILED)


def _outcome_of(letter: DeadLetter) -> str | None:
    """Explain what a requeue does if the ledger has an outcome of the job."""
    in_ledger = letter.in_ledger
    try:
        if in_ledger is None and is_job_id(letter.job_id):
            settings = read_settings(DatabaseSettings)
            with closing(PostgresStorage(settings.database_url)) as ledger:
                in_ledger = ledger.get_finished_job(letter.job_id) is not None
    except StorageError as error:
        return one_line(f"it is not known whether the ledger has a result of its job: {error}")
    if not in_ledger:
        return None
    return (
        f"the ledger has a result of job {one_line(letter.job_id, 255)}, which stays; to run the "
        "request, send it under a new job ID."
    )


def _unknown(letter_id: str) -> str:
    return f"{letter_id}: there is no such dead letter; `dead-letters list` prints their IDs."


@contextmanager
def _letters() -> Iterator[DeadLetters]:
    broker = read_settings(Settings).broker
    try:
        with connect(broker, client_name=CLIENT_NAME) as redis:
            yield DeadLetters(redis)
    except NoPermissionError as error:
        denied = str(error).rstrip(".")
        end(UNAVAILABLE, one_line(f"The dead letters cannot be read: {denied}; {PERMIT}."))
    except (RedisError, OSError) as error:
        end(UNAVAILABLE, one_line(f"The dead letters cannot be read: {error}"))
