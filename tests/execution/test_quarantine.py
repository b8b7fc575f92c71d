"""Malformed messages: a worker records a result or a dead letter for each, and keeps running."""

from __future__ import annotations

import base64
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from devstack.servers import LocalStack
from devstack.service import Service
from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, Site, migrated_site, worker
from worker.broker.claims import DEAD, PREFIX

MESSAGES = int(os.environ.get("QUARANTINE_MESSAGES", "500"))

Message = dict[str, Any]
Change = Callable[[Message], object]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's log."""
    return tmp_path_factory.mktemp("quarantine") / "worker.log"


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site without interviews."""
    with migrated_site(stack, _migrated, 8) as here:
        yield here


@pytest.fixture(scope="module")
def service(here: Site, log: Path) -> Iterator[Service]:
    """The worker of these tests."""
    with worker(here, log) as service:
        yield service


@pytest.fixture(scope="module")
def sample(here: Site) -> bytes:
    """A message that Celery wrote."""
    kwargs = {"user_id": "ann", "interview_ids": []}
    here.producer.send_task(GRANT_ACCESS, kwargs=kwargs, queue="sample")
    message: Any = here.redis.rpop("sample")
    return bytes(message)


def fresh(sample: bytes) -> Message:
    """Decode the sample, give it a new job ID and decode its body."""
    message: Message = json.loads(sample)
    job_id = str(uuid4())
    message["headers"] |= {"id": job_id, "root_id": job_id}
    message["properties"] |= {"correlation_id": job_id, "delivery_tag": str(uuid4())}
    message["body"] = json.loads(base64.b64decode(message["body"]))
    del message["headers"]["ignore_result"]  # a changed value could suppress the result
    return message


def encoded(body: bytes) -> str:
    """Encode a body in Base64."""
    return base64.b64encode(body).decode()


def dumped(value: object) -> bytes:
    """Encode a deeply nested value as JSON, with a higher recursion limit."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10 * limit)
    try:
        return json.dumps(value).encode()
    finally:
        sys.setrecursionlimit(limit)


def written(message: Message) -> bytes:
    """Encode a message, and its body unless that is a string already."""
    if "body" in message and not isinstance(message["body"], str):
        message["body"] = encoded(dumped(message["body"]))
    return dumped(message)


def nested(depth: int) -> list[Any]:
    """Return a list nested in so many lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 10**30, 1e308, float("nan"), "", "x", "\ud800", "\0", "y" * 300, "🙂"),
    *([], {}, [1, 2], ["x", "y"], {"a": None}, [[], {}, {}], nested(950)),
    *({"__type__": "uuid", "__value__": "no uuid"}, {"__type__": "datetime", "__value__": 1}),
    *({"__type__": []}, "application/x-python-serialize", "2020-01-01T00:00:00", GRANT_ACCESS),
)


def places(value: Any, levels: int = 6) -> Iterator[tuple[Any, Any]]:
    """Yield the objects and lists within a value, each with every key or index."""
    if isinstance(value, dict | list) and levels:
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key], levels - 1)


def changed_field(chance: random.Random, message: Message) -> bytes:
    """Remove or replace one to three fields of a message."""
    for _ in range(chance.randint(1, 3)):
        where, key = chance.choice(list(places(message)))
        if chance.random() < 0.3:
            del where[key]
        else:
            where[key] = chance.choice(ODD)
    return written(message)


def changed_bytes(chance: random.Random, text: bytes) -> bytes:
    """Change, remove or insert one to three bytes, or truncate."""
    changed = bytearray(text)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(changed))
        match chance.randrange(4):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                del changed[at]
            case 2:
                changed.insert(at, chance.randrange(256))
            case _ if chance.random() < 0.1:
                del changed[at + 1 :]
    return bytes(changed)


def changed(chance: random.Random, message: Message) -> bytes:
    """Change a message's fields, its bytes or its body's bytes."""
    match chance.randrange(3):
        case 0:
            return changed_field(chance, message)
        case 1:
            return changed_bytes(chance, written(message))
        case _:
            body = dumped(message["body"])
            return written(message | {"body": encoded(changed_bytes(chance, body))})


def dead_lettered(here: Site) -> Counter[bytes]:
    """Count the messages in the dead letters."""
    letters: Any = here.redis.xrange(DEAD)
    return Counter(letter[b"message"] for _, letter in letters)


def has_result(here: Site, message: bytes) -> bool:
    """Whether a final result is stored under the message's ID, if it has one."""
    try:
        job_id = json.loads(message.decode(errors="replace"))["headers"]["id"]
        meta = here.meta(str(job_id))
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
    return meta["status"] in {"SUCCESS", "FAILURE"}


def all_settled(here: Site) -> bool:
    """Whether Redis holds no message except dead letters."""
    return not here.redis.exists(QUEUE, f"{PREFIX}deferred") and not here.redis.keys(
        f"{PREFIX}held:*"
    )


def check(here: Site, service: Service, log: Path, messages: list[bytes]) -> None:
    """Send messages, and check that each is settled and the worker is still the same process."""
    pid = service.pid
    before = log.stat().st_size
    here.redis.lpush(QUEUE, *messages)
    until(lambda: all_settled(here) or not service.alive)
    assert service.alive, service.log_tail()
    neither = [
        one for one in (Counter(messages) - dead_lettered(here)) if not has_result(here, one)
    ]
    assert neither == []
    job_id = here.send("ann", [])
    assert here.answer(job_id)["status"] == "SUCCESS"
    assert service.pid == pid
    logged = log.read_bytes()[before:].decode(errors="replace")
    for words in ("Unrecoverable", "Connection to broker lost", "lease was lost", "with its child"):
        assert words not in logged


def test_messages_changed_at_random(here: Site, service: Service, log: Path, sample: bytes) -> None:
    """A message with any bytes or fields changed has a result or a dead letter."""
    chance = random.Random(1)  # noqa: S311 - no secret
    check(here, service, log, [changed(chance, fresh(sample)) for _ in range(MESSAGES)])


def header(name: str, value: object) -> Change:
    """Set a header."""
    return lambda message: message["headers"].update({name: value})


def body(text: bytes) -> Change:
    """Set the body."""
    return lambda message: message.update(body=encoded(text))


def part(at: int, value: object) -> Change:
    """Set a part of the body: positional arguments, keyword arguments or callbacks."""
    return lambda message: message["body"].__setitem__(at, value)


CHANGES: dict[str, Change] = {
    "time limit x": header("timelimit", "x"),
    "time limits of one": header("timelimit", [1]),
    "time limits of text": header("timelimit", ["x", "y"]),
    "time limit for ever": header("timelimit", [float("inf"), None]),
    "time limit of none": header("timelimit", [-1, None]),
    "eta soon": header("eta", "soon"),
    "eta number": header("eta", 10**30),
    "expires never": header("expires", "never"),
    "expires number": header("expires", 5),
    "expires long ago": header("expires", "0001-01-01T00:00:00+14:00"),
    "id missing": lambda message: message["headers"].pop("id"),
    "id null": header("id", None),
    "id number": header("id", 7),
    "id list": header("id", [1]),
    "id empty": header("id", ""),
    "id lone surrogate": header("id", "\ud800"),
    "task missing": lambda message: message["headers"].pop("task"),
    "task unknown": header("task", "no.such.task"),
    "task list": header("task", [GRANT_ACCESS]),
    "compression": header("compression", "application/x-gzip"),
    "compression unknown": header("compression", "x"),
    "headers nested": header("stamps", nested(950)),
    "headers list": lambda message: message.update(headers=[]),
    "headers null": lambda message: message.update(headers=None),
    "properties missing": lambda message: message.pop("properties"),
    "delivery info null": lambda message: message["properties"].update(delivery_info=None),
    "delivery info list": lambda message: message["properties"].update(delivery_info=[1]),
    "priority x": lambda message: message["properties"].update(priority="x"),
    "body encoding x": lambda message: message["properties"].update(body_encoding="x"),
    "content type pickle": lambda message: message.update(
        {"content-type": "application/x-python-serialize"}
    ),
    "content type unknown": lambda message: message.update({"content-type": "x"}),
    "content type null": lambda message: message.update({"content-type": None}),
    "content encoding x": lambda message: message.update({"content-encoding": "x"}),
    "content encoding null": lambda message: message.update({"content-encoding": None}),
    "body missing": lambda message: message.pop("body"),
    "body no base64": lambda message: message.update(body="{}"),
    "body no JSON": body(b"x"),
    "body null": body(b"null"),
    "body of two": body(b"[[], {}]"),
    "body nested": body(b"[" * 950 + b"]" * 950),
    "body no uuid": body(b'[[{"__type__": "uuid", "__value__": "no uuid"}], {}, {}]'),
    "args object": part(0, {"a": 1}),
    "args null": part(0, None),
    "args nested": part(0, nested(950)),
    "kwargs null": part(1, None),
    "kwargs list": part(1, [1]),
    "kwargs nested": part(1, {"user_id": nested(950)}),
    "embed null": part(2, None),
    "embed text": part(2, "x"),
    "callbacks number": part(2, {"callbacks": 5}),
    "callbacks of a list": part(2, {"callbacks": [[]]}),
    "errbacks number": part(2, {"errbacks": 5}),
    "chain text": part(2, {"chain": "x"}),
    "chord number": part(2, {"chord": 5}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_message_with_one_defect(
    here: Site, service: Service, log: Path, sample: bytes, change: Change
) -> None:
    """Five messages with the same defect, more than pool processes, are all settled."""
    messages = [fresh(sample) for _ in range(5)]
    for message in messages:
        change(message)
    check(here, service, log, [written(message) for message in messages])


@pytest.mark.parametrize(
    "text", [b"", b"null", b"7", b"[]", b"{}", b"\xff\xfe", b'"\\ud800"', b"NaN"]
)
def test_bytes_that_are_no_message(here: Site, service: Service, log: Path, text: bytes) -> None:
    """Bytes that are no message become dead letters."""
    before = dead_lettered(here)
    check(here, service, log, [text] * 3)
    assert dead_lettered(here) - before == Counter({text: 3})
