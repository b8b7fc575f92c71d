"""A random walk checks the queue's scripts against a model; mutated scripts check the walk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.broker.claims_walk import Walk
from tests.support.sessions import DATABASE

SEEDS = int(os.environ.get("CLAIMS_SEEDS", "8"))
STEPS = 300
BYTES_PER_SCRIPT = "local bytes_left = 4 * 1024 * 1024"
FETCHED_BYTES = "local fetched_bytes = 1024 * 1024"


class EditedRedis(Redis):
    """A client that edits each script before it registers it."""

    def __init__(self, edits: Mapping[str, str], **options: Any) -> None:
        super().__init__(**options)
        self._edits = edits
        self.edited: set[str] = set()
        self._scripts_run = 0

    def register_script(self, script: Any) -> Any:
        """Register the edited script."""
        for right, wrong in self._edits.items():
            if right in script:
                self.edited.add(right)
                script = script.replace(right, wrong)
        return super().register_script(script)

    def evalsha(self, *args: Any, **options: Any) -> Any:
        """Run a script, within a bound: a client might repeat a defective script for ever."""
        self._scripts_run += 1
        assert self._scripts_run < 100 * STEPS
        return super().evalsha(*args, **options)


def few_bytes(bytes_left: int) -> dict[str, str]:
    """Return the edit that limits how many bytes a script moves."""
    return {BYTES_PER_SCRIPT: f"local bytes_left = {bytes_left}"}


def all_fetched() -> dict[str, str]:
    """Return the edit that makes a claim's reply omit every message."""
    return {FETCHED_BYTES: "local fetched_bytes = 0"}


def walk(redis: Redis, path: str, seed: int, edits: Mapping[str, str]) -> None:
    """Run a walk on an empty database with edited scripts."""
    redis.flushdb()
    with EditedRedis(edits, unix_socket_path=path, db=DATABASE) as client:
        walk = Walk(redis, client, seed)
        if stale := edits.keys() - client.edited:
            pytest.fail(f"no script has {stale}")
        walk.go(STEPS)


@pytest.mark.parametrize(
    "edits", [few_bytes(10) | all_fetched(), few_bytes(4_000_000)], ids=["few bytes", "many bytes"]
)
@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_each_message_is_in_one_place(
    redis: Redis, path: str, seed: int, edits: Mapping[str, str]
) -> None:
    """No message is lost or duplicated by dead workers, lost replies and late commands."""
    walk(redis, path, seed, edits)


MUTATIONS = {
    # Shared by the scripts
    "a message put back is lost": ("redis.pcall('RPUSH', queue, message)", "redis.pcall('TIME')"),
    "an isolated message is lost": ("redis.call('LPUSH', isolated, value)", "redis.call('TIME')"),
    "a requeued message stays claimed": (
        "    put(value)\n    redis.call('HDEL', claims_of(session), tag)",
        "    put(value)",
    ),
    "a requeued message is dropped": (
        "    put(value)\n    redis.call('HDEL'",
        "    redis.call('HDEL'",
    ),
    "a delayed message is not kept": ("redis.call('HSET', delayed, name, value)", ""),
    "a delayed message has no time": ("redis.call('ZADD', due, now() + milliseconds, name)", ""),
    "a dead letter is not written": ("redis.call('XADD', prefix .. 'dead', '*'", "tostring('*'"),
    "a dead letter keeps its counts": (
        "'message', message)\n    forget(message)",
        "'message', message)",
    ),
    "retries are not forgotten": (
        "local retries = redis.call('HDEL', retry_counts, digest)",
        "local retries = 0",
    ),
    "two messages have one digest": ("redis.sha1hex(message)", "redis.sha1hex(#message)"),
    # Open
    "a session has no lease": ("redis.call('ZADD', leases, 'NX', 1, session)\n", ""),
    "a former session stays alive": ("    redis.call('ZREM', leases, former)\n", ""),
    "a handover copies": ("            redis.call('HDEL', claims_of(former), tag)\n", ""),
    "a handover loses": ("            redis.call('HSET', claims_of(session), tag, value)\n", ""),
    "a handover includes what is not wanted": ("elseif wanted[tag] then", "elseif true then"),
    "a handover drops what is not wanted": (
        "requeue(former, tag, false)",
        "redis.call('HDEL', claims_of(former), tag)",
    ),
    "a handover counts attempts": ("requeue(former, tag, false)", "requeue(former, tag, true)"),
    "a handover ends too early": ("            kept[1] = 1\n", ""),
    # Claim
    "a session without lease claims": (
        "if not redis.call('ZSCORE', leases, session) then return false end\n",
        "",
    ),
    "a claim replaces another": (
        "redis.pcall('HSETNX', claims_of(session), tag, value)",
        "redis.call('HSET', claims_of(session), tag, value) and 1",
    ),
    "a message that cannot be claimed is lost": (
        "redis.call('RPUSH', list, list == isolated and value or message)",
        "",
    ),
    "a poison candidate that cannot be claimed loses its queue": (
        "list == isolated and value or message",
        "message",
    ),
    "a claim leaves the message": ("    redis.call('LTRIM', list, 0, -2)  -- RPOP", "    -- RPOP"),
    "a claim records the wrong queue": (
        "local value = queue .. '\0' .. message",
        "local value = list .. '\0' .. message",
    ),
    "a claim exceeds its room": ("#claimed > room * 6", "#claimed > room * 12"),
    "a poison candidate is claimed with others": (
        "take(isolated, queue, message, digest_of(message))\n        done = true",
        "take(isolated, queue, message, digest_of(message))",
    ),
    "a poison candidate is claimed from its queue": (
        "if redis.call('HEXISTS', attempt_counts, digest) == 1 then",
        "if false then",
    ),
    "a poison candidate is claimed from the lane": (
        "if not digest or redis.call('HEXISTS', attempt_counts, digest) == 1 then break end",
        "if not digest then break end",
    ),
    "a claim loses a poison candidate": (
        "redis.call('LPUSH', isolated, list .. '\0' .. message)",
        "redis.call('TIME')",
    ),
    "a claim copies a poison candidate": (
        "'\0' .. message)\n            redis.call('LTRIM', list, 0, -2)",
        "'\0' .. message)\n            list = isolated",
    ),
    "a large message is thrown away": (
        "redis.call('RPOPLPUSH', list, KEYS[lane])",
        "redis.call('RPOP', list)",
    ),
    "isolated messages are not reported": ("claimed[2] = redis.call('LLEN', isolated)", ""),
    # Settle
    "another session's claim is settled": (
        "local session, announced_seconds = arguments[1]",
        "local session, announced_seconds = redis.call('ZRANGE', leases, 0, 0)[1] or ''",
    ),
    "a settled message stays claimed": (
        "        redis.call('HDEL', claims_of(session), tag)\n    end",
        "    end",
    ),
    "one settlement in two is applied": (
        "for index = 3, #arguments, 8 do",
        "for index = 3, #arguments, 16 do",
    ),
    "an acknowledged message keeps its counts": ("            forget(message)\n", ""),
    "a requeue by settlement loses": (
        "        elseif action == 'requeue' then\n            put(value)",
        "        elseif action == 'requeue' then",
    ),
    "a retry is not counted": ("if action == 'retry' then count(retry_counts, message) end", ""),
    "a retry is counted as an attempt": (
        "count(retry_counts, message)",
        "count(attempt_counts, message)",
    ),
    "a failed attempt is not counted": ("count(attempt_counts, message) end", "end"),
    "any delay is counted": ("if action == 'retry' then", "do"),
    # Wake
    "a woken message stays delayed": ("        redis.call('HDEL', delayed, name)\n", ""),
    "a woken message is lost": ("        put(value)\n        redis", "        redis"),
    "a woken message is still due": (
        "redis.call('ZREM', due, name)",
        "redis.call('ZINCRBY', due, 1e9, name)",
    ),
    "a message is woken early": ("'-inf', time, 'LIMIT'", "'-inf', '+inf', 'LIMIT'"),
    "the end of a wake is reported too early": (
        "    redis.call('ZREM', due, name)\nend\nreturn 1",
        "    redis.call('ZREM', due, name)\nend\nreturn 0",
    ),
    # Take over and close
    "a living session is taken over": (" or score + 0 ~= counter + 0", ""),
    "a takeover ends too early": (
        "return 1 end\n    requeue(session, tag, true)",
        "break end\n    requeue(session, tag, true)",
    ),
    "a takeover counts no attempt": ("requeue(session, tag, true)", "requeue(session, tag, false)"),
    "a session that ended stays": ("redis.call('ZREM', leases, session)\nreturn 0", "return 0"),
    "a close counts attempts": (
        "requeue(session, tag, false)\nend\nredis",
        "requeue(session, tag, true)\nend\nredis",
    ),
    "a close forgets claims": ("    requeue(session, tag, false)\nend\nredis", "end\nredis"),
    # Dead letters
    "a requeued dead letter stays": (
        "return redis.call('XDEL', prefix .. 'dead', arguments[1])",
        "return 1",
    ),
    "a requeued dead letter is lost": ("redis.call('RPUSH', queue, fields", "tostring(fields"),
    "a requeued dead letter keeps counts": ("forget(fields.message)\n", ""),
}
"""Edits of the scripts, each of which breaks one invariant."""


@pytest.mark.parametrize(("right", "wrong"), MUTATIONS.values(), ids=MUTATIONS)
def test_the_walk_detects_each_mutation(redis: Redis, path: str, right: str, wrong: str) -> None:
    """A script with a defect in one place fails at least one of a few walks."""
    edits = {right.replace("\0", "\\0"): wrong.replace("\0", "\\0")} | few_bytes(10)

    def finds(seed: int) -> bool:
        try:
            walk(redis, path, seed, edits)
        except (AssertionError, ResponseError):
            return True
        return False

    assert any(map(finds, range(SEEDS)))
