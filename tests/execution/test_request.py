"""Requests: the main process reads a delivery's envelope within bounds, and never raises."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.worker import state as worker_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interview_access.contracts import (
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
)
from interview_access.errors import (
    InvalidGrantRequestException,
    JobCancelledException,
    JobExpiredException,
    JobFailedError,
)

from worker.broker.claims import Action, Claim, Disposition
from worker.broker.delivery import Delivery
from worker.execution.decoding import (
    Limits,
    UndecodableBodyError,
    UnreadableMessageError,
    decode,
)
from worker.execution.pool_process import prepare
from worker.execution.request import JobRequest

ENDS = 64 * 1024
LIMITS = Limits(interview_ids=10, attempts=3, seconds=600.0)
JOB = "a job"
USER = {"user_id": "u", "interview_ids": []}
BODY = json.dumps([[], USER, {}])
ABSENT = object()


@pytest.fixture
def revocations() -> Iterator[Any]:
    """Celery's state of this process, which is reset after the test."""
    yield worker_state
    worker_state.reset_state()


def envelope(**fields: Any) -> dict[str, Any]:
    """A message in Celery's protocol, with some fields changed or (``ABSENT``) left out.

    A field ``headers__eta`` is the field ``eta`` within ``headers``.
    """
    whole: dict[str, Any] = {
        "body": BODY,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"id": JOB, "task": GRANT_ACCESS},
        "properties": {},
    }
    for path, value in fields.items():
        *outer, name = path.replace("content_", "content-").split("__")
        target = whole[outer[0]] if outer else whole
        if value is ABSENT:
            del target[name]
        else:
            target[name] = value
    return whole


def claim_of(message: bytes, *, attempts: int = 0, retries: int = 0) -> Claim:
    """Return the claim of a message; an oversized message is cut as Redis cuts it."""
    size = len(message)
    if size > LIMITS.message_bytes:
        message = message[:ENDS] + message[-ENDS:]
    return Claim("1", "interview-access", message, size, attempts, retries)


def read(app: Celery, message: Any, limits: Limits = LIMITS, /, **counts: int) -> JobRequest:
    """Read a message."""
    if not isinstance(message, bytes):
        message = json.dumps(message).encode()
    return JobRequest(Delivery(claim_of(message, **counts)), app, limits)


# --- Readable messages ---------------------------------------------------------------------------

GZIPPED = base64.b64encode(gzip.compress(BODY.encode())).decode()

READABLE = {
    "plain": ({}, BODY, ""),
    "Base64": (
        {"body": base64.b64encode(BODY.encode()).decode(), "properties__body_encoding": "base64"},
        base64.b64encode(BODY.encode()).decode(),
        "base64",
    ),
    "gzip": (
        {
            "body": GZIPPED,
            "properties__body_encoding": "base64",
            "headers__compression": "application/x-gzip",
        },
        GZIPPED,
        "gzip",
    ),
    "gzip in kombu's default encoding": (
        {"body": GZIPPED, "headers__compression": "application/x-gzip"},
        GZIPPED,
        "gzip",
    ),
    "without content encoding": ({"content_encoding": ABSENT}, BODY, ""),
    "without body encoding": ({"properties__body_encoding": None}, BODY, ""),
    "without compression": ({"headers__compression": None}, BODY, ""),
    "with unknown fields": ({"x": 1, "headers__x": [1], "properties__x": {}}, BODY, ""),
    "with an undecodable body": ({"body": "\ud800\0"}, "\ud800\0", ""),
    "the longest ID": ({"headers__id": "x" * 255}, BODY, ""),
    "an ID in another script": ({"headers__id": "задание 1"}, BODY, ""),
    "another task": ({"headers__task": GRANT_COHORT_ACCESS}, BODY, ""),
    "nested headers": ({"headers__x": json.loads("[" * 49 + "]" * 49)}, BODY, ""),
}


@pytest.mark.parametrize(("fields", "body", "encoding"), READABLE.values(), ids=READABLE)
def test_a_readable_message_is_dispatched(
    app: Celery, fields: dict[str, Any], body: str, encoding: str
) -> None:
    """The body of a readable message is passed to the pool process unchanged."""
    message = envelope(**fields)
    request = read(app, message)
    assert request.failure is None
    assert (request.id, request.name) == (message["headers"]["id"], message["headers"]["task"])
    assert (request.delay, request.time_limit) == (0.0, 600.0)
    sent = pickle.loads(pickle.dumps(request.dispatched))  # noqa: S301 - our own
    assert sent == request.dispatched
    assert (sent.body, sent.encoding, sent.headers) == (body, encoding, message["headers"])


# --- Unreadable messages -------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
"""More levels than the JSON parser of any Python decodes: 3.13 decodes almost 10,000."""

UNREADABLE = {
    # The envelope
    "nothing": (b"", "JSONDecodeError", ""),
    "not UTF-8": (b"\xff\xfe", "UnicodeDecodeError", ""),
    "a byte-order mark": ("\ufeff{}".encode(), "JSONDecodeError", ""),
    "UTF-16": (json.dumps(envelope()).encode("utf-16"), "UnicodeDecodeError", ""),
    "a list": ([], "expected a JSON object, got a list of 0", ""),
    "null": (None, "expected a JSON object, got null", ""),
    "a number": (7, "expected a JSON object, got the number 7", ""),
    "a number of 5,000 digits": (
        json.dumps(envelope(x=7)).replace("7", "7" * 5_000).encode(),
        "ValueError",
        JOB,
    ),
    "a cut envelope": (json.dumps(envelope()).encode()[:-1], "JSONDecodeError", JOB),
    "too many values": (envelope(x=[1] * 10_050), "expected at most 10,040 values", JOB),
    "too many lists": (envelope(x=[[]] * 10_050), "expected at most 10,040 values", JOB),
    # Fields of the envelope
    "no headers": (envelope(headers=ABSENT), "headers: expected an object, got null", ""),
    "headers in a list": (envelope(headers=[]), "headers: expected an object, got a list", ""),
    "properties in a list": (
        envelope(properties=[]),
        "properties: expected an object, got a list",
        JOB,
    ),
    "no properties": (envelope(properties=ABSENT), "properties: expected an object", JOB),
    "no properties but null": (envelope(properties=None), "properties: expected an object", JOB),
    "no body": (envelope(body=ABSENT), "body: expected a string, got null", JOB),
    "a body in plain JSON": (
        envelope(body=[[], USER, {}]),
        "body: expected a string, got a list of 3",
        JOB,
    ),
    "no content type": (envelope(content_type=ABSENT), "content-type: expected app", JOB),
    "a pickle": (envelope(content_type="application/x-python-serialize"), "content-type", JOB),
    "raw data": (envelope(content_type="application/data"), "content-type: expected", JOB),
    "a content type in a list": (envelope(content_type=["application/json"]), "got a list", JOB),
    "UTF-8 in capitals": (envelope(content_encoding="UTF-8"), "content-encoding: expec", JOB),
    "a codec of Python": (envelope(content_encoding="punycode"), "content-encoding: exp", JOB),
    "binary": (envelope(content_encoding="binary"), "content-encoding: expected utf-8", JOB),
    "hex": (envelope(properties__body_encoding="hex"), "body_encoding: expected base64", JOB),
    "no body encoding but false": (envelope(properties__body_encoding=False), "got false", JOB),
    "bzip2": (envelope(headers__compression="application/x-bz2"), "compression: expected", JOB),
    "LZMA": (envelope(headers__compression="application/x-lzma"), "compression: expected", JOB),
    "no compression but 0": (envelope(headers__compression=0), "got the number 0", JOB),
    # Headers
    "no ID": (envelope(headers__id=ABSENT), "id: expected a job ID of 1 to 255 printable", ""),
    "an empty ID": (envelope(headers__id=""), "id: expected a job ID", ""),
    "a number as ID": (envelope(headers__id=5), "got the number 5", ""),
    "a long ID": (envelope(headers__id="x" * 256), "a string of 256 characters", ""),
    "an ID in two lines": (envelope(headers__id="a\nb"), r"the string 'a\nb'", ""),
    "half a surrogate as ID": (envelope(headers__id="\ud800"), r"\ud800", ""),
    "a control sequence as ID": (envelope(headers__id="\x1b[2J"), r"\x1b[2J", ""),
    "no task": (envelope(headers__task=ABSENT), "task: expected one of this worker's", JOB),
    "an unknown task": (envelope(headers__task="x.y"), "got the string 'x.y'", JOB),
    "a task in a list": (envelope(headers__task=[GRANT_ACCESS]), "TypeError", JOB),
    "a number as task": (envelope(headers__task=5), "got the number 5", JOB),
    "a task of Celery's": (envelope(headers__task="celery.map"), "string 'celery.map'", JOB),
    "another one": (envelope(headers__task="celery.backend_cleanup"), "celery.backend_cl", JOB),
    "a task with control characters": (envelope(headers__task="\x1b[2J\n"), r"\x1b[2J\n", JOB),
    "deep headers": (
        envelope(headers__x=json.loads("[" * 50 + "]" * 50)),
        "headers: expected at most 50 levels",
        JOB,
    ),
    "a number as ETA": (envelope(headers__eta=5), "eta: expected a time in ISO 8601", JOB),
    "a word as ETA": (envelope(headers__eta="tomorrow"), "got the string 'tomorrow'", JOB),
    "an ETA before all time": (
        envelope(headers__eta="0001-01-01T00:00:00+14:00"),
        "eta: expected a time",
        JOB,
    ),
    "a list as expiry": (envelope(headers__expires=[]), "expires: expected a time", JOB),
    "one time limit": (envelope(headers__timelimit=[1]), "timelimit: expected [hard, soft]", JOB),
    "three time limits": (
        envelope(headers__timelimit=[1, 2, 3]),
        "timelimit: expected [hard, soft]",
        JOB,
    ),
    "time limits as text": (
        envelope(headers__timelimit="ab"),
        "timelimit: expected [hard, soft]",
        JOB,
    ),
    "a time limit as text": (envelope(headers__timelimit=["1", None]), "expected seconds", JOB),
    "no time": (envelope(headers__timelimit=[0, None]), "timelimit: expected seconds", JOB),
    "less than no time": (envelope(headers__timelimit=[-1, None]), "expected seconds", JOB),
    "true as time limit": (envelope(headers__timelimit=[True, None]), "got true", JOB),
    "no number as time limit": (envelope(headers__timelimit=[None, float("nan")]), "nan", JOB),
    "no end": (envelope(headers__timelimit=[float("inf"), None]), "number inf", JOB),
}


@pytest.mark.parametrize(("message", "reason", "job_id"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_message_fails(app: Celery, message: Any, reason: str, job_id: str) -> None:
    """The failure has what was received and what was expected; the job's ID is read if possible."""
    assert_unreadable(read(app, message), reason, job_id)


@pytest.mark.parametrize(
    ("message", "job_id"),
    [(DEEP, ""), (json.dumps(envelope(x=7)).replace("7", DEEP), JOB)],
    ids=["deep nesting", "too deep, with an ID"],
)
def test_a_message_that_nests_too_deeply_fails(app: Celery, message: str, job_id: str) -> None:
    """Deep nesting fails the job before the parser, whose own limit depends on Python's version."""
    limits = replace(LIMITS, interview_ids=100_000)  # whose limit of values permits the brackets
    reason = "expected at most 910 levels of nesting"
    assert_unreadable(read(app, message.encode(), limits), reason, job_id)


LEVELS = 910


@pytest.mark.parametrize(
    "text",
    [
        "[" * LEVELS + "]" * LEVELS,
        '{"a":' * LEVELS + "0" + "}" * LEVELS,
        json.dumps(["[" * 4_000, '"]\\[{' * 4_000]),
        "[" + ",".join(["[]"] * 9_000) + "]",
    ],
    ids=["lists", "objects", "brackets in strings", "many lists"],
)
def test_nesting_within_the_limit_is_accepted(text: str) -> None:
    """Only levels count: not brackets in strings, and not lists beside each other."""
    LIMITS.check(text)
    json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        "[" * (LEVELS + 1) + "]" * (LEVELS + 1),
        '{"a":' * (LEVELS + 1) + "0" + "}" * (LEVELS + 1),
        '["\\"[", ' * (LEVELS + 1) + "0" + "]" * (LEVELS + 1),
    ],
    ids=["lists", "objects", "after strings"],
)
def test_one_level_beyond_the_limit_is_refused(text: str) -> None:
    """The limit is exact, in the envelope and in the body of each encoding."""
    with pytest.raises(UnreadableMessageError, match="expected at most 910 levels of nesting"):
        LIMITS.check(text)
    in_base64 = base64.b64encode(text.encode()).decode()
    compressed = base64.b64encode(zlib.compress(text.encode())).decode()
    for body, encoding in ((text, ""), (in_base64, "base64"), (compressed, "gzip")):
        with pytest.raises(UndecodableBodyError, match="expected at most 910 levels of nesting"):
            decode(body, encoding, LIMITS)


def test_levels_are_counted_in_linear_time() -> None:
    """An unterminated string of escaped quotes is read once, not once from each quote."""
    LIMITS.check("[]" * (LEVELS + 1) + '"' + '\\"' * 500_000)


def assert_unreadable(request: JobRequest, reason: str, job_id: str) -> None:
    """The request fails with a printable sentence that contains the reason."""
    assert isinstance(request.failure, JobFailedError)
    assert reason in request.failure.sentence
    assert request.failure.sentence.isprintable()
    assert request.id == job_id


SIZE = LIMITS.message_bytes

OVERSIZED = {
    "headers first": (
        json.dumps({"headers": {"task": GRANT_ACCESS, "id": JOB}, "body": "x" * SIZE}),
        (JOB, GRANT_ACCESS),
    ),
    "headers last": (
        json.dumps({"body": "x" * SIZE, "headers": {"id": JOB, "task": GRANT_ACCESS}}),
        (JOB, GRANT_ACCESS),
    ),
    "headers apart": (
        json.dumps({"headers": {"x": "x" * SIZE, "id": JOB, "task": "t"}}, indent=2),
        (JOB, "t"),
    ),
    "an ID within the body": (
        json.dumps({"body": json.dumps({"headers": {"id": "another"}}) + "x" * SIZE}),
        ("", ""),
    ),
    "no headers": ("x" * (SIZE + 1), ("", "")),
    "quotes only": ('"' * (SIZE + 1), ("", "")),
    "headers again and again": ('"headers" ' * SIZE, ("", "")),
    "spaces": ('"headers"' + " " * SIZE, ("", "")),
    "a malformed ID": (json.dumps({"headers": {"id": "", "x": "x" * SIZE}}), ("", "")),
    "a long ID": (json.dumps({"headers": {"id": "x" * SIZE}}), ("", "")),
    "an escaped ID": (json.dumps({"headers": {"id": "\0", "x": "x" * SIZE}}), ("", "")),
}


@pytest.mark.parametrize(("message", "identity"), OVERSIZED.values(), ids=OVERSIZED)
def test_an_oversized_message_is_not_decoded(
    app: Celery, message: str, identity: tuple[str, str]
) -> None:
    """An oversized message is invalid; its job ID and task are searched in its two ends."""
    request = read(app, message.encode())
    assert isinstance(request.failure, InvalidGrantRequestException)
    assert request.failure.sentence == (
        f"The request is invalid: message: expected at most {SIZE:,} bytes, got {len(message):,}."
    )
    assert (request.id, request.name) == identity


def test_the_limits_allow_the_largest_job() -> None:
    """A job with the maximum number of IDs is within the limits, also in Base64."""
    ids = ["0" * 36] * LIMITS.interview_ids
    body = json.dumps([[], {"user_id": "\0" * 36, "interview_ids": ids}, {}])
    for sent in (body, base64.b64encode(body.encode()).decode()):
        message = json.dumps(envelope(body=sent)).encode()
        assert len(message) < LIMITS.message_bytes
        assert message.count(b",") < LIMITS.values


# --- Times and limits ----------------------------------------------------------------------------

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


@pytest.mark.parametrize("hours", [-1, 1])
@pytest.mark.parametrize(
    "written",
    [
        datetime.isoformat,
        lambda eta: eta.replace(tzinfo=None).isoformat(),
        lambda eta: eta.strftime("%Y-%m-%dT%H:%M:%SZ"),
        lambda eta: eta.astimezone(None).isoformat(),
    ],
    ids=["UTC", "without time zone", "Z", "local"],
)
def test_an_eta_delays(app: Celery, hours: int, written: Callable[[datetime], str]) -> None:
    """A job is delayed until its ETA; an ETA without time zone is in UTC."""
    request = read(app, envelope(headers__eta=written(datetime.now(UTC) + hours * HOUR)))
    assert request.failure is None
    assert request.delay == pytest.approx(max(hours, 0) * 3_600, abs=60)


@pytest.mark.parametrize(
    ("expires", "counts", "is_expired"),
    [
        (NOW - HOUR, {}, True),
        (NOW + HOUR, {}, False),
        (NOW - HOUR, {"retries": 1}, False),
        (NOW - HOUR, {"attempts": 1}, False),
    ],
    ids=["past", "future", "retried", "attempted"],
)
def test_a_job_expires_only_before_it_begins(
    app: Celery, expires: datetime, counts: dict[str, int], *, is_expired: bool
) -> None:
    """A retried or attempted job does not expire, because it may have had its effect."""
    request = read(app, envelope(headers__expires=expires.isoformat()), **counts)
    assert isinstance(request.failure, JobExpiredException) == is_expired


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        (None, 600),
        ([], 600),
        ([None, None], 600),
        ([60, None], 60),
        ([None, 0.5], 0.5),
        ([60, 30], 30),
        ([3_600, None], 600),
    ],
)
def test_the_shortest_time_limit_applies(app: Celery, limits: Any, seconds: float) -> None:
    """The time limit is the shortest of the worker's and the message's two."""
    request = read(app, envelope(headers__timelimit=limits))
    assert (request.failure, request.time_limit) == (None, seconds)


# --- Attempts and revocation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "fails", "is_decoded", "is_hopeless"),
    [
        (0, False, True, False),
        (2, False, True, False),
        (3, True, True, False),
        (4, True, False, False),
        (5, True, False, True),
        (100, True, False, True),
    ],
)
def test_attempts_are_limited(
    app: Celery, attempts: int, *, fails: bool, is_decoded: bool, is_hopeless: bool
) -> None:
    """After its attempts a job fails with its body, then without, then only as a dead letter."""
    request = read(app, envelope(), attempts=attempts)
    assert (request.failure is not None) == fails
    assert (request.dispatched.body is not None) == is_decoded
    assert request.is_hopeless(LIMITS) == is_hopeless
    if request.failure:
        assert request.failure.sentence.startswith(
            f"The job's process ended in {attempts} attempts"
        )


@pytest.mark.parametrize(
    ("fields", "attempts", "is_unreadable"),
    [({}, 3, False), ({}, 4, False), ({"body": "{"}, 0, True), ({"body": 5}, 4, True)],
)
def test_a_job_whose_attempts_are_used_up_is_readable(
    app: Celery, fields: dict[str, Any], attempts: int, *, is_unreadable: bool
) -> None:
    """Such a job counts as one of its task, also if its body is not read again."""
    run = prepare(app, read(app, envelope(**fields), attempts=attempts).dispatched, "worker")
    assert run.is_unreadable == is_unreadable


def test_an_unreadable_message_keeps_its_reason(app: Celery) -> None:
    """An unreadable message whose attempts are used up keeps its first reason."""
    request = read(app, envelope(headers__eta=5), attempts=LIMITS.attempts)
    assert request.failure
    assert "eta: expected" in request.failure.sentence


REVOKED_STAMPS = {
    "equal": ({"s": "v"}, {"s": ["v"]}, True),
    "one of several": ({"s": ["u", "v"]}, {"s": ["w", "v"]}, True),
    "not in a list": ({"s": "v"}, {"s": "v"}, True),
    "a number": ({"s": 5}, {"s": [5]}, True),
    "another value": ({"s": "v"}, {"s": ["w"]}, False),
    "another name": ({"t": "v"}, {"s": ["v"]}, False),
    "stamps in a list": (["s"], {"s": ["v"]}, False),
    "stamps that are null": (None, {"s": ["v"]}, False),
    "a stamp that is null": ({"s": None}, {"s": ["v"]}, False),
    "an object": ({"s": {"v": 1}}, {"s": [{"v": 1}]}, True),
}


@pytest.mark.parametrize(
    ("stamps", "revoked", "is_revoked"), REVOKED_STAMPS.values(), ids=REVOKED_STAMPS
)
def test_a_job_is_revoked_by_its_stamps(
    app: Celery, revocations: Any, stamps: Any, revoked: Any, *, is_revoked: bool
) -> None:
    """A job with a stamp that ``revoke_by_stamped_headers`` has revoked is cancelled."""
    revocations.revoked_stamps.update(revoked)
    request = read(app, envelope(headers__stamps=stamps))
    assert isinstance(request.failure, JobCancelledException) == is_revoked


def test_a_job_is_revoked_by_its_id(app: Celery, revocations: Any) -> None:
    """A job that ``revoke`` has revoked is cancelled, and others are not."""
    revocations.revoked.add(JOB)
    assert isinstance(read(app, envelope()).failure, JobCancelledException)
    assert read(app, envelope(headers__id="another")).failure is None


# --- Output for operators ------------------------------------------------------------------------

ARGUMENTS = {
    "none": ({}, {"args": "", "kwargs": ""}),
    "no text": ({"headers__argsrepr": 5, "headers__kwargsrepr": []}, {"args": "", "kwargs": ""}),
    "short": (
        {"headers__argsrepr": "()", "headers__kwargsrepr": "{'user_id': 'u'}"},
        {"args": "()", "kwargs": "{'user_id': 'u'}"},
    ),
    "a list": (
        {"headers__kwargsrepr": "{'interview_ids': ['a', 'b']}"},
        {"args": "", "kwargs": "{'interview_ids': […"},
    ),
    "long": ({"headers__argsrepr": "x" * 1_000}, {"args": "x" * 200 + "…", "kwargs": ""}),
    "control characters": (
        {"headers__argsrepr": "\x1b[2J\n\0\ud800"},
        {"args": "\\x1b[…", "kwargs": ""},
    ),
}


@pytest.mark.parametrize(("fields", "shown"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_shown_cut_and_escaped(
    app: Celery, fields: dict[str, Any], shown: dict[str, str]
) -> None:
    """The arguments in events, logs and replies are short and contain no control character."""
    assert read(app, envelope(**fields)).arguments == shown


def test_control_replies_describe_a_delivery(app: Celery) -> None:
    """``inspect active`` and ``query_task`` reply with the fields of Celery's own requests."""
    request = read(app, envelope(headers__argsrepr="(…)"), attempts=1)
    request.worker_pid, request.time_start = 7, 8.0
    assert request.info() == {
        "id": JOB,
        "name": GRANT_ACCESS,
        "type": GRANT_ACCESS,
        "args": "(…)",
        "kwargs": "",
        "hostname": None,
        "time_start": 8.0,
        "acknowledged": False,
        "delivery_info": {"routing_key": "interview-access", "redelivered": True},
        "worker_pid": 7,
    }
    request.delivery.settle(Disposition(Action.ACKNOWLEDGE))
    assert request.info()["acknowledged"]
    assert repr(request) == (
        "job='a job' task='interview_access.grant_access' state=settled attempts=1 pid=7"
    )


# --- Generated messages --------------------------------------------------------------------------

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=30)
    | st.sampled_from([JOB, GRANT_ACCESS, "application/json", "utf-8", NOW.isoformat()]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = (
    *("headers", "properties", "body", "content-type", "content-encoding", "x"),
    *("headers__id", "headers__task", "headers__eta", "headers__expires", "headers__timelimit"),
    *("headers__stamps", "headers__argsrepr", "headers__compression", "headers__root_id"),
    "properties__body_encoding",
)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """Draw an envelope with some fields and some bytes changed."""
    whole = envelope()
    for path in draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True)):
        *outer, name = path.split("__")
        target = whole.get(outer[0]) if outer else whole
        if isinstance(target, dict):
            target[name] = draw(VALUES)
    message = bytearray(json.dumps(whole).encode())
    for at in draw(st.lists(st.integers(0, len(message) - 1), max_size=3)):
        message[at] = draw(st.integers(0, 255))
    return bytes(message)


@given(
    message=st.binary() | VALUES.map(lambda value: json.dumps(value).encode()) | changed(),
    attempts=st.integers(0, 6),
)
@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_message_raises(app: Celery, revocations: Any, message: bytes, attempts: int) -> None:
    """A request of any bytes can be dispatched, shown and settled."""
    revocations.revoked_stamps["s"] = ["v"]
    request = read(app, message, attempts=attempts)
    assert request.failure is not None or request.name in app.tasks
    assert 0 < request.time_limit <= LIMITS.seconds
    assert request.delay >= 0
    assert len(request.id) <= 255
    assert repr(request).isprintable()
    assert "".join(request.arguments.values()).isprintable()
    json.dumps(request.info())
    pickle.loads(pickle.dumps(request.dispatched))  # noqa: S301 - our own
