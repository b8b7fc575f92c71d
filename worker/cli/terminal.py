"""Exit statuses, words that are safe to print, and values of options."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import click
from interview_access.contracts import canonical_interview_id, describe
from interview_access.contracts.identifiers import USER_ID_RULE, is_user_id
from interview_access.errors import shortened

from tasks.audit import read_time

FAILED, UNAVAILABLE = 1, 3
"""Exit statuses. 0 is success, and 2 is click's for a usage error."""

VALUE_CHARACTERS = 2_000
"""Characters of a value that are printed."""

SPELLINGS = "32 hex digits or 8-4-4-4-12, in any case"
"""The accepted spellings of a UUID."""

_UNITS = {
    "s": timedelta(seconds=1),
    "min": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}


def end(status: int, sentence: str) -> NoReturn:
    """Print a sentence on standard error, and exit.

    Args:
        status: The exit status.
        sentence: What was received, what was expected and what to do.
    """
    click.echo(sentence, err=True)
    sys.exit(status)


def one_line(value: object, at_most: int = VALUE_CHARACTERS) -> str:
    """Escape a value that a producer chose: a terminal executes control sequences.

    Args:
        value: Any value.
        at_most: Characters after which it is cut.
    """
    return shortened(str(value), quoted=False, at_most=at_most)


def read_age(text: str) -> timedelta | None:
    """Read an age such as 90s, 30min, 12h or 7d; None if the text is not one."""
    found = re.fullmatch(r"([0-9]{1,5})(s|min|h|d)", text)
    return int(found[1]) * _UNITS[found[2]] if found else None


class Moment(click.ParamType[datetime]):
    """A time in ISO 8601, or an age."""

    name = "moment"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the time that the text means; see click."""
        text = str(value)
        age = read_age(text)
        moment = read_time(text) if age is None else datetime.now(UTC) - age
        if moment is None:
            raise click.BadParameter(
                f"got {one_line(text)!r}, expected an age such as 30min, 12h or 7d, or a time in "
                "ISO 8601 such as 2030-01-31T12:00:00Z.",
                ctx,
                param,
            )
        return moment


class WholeNumber(click.ParamType[int]):
    """A whole number of a range."""

    name = "integer"

    def __init__(self, first: int, last: int) -> None:
        """Accept the numbers from the first to the last, both included."""
        self._first, self._last = first, last

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number; see click."""
        text = str(value)
        number = int(text) if re.fullmatch(r"[0-9]{1,9}", text) else None
        if number is None or not self._first <= number <= self._last:
            raise click.BadParameter(
                f"got {one_line(text)!r}, expected a whole number from {self._first:,} to "
                f"{self._last:,}.",
                ctx,
                param,
            )
        return number


def not_empty(_: object, __: object, given: str | None) -> str | None:
    """Refuse an empty value, as of a shell variable that is not set; an option's callback.

    Raises:
        click.BadParameter: if the value is empty.
    """
    if given == "":
        raise click.BadParameter("got an empty text, expected at least one character.")
    return given


def read_user_id(_: object, __: object, given: str | None) -> str | None:
    """Refuse a user ID that no user can have; an option's callback.

    Raises:
        click.BadParameter: if the value is not a valid user ID.
    """
    if given is not None and not is_user_id(given):
        raise click.BadParameter(f"got {describe(given)}, expected {USER_ID_RULE}.")
    return given


def read_interview_id(_: object, __: object, given: str | None) -> str | None:
    """Convert a UUID to its canonical form; an option's callback.

    Raises:
        click.BadParameter: if the value is not a UUID.
    """
    if given is None:
        return None
    canonical = canonical_interview_id(given)
    if canonical is None:
        raise click.BadParameter(f"got {describe(given)}, expected a UUID of {SPELLINGS}.")
    return canonical


def counted(number: int, noun: str) -> str:
    """Return a number of things in words, such as ``1 job`` or ``2,000 jobs``.

    Args:
        number: How many there are.
        noun: One of them, with a regular plural.
    """
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a line for each field, with its value in words.

    Args:
        fields: Values of JSON by name. Of a list only the length is printed.
    """
    for name, value in fields.items():
        click.echo(f"{name:<24} {one_line(_in_words(value))}")


def _in_words(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list():
            return f"{len(value):,} (--json names them)"
        case dict():
            return ", ".join(f"{name}: {_in_words(one)}" for name, one in value.items())
        case _:
            return str(value)
