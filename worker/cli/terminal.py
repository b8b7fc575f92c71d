"""Exit statuses, and values that are safe to print."""

from __future__ import annotations

import sys
from typing import NoReturn

import click
from interview_access.errors import shortened

FAILED, UNAVAILABLE = 1, 3
"""Exit statuses. 0 is success, and 2 is click's for a usage error."""

PERMIT = "permit it by ACL SETUSER; deploy/redis/users.acl has a user for operators"
"""What to do if Redis denies a command."""

VALUE_CHARACTERS = 2_000
"""Characters of a value that are printed."""


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
