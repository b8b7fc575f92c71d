"""Send generated messages to workers and verify that each one has a result or a dead letter.

    python -m tests.faults.fuzzing --messages 2000 --seed 1 [--only KIND] [--without KIND]

The verification reads Redis, the ledger, and the workers' processes and logs.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha1
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from sqlalchemy import text

from devstack.servers import LocalStack
from devstack.service import Service
from storage.schema import migrate
from tests.faults.invariants import PREFIX, QUEUES, count_unsettled, session_keys
from tests.support.database import connected
from tests.support.fuzz.generator import KINDS, Fuzz
from tests.support.fuzz.message import Message, is_job_id
from tests.support.fuzz.values import ELSEWHERE
from tests.support.stores import until
from tests.support.workers import Site, site, worker

INTERVIEWS = [str(UUID(int=(0xF << 124) + number)) for number in range(12)]
SETTINGS = {"GRANT_ATTEMPT_LIMIT": 2, "GRANT_RETRY_LIMIT": 1, "GRANT_RETRY_MAX_DELAY": 1}

WAVE = 250
WAVE_SECONDS = 40.0
"""For the messages of a wave; ten of them may each end a pool process twice."""
WARM_UP_WAVES = 2
PEAK_MB, GROWTH_MB = 300, 60
LINE_BYTES = 20_000
"""Maximum length of a log line: a traceback may quote an error in full, never a message."""

_CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")
_KEY_BYTES = 1_100  # of a result's name, with a job ID of 255 characters of four bytes each


@dataclass
class Seen:
    """Final results, ledger rows and dead letters of the messages of a wave."""

    results: dict[str, dict[str, Any]]
    ledger: dict[str, Any]
    letters: dict[bytes, list[dict[str, str]]]


@dataclass
class Run:
    """One fuzzing run against running workers.

    Attributes:
        here: The site; nothing else uses its Redis database.
        workers: The workers.
        seed: Repeats the run.
        kinds: Kinds of messages to send; all if empty.
    """

    here: Site
    workers: Sequence[Service]
    seed: int
    kinds: Sequence[str] = ()
    sent: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Add the interviews."""
        self.here.store.add_interviews_with_ids(INTERVIEWS)
        self._trap = Path(tempfile.gettempdir()) / f"fuzz-trap-{id(self)}"
        self._pids = [service.pid for service in self.workers]
        self._read: dict[Path, int] = {service.log: 0 for service in self.workers}
        self._warm: list[int] = []

    def run(self, count: int, report: Callable[[str], None] = lambda _: None) -> None:
        """Send the messages in waves and verify each wave.

        Raises:
            AssertionError: if a message or a worker violates an expectation; lists all problems.
        """
        fuzz = Fuzz(self.seed, INTERVIEWS, str(self._trap))
        number = 0
        while self.sent.total() < count:
            wave = fuzz.wave(min(WAVE, count - self.sent.total()), self.kinds)
            self.sent.update(message.kind for message in wave)
            self._send(wave)
            self._verify(wave)
            number += 1
            if number == WARM_UP_WAVES:
                self._warm = self._rss()
            report(f"{self.sent.total()} messages; {self._rss()} MB, peak {self._peaks()} MB")
        growth = [now - then for now, then in zip(self._rss(), self._warm, strict=False)]
        if any(one > GROWTH_MB for one in growth):
            self.problems.append(f"main processes grew by {growth} MB")
        self._raise_problems()

    def _send(self, wave: Sequence[Message]) -> None:
        pipeline = self.here.redis.pipeline(transaction=False)
        for message in wave:
            pipeline.lpush(message.queue, message.raw)
        pipeline.execute()

    def _verify(self, wave: Sequence[Message]) -> None:
        try:
            until(lambda: self._done() or not self._alive(), within=WAVE_SECONDS)
        except AssertionError:
            self.problems.append(f"not done within {WAVE_SECONDS:.0f} s: {self._unfinished(wave)}")
        self._verify_workers()
        self._raise_problems()
        seen = self._seen(wave)
        self.problems += [problem for one in wave for problem in self._problems(one, seen)]
        self._verify_letters(wave, seen)
        self._verify_places(wave)
        self._verify_logs()
        if self._trap.exists():
            self._trap.rmdir()
            self.problems.append("code of a message was executed")
        self._clear()
        self._raise_problems()

    # --- Each message ----------------------------------------------------------------------------

    def _problems(self, message: Message, seen: Seen) -> list[str]:
        job_id = message.claimed_id or ""
        result, row = seen.results.get(job_id), seen.ledger.get(job_id)
        letters = seen.letters[_digest(message.raw)]
        # The ledger can hold no job under an invalid ID.
        may_lack_row = bool(letters) or not is_job_id(job_id)
        problems = _mismatches(result, row, may_lack_row=may_lack_row)
        if not message.is_text and not letters:
            problems.append("it is not UTF-8 and is not dead-lettered")
        if message.created is not None:
            problems += _failures_of_a_valid_job(message, result, row, letters)
        elif not (letters or message.delayed or row or result):
            problems.append("neither a result nor a dead letter")
        for letter in letters:
            if message.readable_id and letter["job_id"] != message.readable_id:
                problems.append(f"a dead letter with the job ID {letter['job_id'][:300]!r}")
            recorded = seen.ledger.get(letter["job_id"])  # of the ID that the worker could read
            if letter["in_ledger"] != str(int(recorded is not None)):
                flag = letter["in_ledger"]
                problems.append(f"in_ledger is {flag}, the ledger row is {recorded}")
        return [f"{message.kind}: {problem[:600]}: {_shown(message.raw)}" for problem in problems]

    def _verify_letters(self, wave: Sequence[Message], seen: Seen) -> None:
        """Verify that no message has more dead letters than copies."""
        sent = Counter(_digest(message.raw) for message in wave)
        for digest, count in sent.items():
            if len(seen.letters[digest]) > count:
                reasons = [letter["reason"][:200] for letter in seen.letters[digest]]
                self.problems.append(f"{len(reasons)} dead letters of {count} messages: {reasons}")

    def _seen(self, wave: Sequence[Message]) -> Seen:
        letters = self._letters()
        read = {letter["job_id"] for copies in letters.values() for letter in copies}
        claimed = {one.claimed_id for one in wave} | read
        job_ids = [one for one in claimed if one is not None and _is_storable(one)]
        stored: Any = self.here.redis.mget([f"celery-task-meta-{one}" for one in job_ids] or ["x"])
        metas = {one: json.loads(meta or "{}") for one, meta in zip(job_ids, stored, strict=False)}
        with connected(self.here.store.database_url) as database:
            rows = database.execute(
                text("SELECT * FROM grant_access_job WHERE job_id = ANY (CAST(:ids AS text[]))"),
                {"ids": [job_id for job_id in job_ids if "\0" not in job_id]},
            )
            ledger = {row.job_id: row for row in rows}
        final = {"SUCCESS", "FAILURE"}
        results = {one: meta for one, meta in metas.items() if meta.get("status") in final}
        return Seen(results, ledger, letters)

    def _letters(self) -> dict[bytes, list[dict[str, str]]]:
        letters: dict[bytes, list[dict[str, str]]] = defaultdict(list)
        entries: Any = self.here.redis.xrange(f"{PREFIX}dead")
        for _, fields in entries:
            raw = fields.pop(b"message")
            letter = {key.decode(): value.decode() for key, value in fields.items()}
            letters[_digest(raw)].append(letter)
        return letters

    def _done(self) -> bool:
        """Whether all messages are settled, except those that are due later."""
        return count_unsettled(self.here, due_within=60) == 0

    def _unfinished(self, wave: Sequence[Message]) -> str:
        """Describe the messages that are neither settled nor delayed, with their places."""
        places: dict[bytes, str] = {}
        redis: Any = self.here.redis
        for queue in [*QUEUES, f"{PREFIX}isolated"]:
            places |= {
                _digest(raw.rpartition(b"\0")[2]): queue for raw in redis.lrange(queue, 0, -1)
            }
        for key in [f"{PREFIX}deferred", *session_keys(self.here)]:
            for value in redis.hvals(key):
                places[_digest(value.partition(b"\0")[2])] = key
        found = [
            f"{one.kind} in {places[_digest(one.raw)]}: {_shown(one.raw)}"
            for one in wave
            if _digest(one.raw) in places and not one.delayed
        ]
        return f"{len(found)} messages\n    " + "\n    ".join(found[:15])

    # --- The workers -----------------------------------------------------------------------------

    def _alive(self) -> bool:
        return all(service.alive for service in self.workers)

    def _verify_workers(self) -> None:
        for service, pid in zip(self.workers, self._pids, strict=True):
            if not service.alive or service.pid != pid:
                self.problems.append(f"a worker ended: {service.log_tail()[-3_000:]}")
        if any(peak > PEAK_MB for peak in self._peaks()):
            self.problems.append(f"main processes had a peak of {self._peaks()} MB")

    def _rss(self) -> list[int]:
        return [_status(pid, "VmRSS") for pid in self._pids]

    def _peaks(self) -> list[int]:
        return [_status(pid, "VmHWM") for pid in self._pids]

    def _verify_logs(self) -> None:
        """Verify that no message's text controls a terminal, forges a line or fills the disk."""
        for log, offset in self._read.items():
            with log.open("rb") as file:
                file.seek(offset)
                new = file.read()
            self._read[log] = offset + len(new)
            if found := _CONTROL.search(new):
                around = new[max(found.start() - 100, 0) : found.end() + 50]
                self.problems.append(f"a control character in the log: {around!r}")
            if b"\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] FORGED" in new:
                self.problems.append("a forged line in the log")
            longest = max(new.splitlines(), key=len, default=b"")
            if len(longest) > LINE_BYTES:
                self.problems.append(f"a log line of {len(longest)} bytes: {longest[:200]!r}")

    # --- Redis -----------------------------------------------------------------------------------

    def _verify_places(self, wave: Sequence[Message]) -> None:
        redis: Any = self.here.redis
        waiting = {value.partition(b"\0")[2] for value in redis.hvals(f"{PREFIX}deferred")}
        unexpected = waiting - {message.raw for message in wave if message.delayed}
        self.problems += [f"is still delayed: {_shown(raw)}" for raw in unexpected]
        for message in wave:
            if message.kind == "delayed" and message.raw not in waiting:
                known = self._letters()[_digest(message.raw)]
                if not known:
                    self.problems.append(f"a delayed job is gone: {_shown(message.raw)}")
        long = [key for key in redis.scan_iter(count=10_000) if len(key) > _KEY_BYTES]
        self.problems += [f"a key of {len(key)} bytes: {key[:100]!r}" for key in long]
        attempts = redis.hlen(f"{PREFIX}tries")
        if attempts:
            self.problems.append(f"{attempts} counts of attempts are left behind")

    def _clear(self) -> None:
        """Delete what is verified, so that a long run needs little memory."""
        keys = [f"{PREFIX}{name}" for name in ("dead", "deferred", "due", "deferrals")]
        self.here.redis.delete(ELSEWHERE, *keys)

    def _raise_problems(self) -> None:
        kinds = Counter(problem.partition(":")[0] for problem in self.problems)
        listed = "\n".join(f"  {problem}" for problem in self.problems[:20])
        assert not self.problems, f"seed {self.seed}: {dict(kinds)}\n{listed}"


def _mismatches(result: dict[str, Any] | None, row: Any, *, may_lack_row: bool) -> list[str]:
    """Compare a poller's result with the ledger; a failure may belong to a dead letter instead."""
    match result and result["status"]:
        case "SUCCESS" if row is None or row.result != (result or {})["result"]:
            pass
        case "FAILURE" if (row is None and not may_lack_row) or (row and row.state == "succeeded"):
            pass
        case _:
            return []
    return [f"a poller reads {result}, the ledger has {row and (row.result or row.error)}"]


def _failures_of_a_valid_job(
    message: Message, result: dict[str, Any] | None, row: Any, letters: Sequence[dict[str, str]]
) -> list[str]:
    expected = {"success": True, "created_access_count": message.created}
    problems = [
        f"a valid job is dead-lettered: {letter['reason']}"
        for letter in letters
        if not letter["reason"].startswith("Its callbacks cannot be sent")
    ]
    if row is None or row.result != expected:
        problems.append(f"expected {expected}, the ledger has {row and (row.result or row.error)}")
    is_ignored = b'"ignore_result": true' in message.raw
    if not is_ignored and (not result or result["status"] != "SUCCESS"):
        problems.append(f"expected SUCCESS, a poller reads {result}")
    return problems


def _digest(raw: bytes) -> bytes:
    return sha1(raw, usedforsecurity=False).digest()


def _shown(raw: bytes) -> str:
    return repr(raw if len(raw) <= 1_000 else raw[:700] + b" ... " + raw[-200:])


def _is_storable(job_id: str) -> bool:
    """Whether a result may be stored under the ID: it can be encoded, and is not megabytes long."""
    try:
        return len(job_id.encode()) < _KEY_BYTES
    except UnicodeEncodeError:
        return False


def _status(pid: int, name: str) -> int:
    """Return a figure of a process's memory in MB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(one.split()[1]) // 1024 for one in lines if one.startswith(f"{name}:")), 0)


@click.command()
@click.option("--seed", default=1, show_default=True, help="Repeats a run.")
@click.option("--messages", default=200_000, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(KINDS)), help="Only these kinds.")
@click.option("--without", multiple=True, type=click.Choice(list(KINDS)), help="Not these kinds.")
def main(
    *, seed: int, messages: int, workers: int, only: Sequence[str], without: Sequence[str]
) -> None:
    """Send generated messages to real workers and verify the result of each."""
    kinds = [kind for kind in only or KINDS if kind not in without]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
        servers = stack.enter_context(LocalStack(folder / "servers", durable=False))
        migrate(servers.database_url, report=lambda _: None)
        here = stack.enter_context(site(servers, servers.database_url, 0))
        services = [
            stack.enter_context(worker(here, folder / f"worker-{number}.log", **SETTINGS))
            for number in range(workers)
        ]
        Run(here, services, seed, kinds).run(messages, report=click.echo)
        click.echo("every message is accounted for")


if __name__ == "__main__":
    main()
