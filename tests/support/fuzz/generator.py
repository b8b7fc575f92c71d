"""Generate messages of every kind from a seed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

from tests.support.fuzz.envelopes import Envelope, Envelopes, dumped, in_base64, places
from tests.support.fuzz.message import Message
from tests.support.fuzz.options import OPTIONS
from tests.support.fuzz.values import (
    ATTEMPT,
    BUILT_INS,
    CODECS,
    COHORT,
    CONTENT_TYPES,
    FORGED,
    GRANT,
    ODD,
    ODD_LINKS,
    PRIORITIES,
    QUEUE,
    TASK_NAMES,
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


class Fuzz(Envelopes):
    """Generates messages; equal seeds give equal messages, except for random IDs and times.

    Attributes:
        trap: Path of a folder that exists only after a message's code was executed.
    """

    def __init__(self, seed: int, interviews: Sequence[str], trap: str) -> None:
        """Generate nothing yet.

        Args:
            seed: Repeats a run.
            interviews: IDs of existing interviews; ten or more.
            trap: Path of a folder that messages with code try to create.
        """
        super().__init__(seed, interviews)
        self.trap = trap
        self._valid: list[Message] = []
        self._finished: deque[Message] = deque(maxlen=500)

    def wave(self, count: int, kinds: Sequence[str] = ()) -> list[Message]:
        """Generate messages.

        Duplicates copy valid jobs of this wave or of earlier ones. A message that could itself
        decide a job's result reuses IDs of earlier waves only, whose jobs must have finished.

        Args:
            count: Number of messages.
            kinds: Kinds of messages to generate; all if empty.

        Returns:
            The messages, in random order.
        """
        self._finished.extend(self._valid)
        self._valid = []
        names = list(kinds or KINDS)
        weights = [KINDS[name][0] for name in names]
        chosen = self.rng.choices(names, weights, k=count)
        return [KINDS[name][1](self) for name in chosen]

    # --- Jobs that must succeed ------------------------------------------------------------------

    def valid(self) -> Message:
        """A job as Celery's producers send it."""
        return self._keep(self._job("valid"))

    def valid_with_options(self) -> Message:
        """A job with options of Celery's protocol that must not change its result."""
        envelope, created = self.grant()
        for change in self.rng.sample(OPTIONS, self.rng.randint(1, 4)):
            change(self, envelope)
        return self._keep(Message("valid with options", self.encode(envelope), created=created))

    def valid_by_priority(self) -> Message:
        """A job of another priority, on another list of the queue."""
        envelope, created = self.grant()
        step = self.rng.choice(PRIORITIES)
        envelope["properties"]["priority"] = step
        queue = f"{QUEUE}\x06\x16{step}"
        return Message("valid by priority", self.encode(envelope), queue, created)

    def valid_cohort(self) -> Message:
        """A job for several users."""
        users, ids = [self.user_id() for _ in range(3)], self.interview_ids()
        envelope = self.envelope(COHORT, [[], {"user_ids": users, "interview_ids": ids}, {}])
        created = len(users) * len(set(ids))
        return Message("valid cohort", self.encode(envelope), created=created)

    def valid_spelling(self) -> Message:
        """A job with several spellings of its IDs, also as kombu's UUID objects."""
        ids = self.interview_ids()
        user = self.user_id()
        spelled: list[Any] = [self.spell(one) for one in [*ids, *ids]]
        body: list[Any] = [[], {"user_id": user, "interview_ids": spelled}, {}]
        if self.rng.random() < 0.5:
            body = [[user, spelled], {}, {}]
        text = self.encode(self.envelope(GRANT, body))
        return Message("valid spelling", text, created=len(set(ids)))

    def duplicate(self) -> Message:
        """The bytes of an earlier valid job."""
        known = self._valid or list(self._finished)
        if not known:
            return self.valid()
        original = self.rng.choice(known)
        return Message("duplicate", original.raw, original.queue, original.created)

    def broken_duplicate(self) -> Message:
        """Another message under the ID of a finished job, whose result must not change."""
        if not self._finished:
            return self.valid()
        original = self.rng.choice(self._finished)
        job_id = original.claimed_id
        envelope, _ = self.grant()
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
        return Message("broken duplicate", self.encode(envelope))

    # --- Invalid requests ------------------------------------------------------------------------

    def invalid_request(self) -> Message:
        """Arguments that the contract refuses."""
        kwargs: dict[str, Any] = {"user_id": self.user_id(), "interview_ids": self.interview_ids()}
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
            "invalid request", self.encode(self.envelope(task, [args, kwargs, embedded]))
        )

    def odd_body(self) -> Message:
        """A body that is not a task call."""
        body = self.rng.choice([*ODD, [[]], [[], {}], [[], {}, {}, {}], [{}, [], []], "x" * 1000])
        return Message("odd body", self.encode(self.envelope(GRANT, body)))

    # --- Bytes -----------------------------------------------------------------------------------

    def random_bytes(self) -> Message:
        """Random bytes."""
        return Message("random bytes", self.rng.randbytes(self.rng.choice([0, 1, 2, 30, 3_000])))

    def other_json(self) -> Message:
        """JSON that is not an envelope."""
        return Message("other JSON", dumped(self.rng.choice(ODD)))

    def cut_off(self) -> Message:
        """A message without its end or without its beginning."""
        raw = self._job("").raw
        at = self.rng.randrange(len(raw))
        return Message("cut off", raw[:at] if self.rng.random() < 0.7 else raw[at:])

    def changed_bytes(self) -> Message:
        """A message with some bytes changed, removed or added."""
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
        """A message in another encoding, or with a byte order mark."""
        text = self._job("").raw.decode()
        codec = self.rng.choice(["utf-16", "utf-32", "utf-7", "utf-8-sig", "cp037"])
        return Message("encoded otherwise", text.encode(codec))

    def repeated_keys(self) -> Message:
        """A message with repeated keys."""
        raw, other = self._job("").raw, self._job("").raw
        key = self.rng.choice([b"headers", b"properties", b"body", b"id", b"task"])
        value = dumped(self.rng.choice(ODD))
        first = self.rng.random() < 0.5
        if key in {b"id", b"task"}:
            raw = raw.replace(b'"headers": {', b'"headers": {"' + key + b'": ' + value + b", ", 1)
        elif first:
            raw = b'{"' + key + b'": ' + value + b", " + raw[1:]
        else:
            raw = raw[:-1] + b", " + other[1:]
        return Message("repeated keys", raw)

    def numbers(self) -> Message:
        """A message with numbers beyond every numeric type."""
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
        envelope, _ = self.grant()
        self.replace_somewhere(envelope, "@number@")
        return Message("numbers", self.encode(envelope).replace(b'"@number@"', number))

    def nested(self) -> Message:
        """A message with nested lists or objects in the envelope, the headers or the body."""
        levels = self.rng.choice([10, 30, 100, 500, 950, 1_100, 5_000, 100_000])
        opened, closed = self.rng.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"__type__":', b"}")])
        nest = opened * levels + b"0" + closed * levels
        envelope, _ = self.grant()
        if self.rng.random() < 0.4:
            body = [[], {"user_id": self.user_id(), "interview_ids": "@nest@"}, {}]
            place = self.rng.randrange(4)
            if place == 1:
                body[2] = {"callbacks": "@nest@"}
            elif place == 2:
                body[0] = ["@nest@"]
            elif place == 3:
                body = ["@nest@"]
            envelope["body"] = in_base64(dumped(body).replace(b'"@nest@"', nest))
        else:
            self.replace_somewhere(envelope, "@nest@")
        return Message("nested", self.encode(envelope).replace(b'"@nest@"', nest))

    def large(self) -> Message:
        """A message with up to 4 MB in one field."""
        size = self.rng.choice([70_000, 300_000, 1_000_000, 4_000_000])
        value: Any = self.rng.choice(
            ["z" * size, [0] * (size // 3), [[]] * (size // 4), "\0" * size]
        )
        envelope, _ = self.grant()
        match self.rng.randrange(4):
            case 0:
                envelope["body"] = [[], {"user_id": self.user_id(), "interview_ids": value}, {}]
            case 1:
                envelope["body"] = [
                    [],
                    {"user_id": self.user_id(), "interview_ids": []},
                    {"chain": value},
                ]
            case _:
                self.replace_somewhere(envelope, value)
        return Message("large", self.encode(envelope))

    def large_job(self) -> Message:
        """A job of many unknown interview IDs."""
        count = self.rng.choice([1_000, 5_000, 30_000, 100_001])
        ids = [str(UUID(int=self.rng.getrandbits(128))) for _ in range(count)]
        body = [[], {"user_id": self.user_id(), "interview_ids": ids}, {}]
        return Message("large job", self.encode(self.envelope(GRANT, body)))

    # --- Fields ----------------------------------------------------------------------------------

    def odd_fields(self) -> Message:
        """An envelope with fields missing or of another type."""
        envelope, _ = self.grant()
        if self.rng.random() < 0.5:
            envelope["body"] = in_base64(dumped(envelope["body"]))
        for _ in range(self.rng.randint(1, 3)):
            where, key = self.rng.choice(places(envelope))
            if self.rng.random() < 0.3:
                del where[key]
            else:
                where[key] = deepcopy(self.rng.choice(ODD))
        return Message("odd fields", self.encode(envelope))

    def encodings(self) -> Message:
        """A message whose content type or encoding is not UTF-8 JSON."""
        envelope, _ = self.grant()
        body = dumped(envelope["body"])
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
        envelope["body"] = in_base64(body)
        return Message("encodings", self.encode(envelope))

    def bodies_of_no_text(self) -> Message:
        """A body that is not Base64, UTF-8 or JSON, or has another body encoding."""
        envelope, _ = self.grant()
        valid = dumped(envelope["body"])
        envelope["body"] = self.rng.choice(
            [
                *("", "!", "=", "====", "a", "\ud800", "\0", "é", "W10" * 1_000, valid.decode()),
                *(
                    in_base64(b"\xff\xfe\x00"),
                    in_base64(valid[:-1]),
                    in_base64(b"\xc0\x80"),
                    in_base64(b""),
                ),
                *(
                    in_base64(b"\xed\xa0\x80"),
                    in_base64(b"[[], {}, {}] x"),
                    in_base64(b"\xef\xbb\xbf" + valid),
                ),
                *(
                    in_base64(in_base64(valid).encode()),
                    in_base64(valid)[:-3],
                    f" {in_base64(valid)}\n",
                ),
            ]
        )
        if self.rng.random() < 0.3:
            envelope["properties"]["body_encoding"] = self.rng.choice([*ODD, "rot13", "BASE64"])
        return Message("bodies of no text", self.encode(envelope))

    def compressed(self) -> Message:
        """A compressed body, whose header may name another compression."""
        envelope, _ = self.grant()
        name = self.rng.choice(list(_COMPRESSIONS))
        body = _COMPRESSIONS[self.rng.choice([name, name, *_COMPRESSIONS])](
            dumped(envelope["body"])
        )
        if self.rng.random() < 0.3:
            body = body[: self.rng.randrange(len(body))]
        envelope["headers"]["compression"] = (
            name if self.rng.random() < 0.9 else self.rng.choice(ODD)
        )
        envelope["body"] = in_base64(body)
        return Message("compressed", self.encode(envelope))

    def bomb(self) -> Message:
        """A compressed body of a few kilobytes that expands to 100 MB."""
        name, body = self.rng.choice(_bombs())
        envelope, _ = self.grant()
        envelope["headers"]["compression"] = name
        envelope["body"] = body
        return Message("bomb", self.encode(envelope))

    def task_names(self) -> Message:
        """A task that is not in the contract."""
        envelope, _ = self.grant()
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
        return Message("task names", self.encode(envelope))

    def job_ids(self) -> Message:
        """An invalid job ID, or one of the maximum length."""
        envelope, _ = self.grant()
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
        return Message("job IDs", self.encode(envelope))

    # --- Celery's own features -------------------------------------------------------------------

    def celery_options(self) -> Message:
        """Options of Celery's protocol with values of any kind."""
        envelope, _ = self.grant()
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
        raw = self.encode(envelope)
        return Message("Celery options", raw, delayed=_is_far(envelope["headers"].get("eta")))

    def expired(self) -> Message:
        """An expired job."""
        envelope, _ = self.grant()
        past = datetime.now(UTC) - timedelta(seconds=self.rng.choice([0.001, 1, 10**6]))
        envelope["headers"]["expires"] = past.isoformat()
        return Message("expired", self.encode(envelope))

    def delayed(self) -> Message:
        """A job with an ETA in the far future."""
        envelope, _ = self.grant()
        due = datetime.now(UTC) + timedelta(days=self.rng.choice([1, 400, 300_000]))
        envelope["headers"]["eta"] = due.isoformat()
        return Message("delayed", self.encode(envelope), delayed=True)

    def linked(self) -> Message:
        """A job with callbacks, error callbacks, a chain or a chord, of any shape."""
        envelope, _ = self.grant()
        embedded = envelope["body"][2]
        for name in self.rng.sample(["callbacks", "errbacks", "chain", "chord"], 2):
            embedded[name] = self.rng.choice(ODD_LINKS)
            if self.rng.random() < 0.5:
                embedded[name] = [self.signature() for _ in range(self.rng.randint(1, 2))]
                if name == "chord":
                    embedded[name] = embedded[name][0]
        if self.rng.random() < 0.3:
            envelope["body"][1]["interview_ids"] = ["no UUID"]
        if embedded.get("chord") and self.rng.random() < 0.5:
            envelope["headers"]["group"] = str(uuid4())
        return Message("linked", self.encode(envelope))

    def protocol_1(self) -> Message:
        """A message of Celery's protocol 1, whose body names the task."""
        kwargs = {"user_id": self.user_id(), "interview_ids": self.interview_ids()}
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
        envelope = self.envelope(GRANT, body)
        envelope["headers"] = self.rng.choice([{}, {}, None, {"lang": "py"}])
        if self.rng.random() < 0.2:
            del envelope["headers"]
        return Message("protocol 1", self.encode(envelope))

    def kombu_objects(self) -> Message:
        """A job with kombu's JSON objects for values of other types."""
        kind, value = self.rng.choice(
            [
                *(("uuid", {"hex": uuid4().hex}), ("uuid", str(uuid4())), ("decimal", "9" * 9_000)),
                *(("datetime", "2026-01-01"), ("datetime", 5), ("date", ""), ("time", "25:00")),
                *(("bytes", "eHg="), ("base64", "eHg="), ("base64", 5), ("keyed", {}), ("x", None)),
                ("decimal", "1e999999999"),
            ]
        )
        envelope, _ = self.grant()
        stand_in = {"__type__": kind, "__value__": value}
        if self.rng.random() < 0.5:
            envelope["body"][1][self.rng.choice(["user_id", "interview_ids"])] = stand_in
        else:
            self.replace_somewhere(envelope, stand_in)
        return Message("kombu objects", self.encode(envelope))

    def _keep(self, message: Message) -> Message:
        self._valid.append(message)
        return message

    def _job(self, kind: str) -> Message:
        envelope, created = self.grant()
        return Message(kind, self.encode(envelope), created=created)


def _is_far(eta: object) -> bool:
    """Whether an ETA is in the future, so that the message may be delayed beyond the run."""
    try:
        due = datetime.fromisoformat(str(eta))
        due = due if due.tzinfo else due.replace(tzinfo=UTC)
        return (due - datetime.now(UTC)).total_seconds() > 0
    except (ValueError, OverflowError):
        return False


@lru_cache
def _bombs() -> list[tuple[str, str]]:
    """Return compression names, each with a compressed body of 100 MB."""
    zeros = bytes(100_000_000)
    return [
        ("application/x-gzip", in_base64(zlib.compress(zeros))),
        ("application/x-bz2", in_base64(bz2.compress(zeros))),
        ("application/x-lzma", in_base64(lzma.compress(zeros, preset=0))),
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
"""The kinds of messages, each with its weight and its generator."""
