"""interview-access dead-letters."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import click
from interview_access.contracts import is_job_id

from storage.errors import StorageError
from storage.postgres import PostgresStorage
from worker.broker.dead_letters import DeadLetter, DeadLetters, LetterFilter, readable
from worker.cli.environment import opened_queue, read_settings
from worker.cli.terminal import (
    FAILED,
    counted,
    end,
    not_empty,
    one_line,
    read_age,
)
from worker.settings import DatabaseSettings

F = TypeVar("F", bound=Callable[..., object])

_REASON_CHARACTERS = 100  # in the list
_SHOWN_CHARACTERS = 30_000  # of a field; the longest sentence of an error has as many
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
    """List the dead letters, oldest first: ID, time, attempts, size, task, job, reason.

    The reason is cut after 100 characters, and after 4,096 bytes with --json; `show` has all of it.
    """
    with _letters() as letters:
        letter = None
        for letter in letters:
            if as_json:
                click.echo(json.dumps(letter.model_dump(mode="json")))
                continue
            click.echo(_line(letter))
        if letter is None:
            click.echo("There are no dead letters.", err=True)


def _line(letter: DeadLetter) -> str:
    attempts = counted(letter.attempts, "attempt")
    return (
        f"{letter.id}  {letter.time:%Y-%m-%d %H:%M:%S}Z  {attempts}  "
        f"{letter.size:,} B  {one_line(letter.task, 255) or '-'}  "
        f"{one_line(letter.job_id, 255) or '-'}  "
        f"{one_line(' '.join(letter.reason.split()), _REASON_CHARACTERS)}"
    )


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
        click.echo(f"{name:<9} {one_line(value, _SHOWN_CHARACTERS)}")
    text = readable(message, at_most=_MESSAGE_CHARACTERS)
    click.echo(f"message\n{text[:_MESSAGE_CHARACTERS]}")
    if len(text) > _MESSAGE_CHARACTERS or letter.size > len(message):
        click.echo("The message is cut here: --raw writes all of it.", err=True)


class _Age(click.ParamType[timedelta]):
    name = "age"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        age = read_age(str(value))
        if age is not None:
            return age
        raise click.BadParameter(
            f"got {one_line(value)!r}, expected an age such as 90s, 30min, 12h or 7d.", ctx, param
        )


def _selecting(command: F) -> F:
    """Add the IDs, and the options that select dead letters instead of IDs."""
    options = (
        click.argument("letter_ids", metavar="[ID]...", nargs=-1, callback=_letter_id),
        click.option("--all", "all_letters", is_flag=True, help="Select all dead letters."),
        click.option(
            "--reason",
            metavar="TEXT",
            callback=not_empty,
            help="Select those whose reason has this text.",
        ),
        click.option(
            "--task", metavar="NAME", callback=not_empty, help="Select those of this task."
        ),
        click.option(
            "--older-than",
            type=_Age(),
            metavar="AGE",
            help="Select those that are older: 90s, 30min, 12h, 7d.",
        ),
        click.option("--dry-run", is_flag=True, help="List the selected ones, and change nothing."),
        click.option("--yes", is_flag=True, help="Do not ask."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@dead_letters.command()
@_selecting
def requeue(letter_ids: tuple[str, ...], *, yes: bool, **options: Any) -> None:
    """Requeue dead letters, with their attempts reset.

    Give their IDs, or options that select them; several options narrow the selection. Dead letters
    that are added meanwhile are not selected. More than one is requeued after a confirmation.
    """
    wanted = _wanted(letter_ids, **options)
    if wanted:
        _for_selected(
            wanted, DeadLetters.requeue, "requeue", dry_run=options["dry_run"], asks_from=2, yes=yes
        )
    else:
        _for_each(letter_ids, DeadLetters.requeue, "requeued", note=_outcome_of)


@dead_letters.command()
@_selecting
def drop(letter_ids: tuple[str, ...], *, yes: bool, **options: Any) -> None:
    """Delete dead letters permanently, after a confirmation.

    Give their IDs, or options that select them; several options narrow the selection. Dead letters
    that are added meanwhile are not selected.
    """
    wanted = _wanted(letter_ids, **options)
    if wanted:
        _for_selected(
            wanted, DeadLetters.drop, "drop", dry_run=options["dry_run"], asks_from=1, yes=yes
        )
        return
    if not yes:
        click.confirm(
            f"Delete {counted(len(letter_ids), 'dead letter')} for good?", abort=True, err=True
        )
    _for_each(letter_ids, DeadLetters.drop, "dropped")


def _wanted(
    letter_ids: tuple[str, ...],
    *,
    all_letters: bool,
    reason: str | None,
    task: str | None,
    older_than: timedelta | None,
    dry_run: bool,
) -> LetterFilter | None:
    """Return the filter of the options; None if IDs are given."""
    before = None if older_than is None else datetime.now(UTC) - older_than
    has_filter = any(one is not None for one in (reason, task, older_than))
    if [bool(letter_ids), all_letters, has_filter].count(True) != 1:
        raise click.UsageError(
            "Give IDs, or --all, or at least one of --reason, --task and --older-than."
        )
    if letter_ids and dry_run:
        raise click.UsageError("--dry-run belongs to the options that select dead letters.")
    return None if letter_ids else LetterFilter(reason, task, before)


_Operation = Callable[[DeadLetters, Sequence[DeadLetter]], list[DeadLetter]]


def _for_selected(
    wanted: LetterFilter, apply: _Operation, verb: str, *, dry_run: bool, asks_from: int, yes: bool
) -> None:
    """Apply an operation to the dead letters that a filter selects, in pages.

    Args:
        wanted: The filter.
        apply: The operation on a page.
        verb: Its name.
        dry_run: Whether to list the letters only.
        asks_from: Number of letters from which a confirmation is required.
        yes: Whether it is given.
    """
    done = {"requeue": "requeued", "drop": "dropped"}[verb]
    with _letters() as letters:
        number, last = 0, ""
        for page in letters.pages(wanted):
            number, last = number + len(page), page[-1].id
            for letter in page if dry_run else ():
                click.echo(_line(letter))
        if not number:
            click.echo("No dead letter is selected.", err=True)
            return
        if dry_run:
            click.echo(f"{counted(number, 'dead letter')} would be {done}.", err=True)
            return
        if number >= asks_from and not yes:
            click.confirm(
                f"{verb.capitalize()} {counted(number, 'dead letter')}?", abort=True, err=True
            )
        number, in_ledger = 0, 0
        for page in letters.pages(wanted, last):
            for letter in apply(letters, page):
                number += 1
                in_ledger += bool(letter.in_ledger)
                click.echo(f"{letter.id}: {done} (job {one_line(letter.job_id, 255) or 'unknown'})")
    click.echo(f"{counted(number, 'dead letter')} {done}.", err=True)
    if verb == "requeue" and in_ledger:
        click.echo(
            f"The ledger has a result of {in_ledger:,} of their jobs, which stays; to run such a "
            "request, send it under a new job ID.",
            err=True,
        )


def _for_each(
    letter_ids: tuple[str, ...],
    apply: _Operation,
    done: str,
    *,
    note: Callable[[DeadLetter], str | None] = lambda _: None,
) -> None:
    """Apply an operation to dead letters, and print a line and a note for each."""
    missing = False
    with _letters() as letters:
        for letter_id in letter_ids:
            letter = letters.get(letter_id)
            if letter is None or not apply(letters, [letter]):
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
    with opened_queue("The dead letters cannot be read") as redis:
        yield DeadLetters(redis)
