"""A generated message, and readers that find its job ID."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

from tests.support.fuzz.values import QUEUE

_PLAIN_BYTES = 64_000
_PLAIN_LEVELS = 20
_ID_LENGTH = 255
_HEADERS_ID = re.compile(rb'"headers": \{.*?"id": "([^"\\]{1,255})"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Message:
    """A generated message.

    Attributes:
        kind: Its key in `KINDS`.
        raw: The bytes of the message.
        queue: The Redis list that it is pushed to.
        created: The number of grants that the job must create; None if it need not succeed.
        delayed: Whether it may be delayed beyond the end of the run.
    """

    kind: str
    raw: bytes
    queue: str = QUEUE
    created: int | None = None
    delayed: bool = False

    @property
    def claimed_id(self) -> str | None:
        """The job ID of a lenient reader: any string, also in the body of a protocol 1 message."""
        envelope = _decoded(self.raw)
        if not isinstance(envelope, dict):  # or too deeply nested for this process
            found = _HEADERS_ID.search(self.raw)
            return found[1].decode(errors="replace") if found else None
        headers = envelope.get("headers")
        if not isinstance(headers, dict) or "task" not in headers:
            headers = _decoded_body(envelope.get("body"))
        job_id = headers.get("id") if isinstance(headers, dict) else None
        return job_id if isinstance(job_id, str) else None

    @property
    def is_text(self) -> bool:
        """Whether the bytes are UTF-8."""
        try:
            self.raw.decode()
        except UnicodeDecodeError:
            return False
        return True

    @property
    def readable_id(self) -> str | None:
        """The valid job ID in the headers, if a bounded reader of strict JSON finds one."""
        job_id = self.claimed_id
        if job_id is None or not is_job_id(job_id) or b'"headers"' not in self.raw:
            return None
        is_plain = len(self.raw) <= _PLAIN_BYTES and _is_plain(self.raw)
        return job_id if is_plain and self.kind != "protocol 1" else None


def is_job_id(value: str) -> bool:
    """Whether the contract allows the value as a job ID."""
    return 1 <= len(value) <= _ID_LENGTH and value.isprintable()


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def _decoded_body(body: Any) -> Any:
    try:
        return _decoded(base64.b64decode(body))
    except (ValueError, TypeError):
        return None


def _is_plain(raw: bytes) -> bool:
    """Whether the bytes are JSON of few levels without repeated keys, NaN or Infinity."""
    plain = True

    def refuse(_: object) -> None:
        nonlocal plain
        plain = False

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            refuse(pairs)
        return dict(pairs)

    try:
        value = json.loads(raw.decode(), parse_constant=refuse, object_pairs_hook=unique)
        return plain and _levels(value) <= _PLAIN_LEVELS
    except (ValueError, RecursionError):
        return False


def _levels(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_levels, inner), default=0)
