"""Generate queue messages of every kind from a seed: valid jobs, mistakes and attacks.

A generated message is what a client pushes to a Redis list: bytes. Valid jobs carry the number of
grants that they must create; everything else carries only what the worker owes to any message.
"""

from __future__ import annotations

import base64
import bz2
import gzip
import json
import lzma
import random
import re
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

QUEUE = "interview-access"
PRIORITIES = (3, 6, 9)
ELSEWHERE = "fuzz-elsewhere"
GRANT = "interview_access.grant_access"
COHORT = "interview_access.grant_cohort_access"
ATTEMPT = "interview_access.create_interview_attempt"

FORGED = "\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] FORGED\x1b]0;owned\x07\x1b[2J\r\x9b31m"
"""A log line and terminal commands, to appear nowhere as they are."""

_PLAIN_BYTES = 64_000
_PLAIN_LEVELS = 20
_ID_LENGTH = 255

Envelope = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One message.

    Attributes:
        kind: Its name in `KINDS`.
        raw: The bytes.
        queue: The Redis list that it is pushed to.
        created: The grants that the job must create; None where it need not succeed.
        delayed: Whether it may wait until long after the run.
    """

    kind: str
    raw: bytes
    queue: str = QUEUE
    created: int | None = None
    delayed: bool = False

    @property
    def claimed_id(self) -> str | None:
        """The job ID as a lenient reader finds it: any string, in the body by protocol 1."""
        envelope = _decoded(self.raw)
        if not isinstance(envelope, dict):  # or nested deeper than this process can decode
            found = _HEADERS_ID.search(self.raw)
            return found[1].decode(errors="replace") if found else None
        headers = envelope.get("headers")
        if not isinstance(headers, dict) or "task" not in headers:
            headers = _decoded_body(envelope.get("body"))
        job_id = headers.get("id") if isinstance(headers, dict) else None
        return job_id if isinstance(job_id, str) else None

    @property
    def is_text(self) -> bool:
        """Whether it is UTF-8."""
        try:
            self.raw.decode()
        except UnicodeDecodeError:
            return False
        return True

    @property
    def readable_id(self) -> str | None:
        """The job ID, where a bounded reader of strict JSON finds a valid one in the headers."""
        job_id = self.claimed_id
        if job_id is None or not is_job_id(job_id) or b'"headers"' not in self.raw:
            return None
        is_plain = len(self.raw) <= _PLAIN_BYTES and _is_plain(self.raw)
        return job_id if is_plain and self.kind != "protocol 1" else None


_HEADERS_ID = re.compile(rb'"headers": \{.*?"id": "([^"\\]{1,255})"', re.DOTALL)


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
    """Whether it is JSON of few levels without repeated keys, NaN or Infinity."""
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


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**30, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "\ud800",
        "\0",
        "y" * 300,
        "🙂",
        "\u202e",
        FORGED,
        GRANT,
        "2020-01-01T00:00:00",
    ),
    *([], {}, [None], [1, 2], ["x", "y"], {"a": None}, {"": {"": {}}}, [[], {}, {}], {"task": 1}),
    *({"__type__": "uuid", "__value__": "no uuid"}, {"__type__": "datetime", "__value__": 1}),
    *({"__type__": "decimal", "__value__": "1e999999"}, {"__type__": []}, {"__type__": "bytes"}),
    *({"__type__": "base64", "__value__": "!"}, {"__type__": "no such", "__value__": {}}),
)
"""Values of a type or content that nobody expects where they stand."""

CODECS: tuple[Any, ...] = (
    *(
        "utf-8",
        "UTF8",
        "us-ascii",
        "latin-1",
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-32",
        "utf-7",
    ),
    *("punycode", "idna", "zlib_codec", "bz2_codec", "hex_codec", "base64_codec", "rot13", "uu"),
    *("quopri", "raw_unicode_escape", "unicode_escape", "undefined", "cp037", "mbcs", "binary"),
    *("", "no such codec", "\0", "x" * 10_000, None, 5, [], {}),
)
CONTENT_TYPES: tuple[Any, ...] = (
    *("application/data", "application/x-python-serialize", "application/x-yaml", "text/yaml"),
    *("application/x-msgpack", "application/msgpack", "text/plain", "application/JSON", "json"),
    *("pickle", "application/json; charset=utf-16", "", None, 1, [], {}, "\0", FORGED),
)
BUILT_INS = (
    *("celery.map", "celery.chunks", "celery.group", "celery.chord", "celery.chain"),
    *("celery.accumulate", "celery.backend_cleanup", "celery.starmap", "celery.chord_unlock"),
)
TASK_NAMES: tuple[Any, ...] = (
    *BUILT_INS,
    *("no.such.task", "", " ", "interview_access.grant_access ", "INTERVIEW_ACCESS.GRANT_ACCESS"),
    *("__init__", "os.system", "worker.celery.app", "x" * 1_000_000, FORGED, "\ud800", "a\0b"),
    *(None, 0, 1.5, True, [], {}, [GRANT], {"task": GRANT}),
)
_COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "application/x-gzip": zlib.compress,
    "application/gzip": gzip.compress,
    "gzip": gzip.compress,
    "zlib": zlib.compress,
    "application/x-bz2": bz2.compress,
    "bzip2": bz2.compress,
    "application/x-lzma": lzma.compress,
    "lzma": lzma.compress,
    "application/zstd": zlib.compress,
    "no such compression": zlib.compress,
}


class Fuzz:
    """A generator of messages, the same for the same seed but for its random IDs and times."""

    def __init__(self, seed: int, interviews: Sequence[str], trap: str) -> None:
        """Takes what its jobs may ask for.

        Args:
            seed: Repeats a run.
            interviews: IDs of existing interviews; ten or more.
            trap: Path of a folder that exists only after a message's code was executed.
        """
        self.rng = random.Random(f"fuzz {seed}")  # noqa: S311 - must be repeatable
        self.interviews = list(interviews)
        self.trap = trap
        self._number = 0
        self._valid: list[Message] = []
        self._finished: deque[Message] = deque(maxlen=500)

    def wave(self, count: int, kinds: Sequence[str] = ()) -> list[Message]:
        """Generate messages.

        Duplicates are of valid jobs of this wave and of earlier ones; whatever may itself decide
        a job's result repeats the IDs of earlier waves only, which must be finished by now.

        Args:
            count: How many.
            kinds: Only of these kinds; all, unless given.
        """
        self._finished.extend(self._valid)
        self._valid = []
        names = list(kinds or KINDS)
        weights = [KINDS[name][0] for name in names]
        chosen = self.rng.choices(names, weights, k=count)
        return [KINDS[name][1](self) for name in chosen]

    # --- Jobs that must succeed ------------------------------------------------------------------

    def valid(self) -> Message:
        """A job as Celery's producers write it."""
        return self._keep(self._job("valid"))

    def valid_with_options(self) -> Message:
        """A job with options of Celery's protocol that must not change its result."""
        envelope, created = self._grant()
        for change in self.rng.sample(_OPTIONS, self.rng.randint(1, 4)):
            change(self, envelope)
        return self._keep(Message("valid with options", self._text(envelope), created=created))

    def valid_by_priority(self) -> Message:
        """A job on one of the queue's other lists."""
        envelope, created = self._grant()
        step = self.rng.choice(PRIORITIES)
        envelope["properties"]["priority"] = step
        queue = f"{QUEUE}\x06\x16{step}"
        return Message("valid by priority", self._text(envelope), queue, created)

    def valid_cohort(self) -> Message:
        """A job for several users."""
        users, ids = [self._user() for _ in range(3)], self._ids()
        envelope = self._envelope(COHORT, [[], {"user_ids": users, "interview_ids": ids}, {}])
        created = len(users) * len(set(ids))
        return Message("valid cohort", self._text(envelope), created=created)

    def valid_spelling(self) -> Message:
        """A job whose IDs are spelled in several ways, as objects of a Python producer too."""
        ids = self._ids()
        user = self._user()
        spelled: list[Any] = [self._spelled(one) for one in [*ids, *ids]]
        body: list[Any] = [[], {"user_id": user, "interview_ids": spelled}, {}]
        if self.rng.random() < 0.5:
            body = [[user, spelled], {}, {}]
        text = self._text(self._envelope(GRANT, body))
        return Message("valid spelling", text, created=len(set(ids)))

    def duplicate(self) -> Message:
        """The same bytes again."""
        known = self._valid or list(self._finished)
        if not known:
            return self.valid()
        original = self.rng.choice(known)
        return Message("duplicate", original.raw, original.queue, original.created)

    def broken_duplicate(self) -> Message:
        """Another message under the ID of a finished job, whose result must stay."""
        if not self._finished:
            return self.valid()
        original = self.rng.choice(self._finished)
        job_id = original.claimed_id
        envelope, _ = self._grant()
        match self.rng.randrange(5):
            case 0:
                envelope["headers"]["task"] = self.rng.choice(TASK_NAMES)
            case 1:
                envelope["body"] = "no base64!"
            case 2:
                envelope["content-type"] = self.rng.choice(CONTENT_TYPES)
            case 3:
                envelope["headers"]["expires"] = self.rng.choice(ODD)
            case _:
                pass
        envelope["headers"]["id"] = job_id
        return Message("broken duplicate", self._text(envelope))

    # --- Requests that are at fault --------------------------------------------------------------

    def invalid_request(self) -> Message:
        """Arguments that the contract refuses."""
        kwargs: dict[str, Any] = {"user_id": self._user(), "interview_ids": self._ids()}
        args: Any = []
        embedded: Any = {}
        match self.rng.randrange(8):
            case 0:
                kwargs[self.rng.choice(list(kwargs))] = self.rng.choice(ODD)
            case 1:
                kwargs["interview_ids"].append(self.rng.choice([*ODD, str(uuid4())]))
            case 2:
                del kwargs[self.rng.choice(list(kwargs))]
            case 3:
                kwargs[self.rng.choice(["", "x", "self", "\0", "\ud800", FORGED])] = 1
            case 4:
                args = self.rng.choice(ODD)
            case 5:
                embedded = self.rng.choice(ODD)
            case 6:
                kwargs = self.rng.choice(ODD)
            case _:
                kwargs["user_id"] = self.rng.choice(["", "u" * 37, "\0", "\ud800", FORGED, 5])
        task = self.rng.choice([GRANT, GRANT, COHORT, ATTEMPT])
        return Message(
            "invalid request", self._text(self._envelope(task, [args, kwargs, embedded]))
        )

    def odd_body(self) -> Message:
        """A body that is no call."""
        body = self.rng.choice([*ODD, [[]], [[], {}], [[], {}, {}, {}], [{}, [], []], "x" * 1000])
        return Message("odd body", self._text(self._envelope(GRANT, body)))

    # --- Bytes -----------------------------------------------------------------------------------

    def random_bytes(self) -> Message:
        """Anything."""
        return Message("random bytes", self.rng.randbytes(self.rng.choice([0, 1, 2, 30, 3_000])))

    def other_json(self) -> Message:
        """JSON that is no envelope."""
        return Message("other JSON", _dumped(self.rng.choice(ODD)))

    def cut_off(self) -> Message:
        """A message that ends early, or begins late."""
        raw = self._job("").raw
        at = self.rng.randrange(len(raw))
        return Message("cut off", raw[:at] if self.rng.random() < 0.7 else raw[at:])

    def changed_bytes(self) -> Message:
        """A message with some bytes changed, missing or added."""
        raw = bytearray(self._job("").raw)
        for _ in range(self.rng.randint(1, 4)):
            at = self.rng.randrange(len(raw))
            match self.rng.randrange(3):
                case 0:
                    raw[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    del raw[at]
                case _:
                    raw.insert(at, self.rng.randrange(256))
        return Message("changed bytes", bytes(raw))

    def encoded_otherwise(self) -> Message:
        """A message in another encoding, or behind a byte order mark."""
        text = self._job("").raw.decode()
        codec = self.rng.choice(["utf-16", "utf-32", "utf-7", "utf-8-sig", "cp037"])
        return Message("encoded otherwise", text.encode(codec))

    def repeated_keys(self) -> Message:
        """Keys that are given twice."""
        raw, other = self._job("").raw, self._job("").raw
        key = self.rng.choice([b"headers", b"properties", b"body", b"id", b"task"])
        value = _dumped(self.rng.choice(ODD))
        first = self.rng.random() < 0.5
        if key in {b"id", b"task"}:
            raw = raw.replace(b'"headers": {', b'"headers": {"' + key + b'": ' + value + b", ", 1)
        elif first:
            raw = b'{"' + key + b'": ' + value + b", " + raw[1:]
        else:
            raw = raw[:-1] + b", " + other[1:]
        return Message("repeated keys", raw)

    def numbers(self) -> Message:
        """Numbers that no type holds."""
        number = self.rng.choice(
            [
                b"NaN",
                b"-Infinity",
                b"1e999999",
                b"9" * 5_000,
                b"-" + b"1" * 400_000,
                b"0." + b"3" * 9_000,
            ]
        )
        envelope, _ = self._grant()
        self._replace_somewhere(envelope, "@number@")
        return Message("numbers", self._text(envelope).replace(b'"@number@"', number))

    def nested(self) -> Message:
        """Lists or objects within each other, in the envelope, the headers or the body."""
        levels = self.rng.choice([10, 30, 100, 500, 950, 1_100, 5_000, 100_000])
        opened, closed = self.rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"__type__":', b"}")])
        nest = opened * levels + b"0" + closed * levels
        envelope, _ = self._grant()
        if self.rng.random() < 0.4:
            body = [[], {"user_id": self._user(), "interview_ids": "@nest@"}, {}]
            place = self.rng.randrange(4)
            if place == 1:
                body[2] = {"callbacks": "@nest@"}
            elif place == 2:
                body[0] = ["@nest@"]
            elif place == 3:
                body = ["@nest@"]
            envelope["body"] = _base64(_dumped(body).replace(b'"@nest@"', nest))
        else:
            self._replace_somewhere(envelope, "@nest@")
        return Message("nested", self._text(envelope).replace(b'"@nest@"', nest))

    def large(self) -> Message:
        """Megabytes in one field."""
        size = self.rng.choice([70_000, 300_000, 1_000_000, 4_000_000])
        value: Any = self.rng.choice(
            ["z" * size, [0] * (size // 3), [[]] * (size // 4), "\0" * size]
        )
        envelope, _ = self._grant()
        match self.rng.randrange(4):
            case 0:
                envelope["body"] = [[], {"user_id": self._user(), "interview_ids": value}, {}]
            case 1:
                envelope["body"] = [
                    [],
                    {"user_id": self._user(), "interview_ids": []},
                    {"chain": value},
                ]
            case _:
                self._replace_somewhere(envelope, value)
        return Message("large", self._text(envelope))

    def large_job(self) -> Message:
        """A job of many unknown IDs."""
        count = self.rng.choice([1_000, 5_000, 30_000, 100_001])
        ids = [str(UUID(int=self.rng.getrandbits(128))) for _ in range(count)]
        body = [[], {"user_id": self._user(), "interview_ids": ids}, {}]
        return Message("large job", self._text(self._envelope(GRANT, body)))

    # --- Fields ----------------------------------------------------------------------------------

    def odd_fields(self) -> Message:
        """An envelope with fields missing, renamed, or of another type."""
        envelope, _ = self._grant()
        if self.rng.random() < 0.5:
            envelope["body"] = _base64(_dumped(envelope["body"]))
        for _ in range(self.rng.randint(1, 3)):
            where, key = self.rng.choice(_places(envelope))
            if self.rng.random() < 0.3:
                del where[key]
            else:
                where[key] = deepcopy(self.rng.choice(ODD))
        return Message("odd fields", self._text(envelope))

    def encodings(self) -> Message:
        """A content type or encoding that is not UTF-8 JSON."""
        envelope, _ = self._grant()
        body = _dumped(envelope["body"])
        if self.rng.random() < 0.7:
            codec = envelope["content-encoding"] = self.rng.choice(CODECS)
            if self.rng.random() < 0.5 and codec in ("utf-16", "utf-32", "utf-7", "cp037"):
                body = body.decode().encode(codec)
            elif codec == "punycode" and self.rng.random() < 0.3:
                body = b"a" * 100_000 + b"-" + b"b9" * 50_000
        if self.rng.random() < 0.7:
            envelope["content-type"] = self.rng.choice(CONTENT_TYPES)
            if self.rng.random() < 0.6:
                trap = self.trap.encode()
                body = self.rng.choice(
                    [
                        b"cposix\nmkdir\n(S'" + trap + b"'\ntR.",
                        b"!!python/object/apply:os.mkdir ['" + trap + b"']",
                        b"\x93\x90\x80\x80",
                        b"\xc6\xff\xff\xff\xff",
                    ]
                )
        envelope["body"] = _base64(body)
        return Message("encodings", self._text(envelope))

    def bodies_of_no_text(self) -> Message:
        """A body that is no base64, no UTF-8 or no JSON, or whose encoding is another."""
        envelope, _ = self._grant()
        valid = _dumped(envelope["body"])
        envelope["body"] = self.rng.choice(
            [
                *("", "!", "=", "====", "a", "\ud800", "\0", "é", "W10" * 1_000, valid.decode()),
                *(
                    _base64(b"\xff\xfe\x00"),
                    _base64(valid[:-1]),
                    _base64(b"\xc0\x80"),
                    _base64(b""),
                ),
                *(
                    _base64(b"\xed\xa0\x80"),
                    _base64(b"[[], {}, {}] x"),
                    _base64(b"\xef\xbb\xbf" + valid),
                ),
                *(_base64(_base64(valid).encode()), _base64(valid)[:-3], f" {_base64(valid)}\n"),
            ]
        )
        if self.rng.random() < 0.3:
            envelope["properties"]["body_encoding"] = self.rng.choice([*ODD, "rot13", "BASE64"])
        return Message("bodies of no text", self._text(envelope))

    def compressed(self) -> Message:
        """A compressed body, as it says or not."""
        envelope, _ = self._grant()
        name = self.rng.choice(list(_COMPRESSIONS))
        body = _COMPRESSIONS[self.rng.choice([name, name, *_COMPRESSIONS])](
            _dumped(envelope["body"])
        )
        if self.rng.random() < 0.3:
            body = body[: self.rng.randrange(len(body))]
        envelope["headers"]["compression"] = (
            name if self.rng.random() < 0.9 else self.rng.choice(ODD)
        )
        envelope["body"] = _base64(body)
        return Message("compressed", self._text(envelope))

    def bomb(self) -> Message:
        """A compressed body of a few kilobytes that holds a hundred megabytes."""
        name, body = self.rng.choice(_bombs())
        envelope, _ = self._grant()
        envelope["headers"]["compression"] = name
        envelope["body"] = body
        return Message("bomb", self._text(envelope))

    def task_names(self) -> Message:
        """A task that is not of the contract."""
        envelope, _ = self._grant()
        envelope["headers"]["task"] = name = self.rng.choice(TASK_NAMES)
        if name in BUILT_INS:
            signature = {"task": GRANT, "args": [], "kwargs": {}, "options": {}}
            envelope["body"] = self.rng.choice(
                [
                    [[], {}, {}],
                    [[1, 2], {}, {}],
                    [[signature, [[1], [2]]], {}, {}],
                    [[], {"task": signature, "it": [[1]]}, {}],
                    [[], {"group_id": "g", "callback": signature, "max_retries": None}, {}],
                    envelope["body"],
                ]
            )
        return Message("task names", self._text(envelope))

    def job_ids(self) -> Message:
        """A job ID that is none, or is at its limit."""
        envelope, _ = self._grant()
        job_id: Any = self.rng.choice(
            [
                *(*ODD, " lead", "a b", "ü" * 255, f"{uuid4()}{FORGED}", "../../x", "a:b*?[c]"),
                *(f"{uuid4()}".ljust(255, "i"), f"{uuid4()}".ljust(256, "i"), f"{uuid4()}\x7f"),
                *(f"{uuid4()}\x85", f"{uuid4()}\u2028x", "G" * self.rng.choice([300, 100_000])),
            ]
        )
        if self.rng.random() < 0.02:
            job_id = "G" * 5_000_000
        envelope["headers"]["id"] = job_id
        if self.rng.random() < 0.2:
            del envelope["headers"]["id"]
        return Message("job IDs", self._text(envelope))

    # --- Celery's own features -------------------------------------------------------------------

    def celery_options(self) -> Message:
        """Options of Celery's protocol with values of any kind."""
        envelope, _ = self._grant()
        now = datetime.now(UTC)
        times: list[Any] = [
            *ODD,
            *(now.isoformat(), (now - timedelta(days=9)).isoformat(), "9999-12-31T23:59:59.999999"),
            *("0001-01-01T00:00:00+23:59", "2026-02-30T00:00:00", "2026-01-01", "12:00", "now"),
            *("2026-W01-1", "9999-12-31T23:59:59-23:59", (now + timedelta(seconds=1)).isoformat()),
            *(now.isoformat().replace("+00:00", "+14:00"), now.timestamp(), "20260101T000000Z"),
        ]
        fields: dict[str, list[Any]] = {
            "eta": times,
            "expires": times,
            "timelimit": [
                *ODD,
                *(
                    [0, 0],
                    [-1, None],
                    [1e308, 1],
                    ["1", "2"],
                    [None],
                    [1, 2, 3],
                    [[], {}],
                    [True, 1],
                ),
                *([10**400, 1], [float("nan"), None], [5e-324, None]),
            ],
            "retries": [*ODD, 10**20, -5],
            "group": ODD_LINKS,
            "chord": ODD_LINKS,
            "group_index": list(ODD),
            "replaced_task_nesting": list(ODD),
            "stamps": [*ODD, {"x": ["1"]}, {"x": 1}],
            "stamped_headers": [*ODD, ["x"], ["id"], [[]]],
            "ignore_result": list(ODD),
            "shadow": [*ODD, "s" * 100_000],
            "parent_id": list(ODD),
            "root_id": list(ODD),
            "argsrepr": [*ODD, "a" * 100_000],
            "kwargsrepr": [*ODD, "a" * 100_000],
            "origin": list(ODD),
            "lang": list(ODD),
            "meth": list(ODD),
        }
        for name in self.rng.sample(list(fields), self.rng.randint(1, 3)):
            envelope["headers"][name] = self.rng.choice(fields[name])
        raw = self._text(envelope)
        return Message("Celery options", raw, delayed=_is_far(envelope["headers"].get("eta")))

    def expired(self) -> Message:
        """A job past its time."""
        envelope, _ = self._grant()
        past = datetime.now(UTC) - timedelta(seconds=self.rng.choice([0.001, 1, 10**6]))
        envelope["headers"]["expires"] = past.isoformat()
        return Message("expired", self._text(envelope))

    def delayed(self) -> Message:
        """A job for the far future."""
        envelope, _ = self._grant()
        due = datetime.now(UTC) + timedelta(days=self.rng.choice([1, 400, 300_000]))
        envelope["headers"]["eta"] = due.isoformat()
        return Message("delayed", self._text(envelope), delayed=True)

    def linked(self) -> Message:
        """A job with callbacks, errbacks, a chain or a chord, of any shape, to any queue."""
        envelope, _ = self._grant()
        embedded = envelope["body"][2]
        for name in self.rng.sample(["callbacks", "errbacks", "chain", "chord"], 2):
            embedded[name] = self.rng.choice(ODD_LINKS)
            if self.rng.random() < 0.5:
                embedded[name] = [self._signature() for _ in range(self.rng.randint(1, 2))]
                if name == "chord":
                    embedded[name] = embedded[name][0]
        if self.rng.random() < 0.3:
            envelope["body"][1]["interview_ids"] = ["no UUID"]
        if embedded.get("chord") and self.rng.random() < 0.5:
            envelope["headers"]["group"] = str(uuid4())
        return Message("linked", self._text(envelope))

    def protocol_1(self) -> Message:
        """A message of Celery's first protocol: the task is named in the body."""
        kwargs = {"user_id": self._user(), "interview_ids": self._ids()}
        body: Envelope = {
            "task": GRANT,
            "id": str(uuid4()),
            "args": [],
            "kwargs": kwargs,
            "retries": 0,
        }
        if self.rng.random() < 0.5:
            body[
                self.rng.choice(
                    ["eta", "expires", "utc", "taskset", "id", "task", "args", "kwargs"]
                )
            ] = self.rng.choice(ODD)
        envelope = self._envelope(GRANT, body)
        envelope["headers"] = self.rng.choice([{}, {}, None, {"lang": "py"}])
        if self.rng.random() < 0.2:
            del envelope["headers"]
        return Message("protocol 1", self._text(envelope))

    def kombu_objects(self) -> Message:
        """Objects by which kombu's JSON stands for values of other types."""
        kind, value = self.rng.choice(
            [
                *(("uuid", {"hex": uuid4().hex}), ("uuid", str(uuid4())), ("decimal", "9" * 9_000)),
                *(("datetime", "2026-01-01"), ("datetime", 5), ("date", ""), ("time", "25:00")),
                *(("bytes", "eHg="), ("base64", "eHg="), ("base64", 5), ("keyed", {}), ("x", None)),
                ("decimal", "1e999999999"),
            ]
        )
        envelope, _ = self._grant()
        stand_in = {"__type__": kind, "__value__": value}
        if self.rng.random() < 0.5:
            envelope["body"][1][self.rng.choice(["user_id", "interview_ids"])] = stand_in
        else:
            self._replace_somewhere(envelope, stand_in)
        return Message("kombu objects", self._text(envelope))

    # --- Parts -----------------------------------------------------------------------------------

    def _keep(self, message: Message) -> Message:
        self._valid.append(message)
        return message

    def _job(self, kind: str) -> Message:
        envelope, created = self._grant()
        return Message(kind, self._text(envelope), created=created)

    def _user(self) -> str:
        self._number += 1
        return f"u{self._number}-{self.rng.getrandbits(48):012x}"  # no changed byte makes another's

    def _ids(self) -> list[str]:
        return self.rng.sample(self.interviews, self.rng.randint(0, 4))

    def _spelled(self, interview_id: str) -> Any:
        spellings: list[Any] = [
            *(interview_id, interview_id.upper(), interview_id.replace("-", "")),
            {"__type__": "uuid", "__value__": {"hex": interview_id.replace("-", "")}},
        ]
        return self.rng.choice(spellings)

    def _grant(self) -> tuple[Envelope, int]:
        """An envelope of a valid job, its body not encoded yet, and the grants that it creates."""
        ids = self._ids()
        body = [[], {"user_id": self._user(), "interview_ids": ids}, {}]
        return self._envelope(GRANT, body), len(ids)

    def _envelope(self, task: str, body: Any) -> Envelope:
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

    def _signature(self) -> Envelope:
        """What Celery writes for a call that follows."""
        name = self.rng.choice([GRANT, GRANT, "no.such.task", *BUILT_INS])
        options = {"task_id": str(uuid4()), "queue": self.rng.choice([QUEUE, QUEUE, ELSEWHERE])}
        return {
            "task": name,
            "args": [],
            "options": options,
            "subtask_type": None,
            "kwargs": {"user_id": self._user(), "interview_ids": []},
            "immutable": True,
        }

    def _replace_somewhere(self, envelope: Envelope, value: Any) -> None:
        if self.rng.random() < 0.2:
            envelope[self.rng.choice(["x", "headers", "properties", "body"])] = value
            return
        part = envelope[self.rng.choice(["headers", "headers", "properties"])]
        part[self.rng.choice([*part, "x"])] = value

    def _text(self, envelope: Envelope) -> bytes:
        """The envelope as it is sent; a body that is no text yet is encoded first."""
        if "body" in envelope and not isinstance(envelope["body"], str):
            body = _dumped(envelope["body"])
            properties = envelope.get("properties")
            encoded = isinstance(properties, dict) and properties.get("body_encoding") == "base64"
            envelope["body"] = _base64(body) if encoded else body.decode()
        return _dumped(envelope)


def _later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def _in_headers(name: str, value: Callable[[Fuzz], Any]) -> Callable[[Fuzz, Envelope], None]:
    def change(fuzz: Fuzz, envelope: Envelope) -> None:
        envelope["headers"][name] = value(fuzz)

    return change


def _in_plain_text(_: Fuzz, envelope: Envelope) -> None:
    del envelope["properties"]["body_encoding"]


def _stamped(_: Fuzz, envelope: Envelope) -> None:
    envelope["headers"] |= {"stamped_headers": ["x"], "stamps": {"x": ["1"]}}


def _linked(fuzz: Fuzz, envelope: Envelope) -> None:
    body = envelope["body"]
    if isinstance(body, list):
        body[2] = {"callbacks": [fuzz._signature()]}


def _without_delivery_info(_: Fuzz, envelope: Envelope) -> None:
    del envelope["properties"]["delivery_info"]


_OPTIONS: list[Callable[[Fuzz, Envelope], None]] = [
    _in_headers("eta", lambda fuzz: _later(fuzz.rng.choice([-5, -1e6, 0.3]))),
    _in_headers("expires", lambda _: _later(3_600)),
    _in_headers("timelimit", lambda fuzz: fuzz.rng.choice([[300, None], [None, None], [300, 250]])),
    _in_headers("retries", lambda _: 2),
    _in_headers("group", lambda _: str(uuid4())),
    _in_headers("parent_id", lambda _: str(uuid4())),
    _in_headers("root_id", lambda _: str(uuid4())),
    _in_headers("replaced_task_nesting", lambda _: 2),
    _in_headers("ignore_result", lambda fuzz: fuzz.rng.random() < 0.5),
    _in_headers("shadow", lambda fuzz: fuzz.rng.choice(["other name", f"x{FORGED}"])),
    _in_headers("argsrepr", lambda fuzz: fuzz.rng.choice(["a" * 5_000, FORGED])),
    _in_headers("kwargsrepr", lambda fuzz: fuzz.rng.choice(["a" * 5_000, FORGED])),
    _in_headers("origin", lambda fuzz: fuzz.rng.choice(["a" * 5_000, FORGED])),
    _in_headers("lang", lambda _: "go"),
    _in_headers("x-trace", lambda _: {"a": [1, {"b": None}]}),
    *(_in_plain_text, _stamped, _linked, _without_delivery_info),
]
"""Changes of a valid envelope that must not change the job's result."""

ODD_LINKS: list[Any] = [
    *ODD,
    *([GRANT], [[GRANT]], [{"task": GRANT}], [{"task": None, "args": 1}], [{"options": []}]),
    *(
        [{"task": GRANT, "options": {"queue": "q" * 10_000}}],
        [{"task": "x", "subtask_type": "chord"}],
    ),
    *({"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [{}]}, "options": {}},),
    *(
        [
            {
                "task": GRANT,
                "args": [],
                "kwargs": {},
                "options": {"queue": ELSEWHERE, "countdown": "x"},
            }
        ],
    ),
    *([{"task": GRANT, "options": {"link": [{"task": GRANT}], "exchange": FORGED}}],),
]
"""Values for callbacks, chains and chords that Celery itself never writes."""


def _is_far(eta: object) -> bool:
    """Whether a time is so far in the future that the message may still wait at the end."""
    try:
        due = datetime.fromisoformat(str(eta))
        due = due if due.tzinfo else due.replace(tzinfo=UTC)
        return (due - datetime.now(UTC)).total_seconds() > 0
    except (ValueError, OverflowError):
        return False


def _places(value: Any) -> list[tuple[Any, Any]]:
    """The objects and lists within a value, each with every one of its keys or positions."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _base64(body: bytes) -> str:
    return base64.b64encode(body).decode()


@lru_cache
def _bombs() -> list[tuple[str, str]]:
    """A compression's name, and a hundred megabytes compressed by it."""
    zeros = bytes(100_000_000)
    return [
        ("application/x-gzip", _base64(zlib.compress(zeros))),
        ("application/x-bz2", _base64(bz2.compress(zeros))),
        ("application/x-lzma", _base64(lzma.compress(zeros, preset=0))),
    ]


KINDS: dict[str, tuple[float, Callable[[Fuzz], Message]]] = {
    "valid": (30, Fuzz.valid),
    "valid with options": (15, Fuzz.valid_with_options),
    "valid by priority": (3, Fuzz.valid_by_priority),
    "valid cohort": (2, Fuzz.valid_cohort),
    "valid spelling": (3, Fuzz.valid_spelling),
    "duplicate": (3, Fuzz.duplicate),
    "broken duplicate": (3, Fuzz.broken_duplicate),
    "invalid request": (6, Fuzz.invalid_request),
    "odd body": (3, Fuzz.odd_body),
    "random bytes": (2, Fuzz.random_bytes),
    "other JSON": (1, Fuzz.other_json),
    "cut off": (2, Fuzz.cut_off),
    "changed bytes": (4, Fuzz.changed_bytes),
    "encoded otherwise": (1, Fuzz.encoded_otherwise),
    "repeated keys": (2, Fuzz.repeated_keys),
    "numbers": (2, Fuzz.numbers),
    "nested": (3, Fuzz.nested),
    "large": (0.5, Fuzz.large),
    "large job": (0.3, Fuzz.large_job),
    "odd fields": (8, Fuzz.odd_fields),
    "encodings": (5, Fuzz.encodings),
    "bodies of no text": (4, Fuzz.bodies_of_no_text),
    "compressed": (3, Fuzz.compressed),
    "bomb": (0.3, Fuzz.bomb),
    "task names": (5, Fuzz.task_names),
    "job IDs": (5, Fuzz.job_ids),
    "Celery options": (8, Fuzz.celery_options),
    "expired": (1, Fuzz.expired),
    "delayed": (1, Fuzz.delayed),
    "linked": (4, Fuzz.linked),
    "protocol 1": (2, Fuzz.protocol_1),
    "kombu objects": (3, Fuzz.kombu_objects),
}
"""Each kind's weight among all, and how one is made."""
