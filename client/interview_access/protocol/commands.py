"""The steps of an exchange: Redis commands and pauses, and the round trips of each step."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redis.exceptions import ExecAbortError, RedisError, WatchError

T = TypeVar("T")

Command = tuple[Any, ...]
"""A command's name and arguments."""

RoundTrips = Generator[Sequence[Command], list[Any], T]
"""Yields the commands of a round trip on one connection, and is sent their replies.

The error reply to a command is an exception among the replies. The generator returns the replies of
the step, or raises one of these exceptions.
"""


@dataclass(frozen=True, slots=True)
class Commands:
    """Redis commands that are executed together: a single one alone, several in one MULTI.

    Attributes:
        commands: The commands.
        results: Whether they go to the server of the results instead of that of the queue.
        expected: Keys and their expected values (None: the key must not exist), compared before
            MULTI and watched until EXEC. If one differs, nothing is executed.
    """

    commands: tuple[Command, ...]
    results: bool = False
    expected: Mapping[str, bytes | None] = field(default_factory=dict)

    def round_trips(self) -> RoundTrips[list[Any]]:
        """Execute the step on one connection.

        Returns:
            The replies to the commands.

        Raises:
            RedisError: the first error reply; WatchError if a key has another value than expected.
        """
        if len(self.commands) == 1 and not self.expected:
            return _checked((yield self.commands))
        if self.expected:
            watched, values = yield ("WATCH", *self.expected), ("MGET", *self.expected)
            if isinstance(watched, RedisError) or values != [*self.expected.values()]:
                yield (("UNWATCH",),)  # the connection goes back to its pool
                _checked([watched, values])
                raise WatchError("a watched key has another value than expected")
        *queued, executed = yield ("MULTI",), *self.commands, ("EXEC",)
        if isinstance(executed, ExecAbortError):
            _checked(queued)  # the error for which Redis discarded the transaction
        (replies,) = _checked([executed])
        if replies is None:
            raise WatchError("a watched key was changed")
        return _checked(replies)


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause between two polls."""

    seconds: float


Exchange = Generator[Commands | Pause, Any, T]
"""Yields steps, is sent the list of replies to each, and returns the result of a client's call.

Exceptions of redis-py are thrown into it; it translates them into errors of this package.
"""


def _checked(replies: list[Any]) -> list[Any]:
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
    return replies
