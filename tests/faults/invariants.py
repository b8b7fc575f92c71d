"""The invariants of a site, verified from outside: in Redis, the ledger and the grants.

Every job that was sent has one final result, which is that of its ledger row, or its message is a
dead letter. The results' created counts add up to the number of grants, and each job is named by as
many grants as it counted. Redis holds no message that is neither settled nor a dead letter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from typing import Any

from redis import Redis
from sqlalchemy import text

from tests.support.database import connected
from tests.support.stores import PATIENCE_SECONDS, until
from tests.support.workers import QUEUE, Site

PREFIX = f"{QUEUE}:"
QUEUES = [QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in (3, 6, 9))]
"""The queue's lists, one for each priority."""
ISOLATED = f"{PREFIX}isolated"
"""The list of poison candidates."""

FINAL = {"SUCCESS", "FAILURE"}
RENEWAL_SECONDS = 1.5
"""More than the interval at which a worker session renews the longest lease of a test."""

_COUNT_UNSETTLED = """
local messages = 0
for index = 2, #ARGV do messages = messages + redis.call('LLEN', ARGV[index]) end
for _, claims in ipairs(redis.call('KEYS', 'interview-access:held:*')) do
    messages = messages + redis.call('HLEN', claims)
end
if ARGV[1] == '' then return messages + redis.call('HLEN', 'interview-access:deferred') end
local until_ms = (redis.call('TIME')[1] + ARGV[1]) * 1000
return messages + redis.call('ZCOUNT', 'interview-access:due', '-inf', until_ms)
"""


def count_unsettled(here: Site, due_within: int | None = None) -> int:
    """Count the messages that are neither settled nor dead letters, in one atomic read.

    Args:
        here: The site.
        due_within: Seconds; count a delayed message only if it is due within them.
    """
    count: Any = here.redis.eval(
        _COUNT_UNSETTLED, 0, "" if due_within is None else due_within, *QUEUES, ISOLATED
    )
    return int(count)


def all_settled(here: Site) -> bool:
    """Whether Redis holds no message except dead letters."""
    return count_unsettled(here) == 0


def session_keys(here: Site) -> list[str]:
    """Return the keys of all worker sessions that have claimed deliveries."""
    return [key.decode() for key in here.redis.scan_iter(f"{PREFIX}held:*", count=1_000)]


def heartbeats(here: Site) -> dict[str, float]:
    """Return the last heartbeat of each worker session: a counter, or a deadline in ms."""
    redis: Any = here.redis
    match redis.type(f"{PREFIX}leases"):
        case b"zset":
            pairs = redis.zrange(f"{PREFIX}leases", 0, -1, withscores=True)
        case b"hash":
            pairs = redis.hgetall(f"{PREFIX}leases").items()
        case _:
            pairs = ()
    return {session.decode(): float(value) for session, value in pairs}


def live_sessions(here: Site) -> set[str]:
    """Return the worker sessions that renew their leases; takes RENEWAL_SECONDS."""
    before = heartbeats(here)
    time.sleep(RENEWAL_SECONDS)  # the interval itself: a missing heartbeat gives no signal
    return {one for one, value in heartbeats(here).items() if before.get(one) != value}


def locate_messages(here: Site) -> list[tuple[str, str]]:
    """Locate all messages except dead letters.

    Returns:
        For each message its job ID (or its first bytes, if it has none) and its place.
    """
    redis: Any = here.redis
    live = live_sessions(here)
    now = redis.time()[0]
    places: list[tuple[str, bytes]] = []
    for key in [*QUEUES, ISOLATED]:
        places += [(key, value) for value in redis.lrange(key, 0, -1)]
    for key in session_keys(here):
        state = "live" if key.rpartition(":")[2] in live else "dead"
        places += [(f"{key} of a {state} session", value) for value in redis.hvals(key)]
    for name, value in redis.hgetall(f"{PREFIX}deferred").items():
        due = float(redis.zscore(f"{PREFIX}due", name) or 0) / 1000 - now
        places.append((f"{PREFIX}deferred, due in {due:.0f} s", value))
    return [(_job_id(value), place) for place, value in places]


def claimed_job_ids(here: Site) -> set[str]:
    """Return the job IDs of the messages that worker sessions have claimed."""
    redis: Any = here.redis
    return {_job_id(value) for key in session_keys(here) for value in redis.hvals(key)}


def _job_id(stored: bytes) -> str:
    """Return the job ID in a message as Redis stores it, or its first bytes if it has none."""
    message = stored.rpartition(b"\0")[2]
    try:
        return str(json.loads(message)["headers"]["id"])[:255]
    except (ValueError, KeyError, TypeError, RecursionError):
        return repr(message[:100])


def final_results(results: Redis, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the stored result of each job that has a final one, by job ID."""
    stored: Any = results.mget([f"celery-task-meta-{one}" for one in job_ids])
    metas = {one: json.loads(meta or "{}") for one, meta in zip(job_ids, stored, strict=True)}
    return {one: meta for one, meta in metas.items() if meta.get("status") in FINAL}


def unfinished(here: Site, sent: Collection[str], *, results: Redis | None = None) -> set[str]:
    """Return the jobs that have neither a final result nor a dead letter."""
    left = set(sent) - final_results(results or here.redis, list(sent)).keys()
    return left - _dead_lettered(here) if left else left


def _dead_lettered(here: Site) -> set[str]:
    redis: Any = here.redis
    return {fields[b"job_id"].decode() for _, fields in redis.xrange(f"{PREFIX}dead")}


def verified_results(
    here: Site,
    sent: Collection[str],
    *,
    within: float = PATIENCE_SECONDS,
    results: Redis | None = None,
) -> dict[str, dict[str, Any]]:
    """Wait until all messages are settled, verify the invariants and return the results.

    Args:
        here: The site.
        sent: The IDs of the jobs that were sent.
        within: Seconds to wait.
        results: The results' server, if it is not the queue's.

    Returns:
        The jobs' results, by job ID.

    Raises:
        AssertionError: if an invariant is violated.
    """
    until(lambda: all_settled(here), within=within)
    dead_lettered = _dead_lettered(here)
    with connected(here.store.database_url) as database:
        ledger = {row.job_id: row for row in database.execute(text("TABLE grant_access_job"))}
        grants = database.execute(
            text(
                "SELECT created_by_job AS job_id, count(*) AS number"
                " FROM interview_userinterviewaccess GROUP BY created_by_job"
            )
        )
        rows = {job.job_id: job.number for job in grants}
    polled: dict[str, dict[str, Any]] = {}
    for job_id in sent:
        stored: Any = (results or here.redis).get(f"celery-task-meta-{job_id}")
        meta, row = json.loads(stored or '{"status": "PENDING", "result": {}}'), ledger.get(job_id)
        if row is None:
            assert job_id in dead_lettered, f"{job_id} is lost: {meta}"
        elif row.state == "succeeded":
            assert (meta["status"], meta["result"]) == ("SUCCESS", row.result), (job_id, meta, row)
        else:
            assert meta["status"] == "FAILURE", (job_id, meta, row)
            assert meta["result"]["exc_message"][0] == row.error["sentence"], (job_id, meta, row)
        polled[job_id] = meta["result"]
    counted = {job_id: row.created for job_id, row in ledger.items() if row.created}
    assert counted == rows, f"{sum(counted.values())} counted, {sum(rows.values())} rows"
    left = {key.decode() for key in here.redis.scan_iter("interview-access:started:*")}
    assert not left, left
    assert not here.redis.exists("unacked", "unacked_index")
    return polled


def leftover_keys(here: Site) -> dict[str, Any]:
    """Return the protocol's keys of unsettled messages and of counts, with their types."""
    redis = here.redis
    keys = [*QUEUES, ISOLATED]
    keys += [f"{PREFIX}{name}" for name in ("deferred", "due", "tries", "deferrals")]
    for pattern in ("unacked*", f"{PREFIX}held:*", f"{PREFIX}started:*"):
        keys += [key.decode() for key in redis.scan_iter(pattern)]
    return {key: redis.type(key) for key in keys if redis.exists(key)}
