"""The low-priority lane: claims of large and small messages."""

from __future__ import annotations

from redis import Redis

from tests.support.claims import JOBS, LANE, claim
from worker.broker.claims import ANY_SIZE, Claims


def take_small(
    protocol: Claims, first_tag: int, *, largest: int, read_lanes: bool = True
) -> tuple[list[bytes], bool]:
    """Claim where more than 4 bytes are large; return the messages and whether large ones wait."""
    got = claim(protocol, first_tag, small=4, largest=largest, read_lanes=read_lanes)
    return [claim.message for claim in got.claims], got.large_wait


def test_small_messages_pass_large_ones_without_room(redis: Redis, protocol: Claims) -> None:
    """A claim without room for large messages moves those it meets to the lane, in their order."""
    redis.lpush(JOBS, "large 1", "a", "large 2", "b", "large 3")
    assert take_small(protocol, 1, largest=4) == ([b"a", b"b"], True)
    assert redis.lrange(LANE, 0, -1) == [b"large 3", b"large 2", b"large 1"]
    assert redis.llen(JOBS) == 0


def test_the_lane_is_claimed_first(redis: Redis, protocol: Claims) -> None:
    """A claim with room takes the large message that waited longest, before later messages."""
    redis.lpush(JOBS, "large 1", "large 2", "a")
    take_small(protocol, 1, largest=4)
    redis.lpush(JOBS, "b", "large 3")
    assert take_small(protocol, 2, largest=ANY_SIZE) == ([b"large 1"], True)
    assert take_small(protocol, 3, largest=ANY_SIZE) == ([b"large 2"], False)
    assert take_small(protocol, 4, largest=ANY_SIZE) == ([b"b"], False)
    assert take_small(protocol, 5, largest=ANY_SIZE) == ([b"large 3"], False)


def test_a_message_over_the_limit_moves_to_the_lane(redis: Redis, protocol: Claims) -> None:
    """A large message up to the limit is claimed; a larger one moves to the lane and stays."""
    redis.lpush(JOBS, "very large", "large")
    assert take_small(protocol, 1, largest=5) == ([b"large"], True)
    assert take_small(protocol, 2, largest=5) == ([], True)
    assert redis.lrange(LANE, 0, -1) == [b"very large"]


def test_small_messages_of_the_lane_are_claimed_last(redis: Redis, protocol: Claims) -> None:
    """A small message that was published at the lane's priority is claimed after the others."""
    redis.lpush(LANE, "z")
    redis.lpush(JOBS, "a")
    assert take_small(protocol, 1, largest=4) == ([b"a", b"z"], False)


def test_the_lane_is_not_read_without_need(redis: Redis, protocol: Claims) -> None:
    """A claim may skip the lane; it still reports that messages wait there."""
    redis.lpush(LANE, "large 1", "z")
    redis.lpush(JOBS, "a", "large 2", "b")
    got = take_small(protocol, 1, largest=4, read_lanes=False)
    assert got == ([b"a", b"b"], True)
    assert redis.lrange(LANE, 0, -1) == [b"large 2", b"z", b"large 1"]


def test_large_messages_are_claimed_together(redis: Redis, protocol: Claims) -> None:
    """A claim takes large messages of lane and queue up to their number of bytes, no small one."""
    redis.lpush(LANE, "large 1", "large 2")
    redis.lpush(JOBS, "large 3", "large 4", "a", "large 5")
    got = claim(protocol, 1, small=4, large_size=21)
    assert [claim.message for claim in got.claims] == [b"large 1", b"large 2", b"large 3"]
    got = claim(protocol, 4, small=4, large_size=21)
    assert [claim.message for claim in got.claims] == [b"large 4"]


def test_a_large_message_is_the_last_of_its_claim(redis: Redis, protocol: Claims) -> None:
    """A claim takes neither a large message after small ones nor small ones after a large one."""
    redis.lpush(JOBS, "a", "large", "b")
    assert take_small(protocol, 1, largest=ANY_SIZE) == ([b"a"], False)
    assert take_small(protocol, 2, largest=ANY_SIZE) == ([b"large"], False)
    assert take_small(protocol, 3, largest=4) == ([b"b"], False)


def test_a_claim_reports_what_it_left_unread(redis: Redis, protocol: Claims) -> None:
    """A script that has moved its number of bytes ends, and reports that more messages follow."""
    redis.lpush(JOBS, *[b"." * 1_500_000] * 4, "a")
    got = claim(protocol, 1, small=4, largest=4)
    assert (got.claims, got.has_more) == ([], True)
    got = claim(protocol, 1, small=4, largest=4)
    assert [one.message for one in got.claims] == [b"a"]
    assert not claim(protocol, 2, small=4, largest=4).has_more


def test_a_claim_reports_large_messages_that_it_left(redis: Redis, protocol: Claims) -> None:
    """A claim reports large messages beyond its number of bytes, for another pool process."""
    redis.lpush(LANE, "large 1", "large 2")
    got = claim(protocol, 1, small=4, large_size=7)
    assert ([one.message for one in got.claims], got.has_more) == ([b"large 1"], True)
    got = claim(protocol, 2, small=4, large_size=8)
    assert ([one.message for one in got.claims], got.has_more) == ([b"large 2"], False)


def test_a_claim_reports_that_it_moved_messages_to_the_lane(redis: Redis, protocol: Claims) -> None:
    """A claim that only moved messages to the lane asks for another claim."""
    redis.lpush(JOBS, "large")
    assert claim(protocol, 1, small=4, largest=4).has_more
    assert not claim(protocol, 1, small=4, largest=4).has_more
