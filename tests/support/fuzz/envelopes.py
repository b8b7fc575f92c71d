"""Envelopes of valid jobs, which the kinds of messages change."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from tests.support.fuzz.values import BUILT_INS, ELSEWHERE, GRANT, QUEUE

Envelope = dict[str, Any]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return the objects and lists within a value, each with every key or index."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def dumped(value: Any) -> bytes:
    """Encode a value as JSON."""
    return json.dumps(value).encode()


def in_base64(body: bytes) -> str:
    """Encode a body in Base64."""
    return base64.b64encode(body).decode()


class Envelopes:
    """Creates envelopes with random users and interviews."""

    def __init__(self, seed: int, interviews: Sequence[str]) -> None:
        """Create nothing yet.

        Args:
            seed: Repeats the choices.
            interviews: IDs of existing interviews; ten or more.
        """
        self.rng = random.Random(f"fuzz {seed}")  # noqa: S311 - must be repeatable
        self.interviews = list(interviews)
        self._number = 0

    def user_id(self) -> str:
        """Return a new user ID, of which a changed byte makes no other user's ID."""
        self._number += 1
        return f"u{self._number}-{self.rng.getrandbits(48):012x}"

    def interview_ids(self) -> list[str]:
        """Choose up to four interviews."""
        return self.rng.sample(self.interviews, self.rng.randint(0, 4))

    def spell(self, interview_id: str) -> Any:
        """Choose a valid spelling of an interview ID."""
        spellings: list[Any] = [
            *(interview_id, interview_id.upper(), interview_id.replace("-", "")),
            {"__type__": "uuid", "__value__": {"hex": interview_id.replace("-", "")}},
        ]
        return self.rng.choice(spellings)

    def grant(self) -> tuple[Envelope, int]:
        """Create the envelope of a valid job, with its body not encoded, and count its grants."""
        ids = self.interview_ids()
        body = [[], {"user_id": self.user_id(), "interview_ids": ids}, {}]
        return self.envelope(GRANT, body), len(ids)

    def envelope(self, task: str, body: Any) -> Envelope:
        """Create an envelope as Celery does, with a new job ID."""
        job_id = str(uuid4())
        return {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py",
                "task": task,
                "id": job_id,
                "shadow": None,
                "eta": None,
                "expires": None,
                "group": None,
                "group_index": None,
                "retries": 0,
                "timelimit": [None, None],
                "root_id": job_id,
                "parent_id": None,
                "argsrepr": "()",
                "kwargsrepr": "{}",
                "origin": "gen1@host",
                "replaced_task_nesting": 0,
                "stamped_headers": None,
                "stamps": {},
            },
            "properties": {
                "correlation_id": job_id,
                "reply_to": str(uuid4()),
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }

    def signature(self) -> Envelope:
        """Create the signature of a callback as Celery does."""
        name = self.rng.choice([GRANT, GRANT, "no.such.task", *BUILT_INS])
        options = {"task_id": str(uuid4()), "queue": self.rng.choice([QUEUE, QUEUE, ELSEWHERE])}
        return {
            "task": name,
            "args": [],
            "options": options,
            "subtask_type": None,
            "kwargs": {"user_id": self.user_id(), "interview_ids": []},
            "immutable": True,
        }

    def replace_somewhere(self, envelope: Envelope, value: Any) -> None:
        """Set a random field of an envelope."""
        if self.rng.random() < 0.2:
            envelope[self.rng.choice(["x", "headers", "properties", "body"])] = value
            return
        part = envelope[self.rng.choice(["headers", "headers", "properties"])]
        part[self.rng.choice([*part, "x"])] = value

    def encode(self, envelope: Envelope) -> bytes:
        """Encode an envelope, and its body unless that is a string already."""
        if "body" in envelope and not isinstance(envelope["body"], str):
            body = dumped(envelope["body"])
            properties = envelope.get("properties")
            is_base64 = isinstance(properties, dict) and properties.get("body_encoding") == "base64"
            envelope["body"] = in_base64(body) if is_base64 else body.decode()
        return dumped(envelope)
