"""The dead-letter list: messages that could not be done, kept in Redis for an operator."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from interview_access.contracts import QUEUE
from pydantic import BaseModel, Field
from redis import Redis

from worker.claims import DEAD, Claims

_PAGE = 100  # letters in one round trip; each may be a message of 100,000 ids


class DeadLetter(BaseModel):
    """One letter, as an operator sees it.

    Attributes:
        id: Its id in the list, by which the commands take it.
        job_id: Its job's, where one could be read.
        attempts: How often it was tried.
        size: Of the message, in bytes.
        queue: The list in Redis that it came from.
        message: The bytes that the producer sent.
    """

    id: str
    time: datetime
    reason: str
    task: str
    job_id: str
    attempts: int
    size: int
    queue: str = QUEUE
    message: bytes = Field(repr=False, exclude=True)

    @property
    def answered_for_good(self) -> bool:
        """Whether the ledger has an answer to its job id, which a requeued message gets again."""
        return self.reason.startswith(("JobFailedError", "JobIdReusedException"))

    def readable(self) -> Any:
        """The message, decoded as far as it can be: as JSON, its body too."""
        try:
            message = json.loads(self.message)
            message["body"] = json.loads(base64.b64decode(message["body"], validate=True))
        except (binascii.Error, UnicodeDecodeError, ValueError, LookupError, TypeError):
            try:
                return json.loads(self.message)
            except (ValueError, RecursionError):
                return self.message.decode(errors="backslashreplace")
        except RecursionError:
            return self.message.decode(errors="backslashreplace")
        return message


class DeadLetters:
    """The list. Every method raises what redis raises where the server is away."""

    def __init__(self, client: Redis) -> None:
        """Connects at the first call."""
        self._client = client

    def __iter__(self) -> Iterator[DeadLetter]:
        """All letters, the oldest first, read a page at a time."""
        start = "-"
        while page := self._range(start, "+"):
            yield from page
            start = f"({page[-1].id}"

    def get(self, letter_id: str) -> DeadLetter | None:
        """The letter of that id, if there is one."""
        return next(iter(self._range(letter_id, letter_id)), None)

    def requeue(self, letter: DeadLetter) -> bool:
        """Back to the queue it came from, its tries begun anew; False where it was gone."""
        return bool(Claims(self._client, lease=0).requeue(letter.id, letter.queue))

    def drop(self, letter: DeadLetter) -> bool:
        """Delete it for good; False where it was gone."""
        return bool(self._client.xdel(DEAD, letter.id))

    def _range(self, first: str, last: str) -> list[DeadLetter]:
        entries: Any = self._client.xrange(DEAD, first, last, count=_PAGE)
        return [_letter(entry_id.decode(), fields) for entry_id, fields in entries]


def _letter(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    told = {name.decode(): value for name, value in fields.items()}
    message = told.pop("message", b"")
    text = {name: value.decode(errors="backslashreplace") for name, value in told.items()}
    when = datetime.fromtimestamp(float(text.pop("time", 0)), UTC)
    return DeadLetter(id=entry_id, time=when, message=message, **text)
