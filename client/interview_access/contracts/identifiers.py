"""IDs of jobs, users and interviews: which values are valid, and the canonical form of a UUID."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import LiteralString, NewType, TypeGuard
from uuid import UUID

from interview_access.contracts.names import MAX_JOB_ID_LENGTH, MAX_USER_ID_LENGTH

InterviewId = NewType("InterviewId", str)
"""An interview's ID in canonical form: lower case, 8-4-4-4-12."""

UUID_PATTERN = "[0-9A-Fa-f]{32}|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
"""Regular expression of a UUID: 32 ASCII hex digits, or 8-4-4-4-12 of them, in any case.

``uuid.UUID`` accepts many other spellings.
"""

JOB_ID_RULE = f"1 to {MAX_JOB_ID_LENGTH} printable characters"
"""The rule of :func:`is_job_id`, for error sentences."""

USER_ID_RULE: LiteralString = "a string of 1 to 36 characters without NUL or lone surrogates"
"""The rule of :func:`is_user_id`, for error sentences."""

_UUID = re.compile(UUID_PATTERN)
_SHAPE = bytes(
    ord("h") if one in b"0123456789abcdef" else one if one in b"-\n" else ord("?")
    for one in range(256)
)
_SLICE = 10_000  # IDs: joining a million at once takes hundreds of MB


def is_job_id(value: object) -> bool:
    """Report whether a value is a valid job ID: 1 to 255 printable characters."""
    return isinstance(value, str) and 1 <= len(value) <= MAX_JOB_ID_LENGTH and value.isprintable()


def is_user_id(value: object) -> bool:
    """Report whether a value is a valid user ID: 1 to 36 characters that PostgreSQL can store."""
    return (
        isinstance(value, str)
        and 1 <= len(value) <= MAX_USER_ID_LENGTH
        and "\0" not in value
        and not any("\ud800" <= character <= "\udfff" for character in value)
    )


def is_interview_id(text: str) -> bool:
    """Report whether a text is a UUID by :data:`UUID_PATTERN`."""
    return bool(_UUID.fullmatch(text))


def canonical_interview_id(text: str) -> InterviewId | None:
    """Convert a UUID to its canonical form; None if the text is not a UUID."""
    canonical = canonical_interview_ids([text])
    return canonical[0] if canonical else None


def canonical_interview_ids(texts: Sequence[str]) -> list[InterviewId]:
    """Convert UUIDs to their canonical form, in order, and omit texts that are not UUIDs."""
    if _all_canonical(texts):
        return list(texts)  # type: ignore[arg-type] # InterviewId() costs as much as the rest
    matching = map(str.lower, filter(_UUID.fullmatch, texts))
    return [text if text[8] == "-" else _hyphenated(text) for text in matching]  # type: ignore[misc] # likewise


def as_text(value: object) -> object:
    """Convert a UUID object to its string; return any other value, which the worker validates."""
    return str(value) if isinstance(value, UUID) else value


def as_texts(values: object) -> object:
    """Convert an iterable to a list, and its UUID objects to strings.

    Strings, bytes, mappings and values that are not iterable are returned as they are.
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        return values
    listed = list(values)
    return listed if are_strings(listed) else [as_text(one) for one in listed]


def are_strings(values: Sequence[object]) -> TypeGuard[Sequence[str]]:
    """Report whether each value is a plain ``str``; takes milliseconds for 100,000."""
    return set(map(type, values)) <= {str}


def strings_of(values: Sequence[object]) -> tuple[str, ...] | None:
    """Convert strings and UUID objects to strings; None if a value is neither."""
    if are_strings(values):
        return tuple(values)
    texts = tuple(str(value) if isinstance(value, UUID) else value for value in values)
    return texts if all(isinstance(text, str) for text in texts) else None  # type: ignore[return-value] # all() is no type guard


def slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Partition texts so that joining a part takes little memory."""
    return (texts[at : at + _SLICE] for at in range(0, len(texts), _SLICE))


def _all_canonical(texts: Sequence[str]) -> bool:
    """Report whether each text is a UUID in canonical form; milliseconds for 100,000."""
    return all(map(_are_canonical, slices(texts)))


def _are_canonical(texts: Sequence[str]) -> bool:
    lines = "\n".join([*texts, ""]).encode(errors="replace")
    return lines.translate(_SHAPE) == b"hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh\n" * len(texts)


def _hyphenated(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
