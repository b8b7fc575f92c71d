"""Values as text for people, in error sentences and log lines: short, and on one line."""

from __future__ import annotations

from collections.abc import Mapping

_LONG_NUMBER = 256  # bits
_LONG = 36  # characters: a longer string is described with its length


def shortened(text: str, *, quoted: bool = True, at_most: int = 80) -> str:
    """Truncate a text and escape the characters that do not print.

    The result is safe in logs, on terminals and in every JSON reader: line breaks, terminal control
    sequences, NUL and lone surrogates are escaped.

    Args:
        text: Any text.
        quoted: Whether the result is in quotes, as a Python literal.
        at_most: Characters of the text that are kept.
    """
    shown = text if len(text) <= at_most else text[:at_most] + "…"
    if quoted:
        return repr(shown)
    if shown.isprintable():
        return shown
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown
    )


def describe(value: object) -> str:
    """Describe a value in a few words and in JSON's terms, for the sentence of an error."""
    match value:
        case None:
            words = "null"
        case bool():
            words = str(value).lower()
        case int() if value.bit_length() > _LONG_NUMBER:  # str() refuses 4,300 digits
            words = f"a number of {value.bit_length():,} bits"
        case int() | float():
            words = f"the number {shortened(repr(value), quoted=False)}"
        case str() if len(value) > _LONG:
            words = f"a string of {len(value):,} characters, {shortened(value)}"
        case str():
            words = f"the string {shortened(value)}"
        case list() | tuple():
            words = f"a list of {len(value):,}"
        case Mapping():
            words = f"an object of {len(value):,}"
        case _:
            words = f"a {type(value).__name__}"
    return words
