"""The books of a site: what was sent, what was answered and what stands, looked at from outside.

They balance when every job that was sent has one final result and that is its ledger's (or its
message is a dead letter), when the results' counts add up to the grants that stand, and when
nothing is left in Redis of a message on its way.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
from redis import Redis
from sqlalchemy import text

from devstack.service import Service
from tests.support.database import connected
from tests.support.stores import PATIENCE_SECONDS, until
from tests.support.workers import QUEUE, Site, worker

PREFIX = f"{QUEUE}:"
QUEUES = [QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in (3, 6, 9))]
"""The queue's lists, one for each priority."""
ISOLATED = f"{PREFIX}isolated"
"""The list of poison candidates."""

INTERVIEWS = [str(UUID(int=(0xB << 124) + number)) for number in range(12)]
FINAL = {"SUCCESS", "FAILURE"}
RENEWAL_SECONDS = 1.5
"""More than the interval at which a worker session renews the longest lease of a test."""

_BRAKE = """
CREATE TABLE brake ();
INSERT INTO brake DEFAULT VALUES;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    WHILE EXISTS (SELECT FROM brake) LOOP PERFORM pg_sleep(0.02); END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER slow BEFORE INSERT ON interview_userinterviewaccess
    FOR EACH ROW WHEN (NEW.user_id LIKE 'slow%') EXECUTE FUNCTION slow()
"""


_PLACES = """
local messages = 0
for index = 2, #ARGV do messages = messages + redis.call('LLEN', ARGV[index]) end
for _, held in ipairs(redis.call('KEYS', 'interview-access:held:*')) do
    messages = messages + redis.call('HLEN', held)
end
if ARGV[1] == '' then return messages + redis.call('HLEN', 'interview-access:deferred') end
local until_ms = (redis.call('TIME')[1] + ARGV[1]) * 1000
return messages + redis.call('ZCOUNT', 'interview-access:due', '-inf', until_ms)
"""


def messages_on_their_way(here: Site, due_within: int | None = None) -> int:
    """Count the messages that are neither settled nor dead letters, at one moment.

    Args:
        here: The site.
        due_within: Of the delayed messages only those that are due within so many seconds.
    """
    count: Any = here.redis.eval(
        _PLACES, 0, "" if due_within is None else due_within, *QUEUES, ISOLATED
    )
    return int(count)


def at_rest(here: Site) -> bool:
    """Whether no message is anywhere but among the dead letters."""
    return messages_on_their_way(here) == 0


def session_keys(here: Site) -> list[str]:
    """The keys of all worker sessions that have claimed deliveries."""
    return [key.decode() for key in here.redis.scan_iter(f"{PREFIX}held:*", count=1_000)]


def heartbeats(here: Site) -> dict[str, float]:
    """What each worker session wrote last when it renewed its lease."""
    redis: Any = here.redis
    match redis.type(f"{PREFIX}leases"):
        case b"zset":
            pairs = redis.zrange(f"{PREFIX}leases", 0, -1, withscores=True)
        case b"hash":
            pairs = redis.hgetall(f"{PREFIX}leases").items()
        case _:
            pairs = ()
    return {session.decode(): float(value) for session, value in pairs}


def living_sessions(here: Site) -> set[str]:
    """The worker sessions that renew their leases while we look."""
    before = heartbeats(here)
    time.sleep(RENEWAL_SECONDS)  # that a session does not renew can only be seen over a time
    return {one for one, value in heartbeats(here).items() if before.get(one) != value}


def whereabouts(here: Site) -> list[tuple[str, str]]:
    """All messages in Redis but the dead letters: the job ID, or the start, and the place."""
    redis: Any = here.redis
    living = living_sessions(here)
    now = redis.time()[0]
    places: list[tuple[str, bytes]] = []
    for key in [*QUEUES, ISOLATED]:
        places += [(key, value) for value in redis.lrange(key, 0, -1)]
    for key in session_keys(here):
        state = "living" if key.rpartition(":")[2] in living else "dead"
        places += [(f"{key} of a {state} session", value) for value in redis.hvals(key)]
    for name, value in redis.hgetall(f"{PREFIX}deferred").items():
        due = float(redis.zscore(f"{PREFIX}due", name) or 0) / 1000 - now
        places.append((f"{PREFIX}deferred, due in {due:.0f} s", value))
    return [(_named(value.rpartition(b"\0")[2]), place) for place, value in places]


def _named(message: bytes) -> str:
    try:
        return str(json.loads(message)["headers"]["id"])[:255]
    except (ValueError, KeyError, TypeError, RecursionError):
        return repr(message[:100])


def unfinished(here: Site, sent: Collection[str], *, results: Redis | None = None) -> set[str]:
    """The jobs that have neither a final result nor a dead letter."""
    job_ids = list(sent)
    stored: Any = (results or here.redis).mget([f"celery-task-meta-{one}" for one in job_ids])
    states = [json.loads(meta or "{}").get("status") for meta in stored]
    left = {one for one, state in zip(job_ids, states, strict=True) if state not in FINAL}
    if not left:
        return left
    redis: Any = here.redis
    letters = {fields[b"job_id"].decode() for _, fields in redis.xrange(f"{PREFIX}dead")}
    return left - letters


def balance(
    here: Site,
    sent: Collection[str],
    *,
    within: float = PATIENCE_SECONDS,
    results: Redis | None = None,
) -> dict[str, dict[str, Any]]:
    """Wait until nothing goes on, and hold every job's result against its row of the ledger.

    Every job sent is finished, or among the dead letters; every result is its ledger row's; the
    sum of the created counts is the number of rows; and nothing of the protocol is left over.

    Args:
        here: The site.
        sent: The ids of its jobs.
        within: Seconds.
        results: Where the results are, if not beside the queue.

    Returns:
        The results, by job id.
    """
    until(lambda: at_rest(here), within=within)
    redis: Any = here.redis
    letters = {fields[b"job_id"].decode() for _, fields in redis.xrange(f"{PREFIX}dead")}
    with connected(here.store.database_url) as database:
        ledger = {row.job_id: row for row in database.execute(text("TABLE grant_access_job"))}
        rows = database.execute(
            text("SELECT count(*) FROM interview_userinterviewaccess")
        ).scalar_one()
    told: dict[str, dict[str, Any]] = {}
    for job_id in sent:
        stored: Any = (results or here.redis).get(f"celery-task-meta-{job_id}")
        meta, row = json.loads(stored or '{"status": "PENDING", "result": {}}'), ledger.get(job_id)
        if row is None:
            assert job_id in letters, f"{job_id} is lost: {meta}"
        elif row.state == "succeeded":
            assert (meta["status"], meta["result"]) == ("SUCCESS", row.result), (job_id, meta, row)
        else:
            assert meta["status"] == "FAILURE", (job_id, meta, row)
            assert meta["result"]["exc_message"][0] == row.error["sentence"], (job_id, meta, row)
        told[job_id] = meta["result"]
    counted = sum(row.created or 0 for row in ledger.values())
    assert counted == rows, f"{counted} counted, {rows} rows"
    left = {key.decode() for key in here.redis.scan_iter("interview-access:started:*")}
    assert not left, left
    assert not here.redis.exists("unacked", "unacked_index")
    return told


class Books:
    """What a site was asked to do, and what became of it."""

    def __init__(self, here: Site) -> None:
        """Adds interviews to the site's database, and a brake for slow users' jobs."""
        self.here = here
        self.results = here.redis
        self.sent: list[str] = []
        here.store.execute(
            "INSERT INTO interview_interview (id, title, duration) SELECT CAST(id AS uuid),"
            " 'Interview', interval '1 hour' FROM unnest(CAST(:ids AS text[])) AS id",
            ids=INTERVIEWS,
        )
        here.store.execute(_BRAKE)

    def order(self, count: int) -> list[str]:
        """Send jobs of few users that ask for much the same, as retries of a platform do."""
        numbers = range(len(self.sent), len(self.sent) + count)
        sent = [self.here.send(f"user-{n % 7}", INTERVIEWS[n % 5 : n % 5 + 4]) for n in numbers]
        self.sent += sent
        return sent

    def order_slow(self, count: int = 1) -> list[str]:
        """Send jobs that go on until the brake is released; come back when they do."""
        sent = [
            self.here.send(f"slow-{number}", INTERVIEWS)
            for number in range(len(self.sent), len(self.sent) + count)
        ]
        self.sent += sent
        until(lambda: self.braked() == count)
        return sent

    def release(self) -> None:
        """Let slow jobs come to their end."""
        self.execute("DELETE FROM brake")

    def brake(self) -> None:
        """Hold slow jobs again."""
        self.execute("DELETE FROM brake")
        self.execute("INSERT INTO brake DEFAULT VALUES")

    def braked(self) -> int:
        """Count the transactions that the brake holds."""
        return int(self.value(_BRAKED))

    def execute(self, statement: str) -> None:
        """Run one statement, on a connection of its own: the last one may have been cut."""
        with connected(self.here.store.database_url, autocommit=True) as connection:
            connection.execute(text(statement))

    def value(self, statement: str) -> Any:
        """The one value that a query gives, likewise."""
        with connected(self.here.store.database_url, autocommit=True) as connection:
            return connection.execute(text(statement)).scalar_one()

    def waiting(self) -> int:
        """How many messages stand on the queue."""
        count: Any = self.here.redis.llen(QUEUE)
        return int(count)

    def leases(self) -> set[str]:
        """The worker sessions that renew their leases."""
        return living_sessions(self.here)

    def answers(self) -> dict[str, dict[str, Any]]:
        """The final results of the jobs that were sent."""
        stored: Any = self.results.mget([f"celery-task-meta-{job_id}" for job_id in self.sent])
        metas = {
            job_id: json.loads(meta or "{}") for job_id, meta in zip(self.sent, stored, strict=True)
        }
        return {job_id: meta for job_id, meta in metas.items() if meta.get("status") in FINAL}

    def answered(self) -> int:
        """How many of the jobs that were sent have a final result."""
        return len(self.answers())

    def until_balanced(self) -> None:
        """Come back when all is done, and hold it to the promise."""
        until(lambda: self.answered() == len(self.sent), within=2 * PATIENCE_SECONDS)
        balance(self.here, self.sent, results=self.results)
        until(lambda: not self.on_their_way())

    def on_their_way(self) -> dict[str, Any]:
        """What Redis holds of messages that are neither done nor dead letters."""
        redis = self.here.redis
        keys = [*QUEUES, ISOLATED]
        keys += [f"{PREFIX}{name}" for name in ("deferred", "due", "tries", "deferrals")]
        for pattern in ("unacked*", f"{PREFIX}held:*", f"{PREFIX}started:*"):
            keys += [key.decode() for key in redis.scan_iter(pattern)]
        return {key: redis.type(key) for key in keys if redis.exists(key)}


_BRAKED = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND state = 'active' AND wait_event = 'PgSleep'"
)


class Watch:
    """What a worker says, and how much it works, from some moment on."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._pid = service.pid
        self.restart()

    def restart(self) -> None:
        """From now on."""
        self._from = self._service.log.stat().st_size
        self._began = time.monotonic()
        self._cpu = self._cpu_seconds()

    def said(self) -> str:
        """What it has logged since."""
        with self._service.log.open("rb") as log:
            log.seek(self._from)
            return log.read().decode()

    def assert_calm(self) -> None:
        """It neither fills the log nor keeps a processor busy, and runs still."""
        seconds = time.monotonic() - self._began
        lines, cpu = len(self.said().splitlines()), self._cpu_seconds() - self._cpu
        assert lines < 10 * max(seconds, 1.0), f"{lines} lines in {seconds:.1f} s"
        assert cpu < 0.5 * seconds + 0.5, f"{cpu:.1f} s of CPU in {seconds:.1f} s"
        self.assert_runs()

    def assert_runs(self) -> None:
        """It is the process that it was."""
        assert self._service.alive, self._service.log_tail()
        assert self._service.pid == self._pid

    def starts_of(self, job_id: str) -> int:
        """How often it was given a job."""
        return self._service.log.read_text(encoding="utf-8").count(f"[{job_id}] received")

    def _cpu_seconds(self) -> float:
        main = psutil.Process(self._service.pid)
        total = 0.0
        for process in (main, *main.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += float(times.user + times.system)
        return total


def crash(server: Service, how: signal.Signals = signal.SIGKILL) -> None:
    """End a server as no operator would."""
    os.kill(server.pid, how)
    server.wait()


@contextmanager
def working(
    here: Site, folder: Path, *, workers: int = 1, **settings: Any
) -> Iterator[list[Watch]]:
    """Workers of the site that wait for nothing longer than a test can, each with its watch."""
    quick = {"GRANT_RETRY_LIMIT": 1_000, "GRANT_RETRY_MAX_DELAY": 1, "GRANT_STOP_GRACE": 1}
    with ExitStack() as services:
        yield [
            Watch(
                services.enter_context(
                    worker(here, folder / f"worker-{number}.log", **(quick | settings))
                )
            )
            for number in range(workers)
        ]
