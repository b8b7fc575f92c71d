"""The round trips of a step, driven with replies instead of a server."""

from __future__ import annotations

from typing import Any

import pytest
from interview_access.protocol.commands import Command, Commands, RoundTrips
from redis.exceptions import ExecAbortError, NoPermissionError, OutOfMemoryError, WatchError

SET, PUSH = ("SET", "key", b"new"), ("LPUSH", "queue", b"message")
CONDITIONAL = Commands((SET, PUSH), expected={"key": b"old"})
WATCH = [("WATCH", "key"), ("MGET", "key")]
TRANSACTION = [("MULTI",), SET, PUSH, ("EXEC",)]
UNWATCH = [("UNWATCH",)]


def exchange(
    round_trips: RoundTrips[list[Any]], *replies: list[Any]
) -> tuple[list[list[Command]], list[Any]]:
    """Send replies, one list for each round trip; return the commands and the result."""
    sent = [[*next(round_trips)]]
    try:
        for some in replies:
            sent.append([*round_trips.send(some)])  # noqa: PERF401 - a generator hides StopIteration
    except StopIteration as done:
        return sent, done.value
    raise AssertionError(f"expected the end, got {sent[-1]}")


def test_a_single_command_is_sent_alone() -> None:
    """One command without a condition is sent without MULTI."""
    sent, replies = exchange(Commands((PUSH,)).round_trips(), [1])
    assert (sent, replies) == ([[PUSH]], [1])


def test_several_commands_are_one_transaction() -> None:
    """Several commands are sent in one MULTI, in one round trip."""
    executed = [b"OK", 1]
    sent, replies = exchange(
        Commands((SET, PUSH)).round_trips(), [b"OK", b"QUEUED", b"QUEUED", executed]
    )
    assert (sent, replies) == ([TRANSACTION], executed)


def test_a_condition_is_watched_before_the_transaction() -> None:
    """The keys are watched and compared in one round trip, before MULTI."""
    executed = [b"OK", 1]
    sent, replies = exchange(
        CONDITIONAL.round_trips(), [b"OK", [b"old"]], [b"OK", b"QUEUED", b"QUEUED", executed]
    )
    assert (sent, replies) == ([WATCH, TRANSACTION], executed)


@pytest.mark.parametrize(
    ("replies", "error"),
    [
        ([b"OK", [b"other"]], WatchError),
        ([b"OK", NoPermissionError("mget")], NoPermissionError),
        ([NoPermissionError("watch"), [b"old"]], NoPermissionError),
    ],
    ids=["another value", "MGET is refused", "WATCH is refused"],
)
def test_keys_are_unwatched_if_nothing_is_executed(
    replies: list[Any], error: type[Exception]
) -> None:
    """A connection goes back to its pool without watched keys."""
    round_trips = CONDITIONAL.round_trips()
    next(round_trips)
    assert [*round_trips.send(replies)] == UNWATCH
    with pytest.raises(error):
        round_trips.send([b"OK"])


def test_a_key_that_changes_during_the_transaction_is_a_watch_error() -> None:
    """EXEC without a reply means that a watched key was changed."""
    round_trips = CONDITIONAL.round_trips()
    next(round_trips)
    round_trips.send([b"OK", [b"old"]])
    with pytest.raises(WatchError):
        round_trips.send([b"OK", b"QUEUED", b"QUEUED", None])


@pytest.mark.parametrize(
    "replies",
    [
        [b"OK", OutOfMemoryError("full"), b"QUEUED", ExecAbortError("discarded")],
        [b"OK", b"QUEUED", b"QUEUED", [b"OK", OutOfMemoryError("full")]],
    ],
    ids=["queued", "executed"],
)
def test_the_error_of_a_command_is_raised(replies: list[Any]) -> None:
    """The error is that of the command, not that of EXEC."""
    round_trips = Commands((SET, PUSH)).round_trips()
    next(round_trips)
    with pytest.raises(OutOfMemoryError, match="full"):
        round_trips.send(replies)
