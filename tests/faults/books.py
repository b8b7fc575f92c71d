"""The books, kept from outside: what was sent against what stands in both servers at the end."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import text

from tests.database import connected
from tests.stores import PATIENCE_SECONDS, until
from tests.workers import QUEUE, Site

_PLACES = """
local messages = 0
for _, queue in ipairs(ARGV) do messages = messages + redis.call('LLEN', queue) end
for _, held in ipairs(redis.call('KEYS', 'interview-access:held:*')) do
    messages = messages + redis.call('HLEN', held)
end
return messages + redis.call('HLEN', 'interview-access:deferred')
"""


def at_rest(here: Site) -> bool:
    """Whether no message is anywhere but among the dead letters, seen at one moment."""
    queues = [QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in (3, 6, 9))]
    return bool(here.redis.eval(_PLACES, 0, *queues) == 0)


def balance(
    here: Site, sent: Collection[str], *, within: float = PATIENCE_SECONDS
) -> dict[str, dict[str, Any]]:
    """Wait until nothing goes on, and hold every job's result against its row of the ledger.

    Every job sent is finished, or among the dead letters; every result is its ledger row's; the
    sum of the created counts is the number of rows; and nothing of the protocol is left over.

    Returns:
        The results, by job id.
    """
    until(lambda: at_rest(here), within=within)
    letters = {letter["job_id"] for letter in here.dead_letters()}
    with connected(here.store.database_url) as database:
        ledger = {row.job_id: row for row in database.execute(text("TABLE grant_access_job"))}
        rows = database.execute(
            text("SELECT count(*) FROM interview_userinterviewaccess")
        ).scalar_one()
    results: dict[str, dict[str, Any]] = {}
    for job_id in sent:
        meta, row = here.meta(job_id), ledger.get(job_id)
        if row is None:
            assert job_id in letters, f"{job_id} is lost: {meta}"
        elif row.state == "succeeded":
            assert (meta["status"], meta["result"]) == ("SUCCESS", row.result), (job_id, meta, row)
        else:
            assert meta["status"] == "FAILURE", (job_id, meta, row)
            assert meta["result"]["exc_message"][0] == row.error["sentence"], (job_id, meta, row)
        results[job_id] = meta["result"]
    counted = sum(row.created or 0 for row in ledger.values())
    assert counted == rows, f"{counted} counted, {rows} rows"
    left = {key.decode() for key in here.redis.scan_iter("interview-access:started:*")}
    assert not left, left
    assert not here.redis.exists("unacked", "unacked_index")
    return results
