"""The body of a message: the arguments of a task's call, decoded within bounds."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any

from interview_access.contracts import describe
from kombu.utils.json import loads

from worker.execution.request import Limits


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
