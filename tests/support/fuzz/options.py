"""Options of Celery's protocol that must not change a valid job's result."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from tests.support.fuzz.envelopes import Envelope, Envelopes
from tests.support.fuzz.values import FORGED


def _later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def _in_headers(
    name: str, value: Callable[[Envelopes], Any]
) -> Callable[[Envelopes, Envelope], None]:
    def change(envelopes: Envelopes, envelope: Envelope) -> None:
        envelope["headers"][name] = value(envelopes)

    return change


def _in_plain_text(_: Envelopes, envelope: Envelope) -> None:
    del envelope["properties"]["body_encoding"]


def _stamped(_: Envelopes, envelope: Envelope) -> None:
    envelope["headers"] |= {"stamped_headers": ["x"], "stamps": {"x": ["1"]}}


def _linked(envelopes: Envelopes, envelope: Envelope) -> None:
    body = envelope["body"]
    if isinstance(body, list):
        body[2] = {"callbacks": [envelopes.signature()]}


def _without_delivery_info(_: Envelopes, envelope: Envelope) -> None:
    del envelope["properties"]["delivery_info"]


OPTIONS: list[Callable[[Envelopes, Envelope], None]] = [
    _in_headers("eta", lambda envelopes: _later(envelopes.rng.choice([-5, -1e6, 0.3]))),
    _in_headers("expires", lambda _: _later(3_600)),
    _in_headers(
        "timelimit", lambda envelopes: envelopes.rng.choice([[300, None], [None, None], [300, 250]])
    ),
    _in_headers("retries", lambda _: 2),
    _in_headers("group", lambda _: str(uuid4())),
    _in_headers("parent_id", lambda _: str(uuid4())),
    _in_headers("root_id", lambda _: str(uuid4())),
    _in_headers("replaced_task_nesting", lambda _: 2),
    _in_headers("ignore_result", lambda envelopes: envelopes.rng.random() < 0.5),
    _in_headers("shadow", lambda envelopes: envelopes.rng.choice(["other name", f"x{FORGED}"])),
    _in_headers("argsrepr", lambda envelopes: envelopes.rng.choice(["a" * 5_000, FORGED])),
    _in_headers("kwargsrepr", lambda envelopes: envelopes.rng.choice(["a" * 5_000, FORGED])),
    _in_headers("origin", lambda envelopes: envelopes.rng.choice(["a" * 5_000, FORGED])),
    *(
        _in_headers(name, lambda envelopes: envelopes.rng.choice(["a" * 5_000, FORGED, "", 5, {}]))
        for name in ("actor", "reason", "enqueued_at", "requested_at")
    ),
    _in_headers("lang", lambda _: "go"),
    _in_headers("x-trace", lambda _: {"a": [1, {"b": None}]}),
    *(_in_plain_text, _stamped, _linked, _without_delivery_info),
]
"""Changes of a valid envelope that must not change the job's result."""
