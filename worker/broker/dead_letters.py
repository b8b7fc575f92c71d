"""Dead letters: messages that could not be processed, kept in a Redis stream for an operator."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any, NamedTuple

from interview_access.contracts import QUEUE
from interview_access.errors import shortened
from pydantic import BaseModel
from redis import Redis

from worker.broker.claims import DEAD, Claims
from worker.broker.scripts import script

_PAGE = 100
_PAGE_BYTES = 4 * 1024 * 1024  # that a script reads before it returns a shorter page
_FIELD_BYTES = 4_096  # of a letter in a page
_WHOLE_FIELD_BYTES = 128 * 1024  # of a letter that is read alone: an error's sentence fits
_WHOLE = 2**53


class DeadLetter(BaseModel):
    """A dead letter without its message. Producers chose its texts, which may contain anything.

    Attributes:
        id: Its ID in the stream.
        time: When it was dead-lettered.
        reason: Why.
        task: Name of its task; empty if it could not be read.
        job_id: ID of its job; empty if it could not be read.
        attempts: Number of executions of the job.
        size: Bytes of the message.
        queue: Key of its origin queue.
        in_ledger: Whether the ledger has an outcome of the job, which a requeue does not change;
            None if it was not queried, or an earlier release wrote the entry.
    """

    id: str
    time: datetime
    reason: str
    task: str
    job_id: str
    attempts: int
    size: int
    queue: str
    in_ledger: bool | None


@dataclass(frozen=True, slots=True)
class DeadLetterLimits:
    """Limits of the dead letters. The oldest are dropped first.

    Attributes:
        bytes: Memory of all dead letters.
        days: Time for which one is kept; None: until it is requeued or dropped.
    """

    bytes: int
    days: int | None = None


class Dropped(NamedTuple):
    """Numbers of dead letters that were dropped.

    Attributes:
        has_more: Whether more may be due.
        aged: Those dropped for their age.
        excess: Those dropped for the limit of bytes.
    """

    has_more: bool
    aged: int
    excess: int


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Selects dead letters; a field that is None selects all.

    Attributes:
        reason: Part of the reason, in this spelling.
        task: Name of the task.
        before: Time before which it was dead-lettered, timezone-aware.
    """

    reason: str | None = None
    task: str | None = None
    before: datetime | None = None

    def selects(self, letter: DeadLetter) -> bool:
        """Report whether a dead letter is selected."""
        return (
            (self.reason is None or self.reason in letter.reason)
            and self.task in {None, letter.task}
            and (self.before is None or letter.time < self.before)
        )


class DeadLetters:
    """The dead letters of one Redis. Every method raises redis-py's errors."""

    def __init__(self, client: Redis) -> None:
        """Connect at the first call."""
        self._client = client
        self._read = client.register_script(script("read_dead_letters"))

    def __iter__(self) -> Iterator[DeadLetter]:
        """Read all dead letters, oldest first, in pages and without their messages."""
        yield from chain.from_iterable(self._pages("+"))

    def get(self, letter_id: str) -> DeadLetter | None:
        """Read one dead letter; None if it does not exist."""
        entries = self._entries(
            letter_id, letter_id, message_bytes=0, field_bytes=_WHOLE_FIELD_BYTES
        )
        return _letter(*entries[0]) if entries else None

    def message(self, letter_id: str, *, at_most: int | None = None) -> bytes | None:
        """Read a dead letter's message as the producer sent it.

        Args:
            letter_id: ID of the dead letter.
            at_most: Bytes after which it is cut; None: all of it.

        Returns:
            The message, or None if the dead letter does not exist.
        """
        limit = _WHOLE if at_most is None else at_most
        entries = self._entries(letter_id, letter_id, message_bytes=limit)
        return entries[0][1].get(b"message", b"") if entries else None

    def pages(self, wanted: LetterFilter, last: str = "+") -> Iterator[list[DeadLetter]]:
        """Read the dead letters that a filter selects, oldest first, in pages of at most 100.

        Args:
            wanted: The filter.
            last: ID after which none is read: letters that are requeued may come back as new ones.
        """
        for page in self._pages(last):
            if selected := [one for one in page if wanted.selects(one)]:
                yield selected

    def requeue(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Requeue messages with their attempts reset. Returns the letters that existed."""
        claims = Claims(self._client)
        requeued = claims.requeue_dead_letters([(one.id, one.queue) for one in letters])
        return [one for one, existed in zip(letters, requeued, strict=True) if existed]

    def drop(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Delete dead letters. Returns those that existed."""
        with self._client.pipeline(transaction=False) as pipeline:
            for one in letters:
                pipeline.xdel(DEAD, one.id)
            deleted = pipeline.execute()
        return [one for one, existed in zip(letters, deleted, strict=True) if existed]

    def _pages(self, last: str) -> Iterator[list[DeadLetter]]:
        start = "-"
        while page := self._entries(start, last, message_bytes=0):
            yield [_letter(*entry) for entry in page]
            start = f"({page[-1][0]}"

    def prune(self, limits: DeadLetterLimits) -> Dropped:
        """Drop a page of the oldest dead letters that exceed the limits, and old counts.

        The counts of attempts and retries go with them: they serve messages that are gone.
        """
        seconds = None if limits.days is None else limits.days * 86_400
        has_more, aged, excess = Claims(self._client).prune(
            dead_letter_seconds=seconds, dead_letter_bytes=limits.bytes
        )
        return Dropped(bool(has_more), aged, excess)

    def _entries(
        self, first: str, last: str, *, message_bytes: int, field_bytes: int = _FIELD_BYTES
    ) -> list[tuple[str, dict[bytes, bytes]]]:
        arguments = (first, last, _PAGE, _PAGE_BYTES, field_bytes, message_bytes)
        entries: Any = self._read([DEAD], arguments)
        return [
            (entry_id.decode(), dict(zip(fields[::2], fields[1::2], strict=True)))
            for entry_id, fields in entries
        ]


def _letter(letter_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    text = {
        name.decode(errors="replace"): value.decode(errors="backslashreplace")
        for name, value in fields.items()
    }
    return DeadLetter(
        id=letter_id,
        time=datetime.fromtimestamp(float(text.get("time", 0)), UTC),
        reason=text.get("reason", ""),
        task=text.get("task", ""),
        job_id=text.get("job_id", ""),
        attempts=int(text.get("attempts", 0)),
        size=int(text.get("size", 0)),
        queue=text.get("queue") or QUEUE,
        in_ledger={"1": True, "0": False}.get(text.get("in_ledger", "")),
    )


def decoded(message: bytes) -> Any:
    """Decode a message and its body from JSON; a compressed body is left as it is.

    Args:
        message: Any bytes.

    Returns:
        The envelope with its body, or None if the message is not JSON.
    """
    with suppress(ValueError, RecursionError):
        return _with_decoded_body(json.loads(message.decode()))
    return None


def readable(message: bytes, *, at_most: int) -> str:
    """Format a message for a terminal, as indented JSON in ASCII or as text with escapes.

    A JSON body is decoded; a compressed body is not, because nothing limits its size.

    Args:
        message: Any bytes.
        at_most: Characters after which the rest may be cut.
    """
    with suppress(ValueError, RecursionError):
        envelope = json.loads(message.decode())
        text = ""
        for part in json.JSONEncoder(indent=2).iterencode(_with_decoded_body(envelope)):
            text += part
            if len(text) > at_most:
                break
        return text.replace("\x7f", "\\u007f")
    preview = message[: at_most + 1].decode(errors="backslashreplace")
    return shortened(preview, quoted=False, at_most=at_most)


def _with_decoded_body(envelope: Any) -> Any:
    """Decode the body of an envelope and move it behind the short fields."""
    with suppress(LookupError, TypeError, AttributeError):
        body = envelope.pop("body")
        envelope["body"] = body
        with suppress(ValueError, RecursionError):
            properties = envelope.get("properties")
            if isinstance(properties, dict) and properties.get("body_encoding") == "base64":
                body = base64.b64decode(body, validate=True).decode()
            envelope["body"] = json.loads(body)
    return envelope
