"""Requested grants divided into chunks, and the parameters that a chunk's statement takes."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format

from storage.dtos import RequestedGrantsDTO

_UUID = psycopg.adapters.types["uuid"]
_IDS_AT_ONCE = 10_000  # intermediate strings of a million IDs would take a hundred MB


@dataclass(frozen=True, slots=True)
class CrossProduct:
    """A chunk in which every user is to be granted the same interviews.

    Attributes:
        indexes: Index of each user's request, by user ID, in order.
        job_ids: The job of each request, by request index.
        interview_ids: Sorted IDs.
    """

    indexes: Mapping[str, int]
    job_ids: Sequence[str | None]
    interview_ids: Sequence[str]

    @property
    def size(self) -> int:
        """Number of grants."""
        return len(self.indexes) * len(self.interview_ids)

    @property
    def counts(self) -> Mapping[int, int]:
        """Number of grants by request index."""
        return dict.fromkeys(self.indexes.values(), len(self.interview_ids))

    @property
    def parameters(self) -> dict[str, Any]:
        """Values of the statement's parameters."""
        return {
            "user_ids": list(self.indexes),
            "job_ids": [self.job_ids[index] for index in self.indexes.values()],
            "interview_ids": UuidArray.of(self.interview_ids),
            "first": self.interview_ids[0],
            "last": self.interview_ids[-1],
        }


@dataclass(frozen=True, slots=True)
class ExplicitPairs:
    """A chunk of pairs of user and interview, for requests that differ in their interviews.

    Attributes:
        user_ids: The user of each request, by request index.
        job_ids: The job of each request, likewise.
        indexes: Index of the request that each grant counts for.
        interview_ids: The interview of each grant.
    """

    user_ids: Sequence[str]
    job_ids: Sequence[str | None]
    indexes: Sequence[int]
    interview_ids: Sequence[str]

    @property
    def size(self) -> int:
        """Number of grants."""
        return len(self.indexes)

    @property
    def counts(self) -> Mapping[int, int]:
        """Number of grants by request index."""
        return Counter(self.indexes)

    @property
    def parameters(self) -> dict[str, Any]:
        """Values of the statement's parameters."""
        return {
            "user_ids": self.user_ids,
            "job_ids": self.job_ids,
            # An array literal: psycopg would inspect each element of a list.
            "indexes": "{" + ",".join(map(str, self.indexes)) + "}",
            "interview_ids": UuidArray.of(self.interview_ids),
        }


Chunk = CrossProduct | ExplicitPairs
"""Grants that one statement creates."""


def partition(requested: Sequence[RequestedGrantsDTO], size: int) -> Sequence[Chunk]:
    """Divide requested grants into chunks, each grant once, sorted by user and interview.

    Python sorts code points as PostgreSQL sorts UTF-8 in the collation "C", and canonical UUID text
    as uuid. So all transactions lock grants in the same order.

    Args:
        requested: Grants by user.
        size: Largest number of grants of a chunk.
    """
    job_ids = [one.job_id for one in requested]
    indexes = {one.user_id: index for index, one in enumerate(requested)}
    wanted = requested[0].interview_ids if requested else ()
    if len(indexes) < len(requested) or any(one.interview_ids != wanted for one in requested):
        user_ids = [one.user_id for one in requested]
        owners, pair_ids = _distinct_pairs(requested)
        return [
            ExplicitPairs(
                user_ids, job_ids, owners[start : start + size], pair_ids[start : start + size]
            )
            for start in range(0, len(owners), size)
        ]
    interview_ids, users = sorted(wanted), sorted(indexes)
    users_at_once = max(size // len(interview_ids), 1) if interview_ids else 1
    return [
        CrossProduct(
            {user: indexes[user] for user in users[first : first + users_at_once]}, job_ids, some
        )
        for first in range(0, len(users), users_at_once)
        for start in range(0, len(interview_ids), size)
        if (some := interview_ids[start : start + size])
    ]


def _distinct_pairs(requested: Sequence[RequestedGrantsDTO]) -> tuple[list[int], list[str]]:
    """Return the index of the first request of each grant, and the grant's interview, in order."""
    by_user: dict[str, list[int]] = {}
    for index, one in enumerate(requested):
        by_user.setdefault(one.user_id, []).append(index)
    indexes: list[int] = []
    interview_ids: list[str] = []
    for user_id in sorted(by_user):
        first: dict[str, int] = {}
        for index in by_user[user_id]:
            first = dict.fromkeys(requested[index].interview_ids, index) | first
        ordered = sorted(first)
        interview_ids += ordered
        indexes += map(first.__getitem__, ordered)
    return indexes, interview_ids


@dataclass(frozen=True, slots=True)
class UuidArray:
    """An array of UUIDs in PostgreSQL's binary format.

    PostgreSQL takes longer to parse many UUIDs as text than to find their rows, and psycopg's own
    array needs an object for each. The format is that of array_recv in PostgreSQL's
    src/backend/utils/adt/arrayfuncs.c.

    Attributes:
        content: The array as array_recv reads it.
    """

    content: bytearray

    @classmethod
    def of(cls, interview_ids: Sequence[str]) -> UuidArray:
        """Encode canonical UUID strings."""
        dimensions, nulls, first = 1, 0, 1
        header = struct.pack("!iiIii", dimensions, nulls, _UUID.oid, len(interview_ids), first)
        length = f"{16:08x}"  # of each element, in bytes
        content = bytearray(header)
        for start in range(0, len(interview_ids), _IDS_AT_ONCE):
            some = length.join(["", *interview_ids[start : start + _IDS_AT_ONCE]])
            content += bytes.fromhex(some.replace("-", ""))
        return cls(content)


class _UuidArrayDumper(Dumper):
    format = Format.BINARY
    oid = _UUID.array_oid

    def dump(self, obj: UuidArray) -> bytearray:
        return obj.content


def register_uuid_arrays(connection: psycopg.Connection[Any], _: object) -> None:
    """Register :class:`UuidArray` on a new connection. A listener of SQLAlchemy's connect event."""
    connection.adapters.register_dumper(UuidArray, _UuidArrayDumper)
