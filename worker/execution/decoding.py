"""The decoding of messages within bounds: no message takes too much memory, stack or time."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from interview_access.contracts import describe, is_job_id
from kombu.utils.json import loads

_ENVELOPE_BYTES, _BYTES_PER_ID = 1024 * 1024, 64
"""Limits in bytes: for the envelope without IDs, and for each ID as text in Base64."""

_ENVELOPE_VALUES, _VALUES_PER_ID = 10_000, 4
"""Limits in JSON values: for the envelope without IDs, and for each ID of a plain JSON body."""

_LEVELS = 910
"""Nesting levels of JSON. What a parser accepts depends on the Python version and on the caller's
stack; each accepts these."""

_HEADER_LEVELS = 50  # a few hundred overflow the stack of pickle

_BETWEEN_BRACKETS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[^"\[\]{}]++', re.DOTALL)
"""Strings and what else separates brackets. Possessive quantifiers and the optional end take linear
time whatever the text."""

_STEPS = {"[": 1, "{": 1, "]": -1, "}": -1}

_HEADERS = re.compile(rb'"headers"\s*:\s*\{(.*)', re.DOTALL)
_JOB_ID = re.compile(rb'"id"\s*:\s*"([^"\\\x00-\x1f]{1,255})"')
_TASK = re.compile(rb'"task"\s*:\s*"([^"\\\x00-\x1f]{1,255})"')


class UnreadableMessageError(Exception):
    """A message does not follow the contract; the text says why."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a message and its job.

    Attributes:
        interview_ids: Grants that one job may request.
        attempts: Attempts that may end the pool process or the worker.
        seconds: Time limit of a job whose message sets no lower one.
    """

    interview_ids: int
    attempts: int
    seconds: float

    @property
    def message_bytes(self) -> int:
        """Bytes of a message."""
        return _ENVELOPE_BYTES + _BYTES_PER_ID * self.interview_ids

    def check(self, text: str) -> None:
        """Refuse JSON that would take too much memory or stack to decode.

        Args:
            text: The JSON.

        Raises:
            UnreadableMessageError: if it has too many values, or nests too deeply.
        """
        if any(text.count(one) > self.values for one in (",", "[", "{")):
            raise UnreadableMessageError(f"expected at most {self.values:,} values")
        # Few messages have so many brackets that their levels must be counted.
        if text.count("[") + text.count("{") > _LEVELS and _levels(text) > _LEVELS:
            raise UnreadableMessageError(f"expected at most {_LEVELS} levels of nesting")

    @property
    def values(self) -> int:
        """Commas, opening brackets and opening braces in a message: each at most so many."""
        return _ENVELOPE_VALUES + _VALUES_PER_ID * self.interview_ids


def check_headers(headers: Mapping[str, Any]) -> None:
    """Refuse headers that nest too deeply to be passed to a pool process.

    Args:
        headers: The message's headers.

    Raises:
        UnreadableMessageError: if they have more than 50 levels.
    """
    if _is_nested(headers, _HEADER_LEVELS):
        raise UnreadableMessageError(f"headers: expected at most {_HEADER_LEVELS} levels")


def find_identity(message: bytes) -> tuple[str, str]:
    """Search for the job ID and the task's name in a message without decoding it.

    Args:
        message: Any bytes, or the two ends of a message.

    Returns:
        Both, empty if they are not found or not printable.
    """
    headers = _HEADERS.search(message)
    found = [pattern.search(headers[1]) if headers else None for pattern in (_JOB_ID, _TASK)]
    texts = [one[1].decode(errors="replace") if one else "" for one in found]
    job_id, name = (text if is_job_id(text) else "" for text in texts)
    return job_id, name


def body_encoding(
    envelope: Mapping[str, Any], headers: Mapping[str, Any], properties: Mapping[str, Any]
) -> str:
    """Return the encoding of a body: ``""``, ``base64`` or ``gzip``.

    Others are refused: content encodings name Python codecs, some of which take minutes for 1 MB.

    Args:
        envelope: The message.
        headers: Its headers.
        properties: Its properties.

    Raises:
        UnreadableMessageError: if the body has another encoding.
    """
    expected = {
        "content-type": (envelope.get("content-type"), ("application/json",)),
        "content-encoding": (envelope.get("content-encoding"), ("utf-8", None)),
        "body_encoding": (properties.get("body_encoding"), ("base64", None)),
        "compression": (headers.get("compression"), ("application/x-gzip", None)),
    }
    for name, (value, allowed) in expected.items():
        if not any(value is one or value == one for one in allowed):
            wanted = " or ".join("nothing" if one is None else one for one in allowed)
            raise UnreadableMessageError(f"{name}: expected {wanted}, got {describe(value)}")
    if headers.get("compression"):
        return "gzip"
    return properties.get("body_encoding") or ""


@dataclass(frozen=True, slots=True)
class Call:
    """A decoded body. Its representation shows nothing of it.

    Attributes:
        args: The task's positional arguments.
        kwargs: Its named arguments.
        embedded: The callbacks, chain and chord that follow the job, as Celery embeds them.
    """

    args: list[Any] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    embedded: dict[str, Any] = field(repr=False)


NO_CALL = Call([], {}, {})


class UndecodableBodyError(Exception):
    """A body is not a call in JSON; the text says why."""


def decode(body: str, encoding: str, limits: Limits) -> Call:
    """Decode a body.

    Args:
        body: As it is in the envelope.
        encoding: ``""``, ``base64`` or ``gzip``.
        limits: What a message is allowed.

    Raises:
        UndecodableBodyError: if it is not a call in JSON, or exceeds a limit.
        MemoryError: if this process has too little memory.
    """
    try:
        text = _text(body, encoding, limits)
        limits.check(text)
        decoded = loads(text)
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodableBodyError(f"{type(error).__name__}: {error}") from error
    match decoded:
        case [list(args), dict(kwargs), dict() | None as embedded]:
            return Call(args, kwargs, embedded or {})
    raise UndecodableBodyError(f"expected [args, kwargs, embedded], got {describe(decoded)}")


def _text(body: str, encoding: str, limits: Limits) -> str:
    if not encoding:
        body.encode()  # raises for lone surrogates
        return body
    content = base64.b64decode(body, validate=True)
    if encoding == "gzip":
        content = zlib.decompressobj().decompress(content, limits.message_bytes)
    return content.decode()


def _levels(text: str) -> int:
    """Count the nesting levels of JSON without decoding it."""
    brackets = _BETWEEN_BRACKETS.sub("", text)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def _is_nested(value: Any, levels: int) -> bool:
    """Report whether a JSON object or list has more nesting levels."""
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(
        _is_nested(one, levels - 1) for one in inner if isinstance(one, dict | list)
    )
