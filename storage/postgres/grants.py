"""Grants: the checks that precede them, and the statements that create those that are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from storage import models, sqlstate
from storage.dtos import GrantOriginDTO, RequestedGrantsDTO, UserInterviewAccessDTO
from storage.errors import StorageError
from storage.interface import ChunkDone, GrantStore
from storage.postgres.grant_chunks import Chunk, ExplicitPairs, UuidArray, partition
from storage.postgres.session import Session

# --- Interviews ----------------------------------------------------------------------------------

_LOCK_INTERVIEWS = """
    WITH locked AS (
        SELECT FROM interview_interview
        WHERE id = ANY (CAST(%(interview_ids)s AS uuid[])) ORDER BY id FOR KEY SHARE
    )
    SELECT count(*) FROM locked
"""
# Returns the unknown IDs only, so that the reply is short for a job of any size. PostgreSQL runs a
# CTE that locks rows to completion, so every interview that exists is locked.
_FIND_UNKNOWN_INTERVIEWS = """
    WITH locked AS (
        SELECT id FROM interview_interview
        WHERE id = ANY (CAST(%(interview_ids)s AS uuid[])) ORDER BY id FOR KEY SHARE
    )
    SELECT wanted.id::text FROM unnest(CAST(%(interview_ids)s AS uuid[])) AS wanted (id)
    WHERE NOT EXISTS (SELECT FROM locked WHERE locked.id = wanted.id)
"""

# --- Existing grants -----------------------------------------------------------------------------

# Reads no more of a user's grants than decide the question.
_COUNT_GRANTS_OF_USER = """
    SELECT count(*) FROM (
        SELECT FROM interview_userinterviewaccess WHERE user_id = %(user_id)s LIMIT %(limit)s
    ) AS existing
"""
_COUNT_EXISTING_GRANTS = """
    SELECT count(*) FROM interview_userinterviewaccess
    WHERE user_id = %(user_id)s AND interview_id = ANY (CAST(%(interview_ids)s AS uuid[]))
"""
_HAVE_GRANTS = """
    SELECT EXISTS (
        SELECT FROM interview_userinterviewaccess WHERE user_id = ANY (CAST(%(user_ids)s AS text[]))
    )
"""
_FIND_ORIGIN = """
    WITH existing AS (
        SELECT created_by_job FROM interview_userinterviewaccess
        WHERE user_id = %(user_id)s AND interview_id = CAST(%(interview_id)s AS uuid)
    )
    SELECT EXISTS (SELECT FROM interview_interview WHERE id = CAST(%(interview_id)s AS uuid)),
           EXISTS (SELECT FROM existing), (SELECT created_by_job FROM existing)
"""

# --- New grants ----------------------------------------------------------------------------------

_INSERT_GRANTS = """
    INSERT INTO interview_userinterviewaccess (user_id, interview_id, created_by_job)
    SELECT user_id, interview_id, job_id FROM {source}
    ORDER BY user_id COLLATE "C", interview_id {conflict}
"""
_USERS = "unnest(CAST(%(user_ids)s AS text[]), CAST(%(job_ids)s AS text[]))"
_CROSS_PRODUCT = f"""
    WITH wanted AS (
        SELECT user_id, job_id, interview_id
        FROM {_USERS} AS users (user_id, job_id)
        CROSS JOIN unnest(CAST(%(interview_ids)s AS uuid[])) AS interviews (interview_id)
    )
"""  # noqa: S608 - constants
# EXCEPT instead of a join, whose plan would depend on the statistics of a growing table. For each
# user it reads one range of the unique key, in order.
_MISSING_OF_CROSS_PRODUCT = f"""
    {_USERS} AS users (user_id, job_id)
    CROSS JOIN LATERAL (
        SELECT interview_id FROM unnest(CAST(%(interview_ids)s AS uuid[])) AS wanted (interview_id)
        EXCEPT
        SELECT interview_id FROM interview_userinterviewaccess AS existing
        WHERE existing.user_id = users.user_id
          AND interview_id BETWEEN CAST(%(first)s AS uuid) AND CAST(%(last)s AS uuid)
    ) AS missing"""  # noqa: S608 - constants
_EXPLICIT_PAIRS = f"""
    WITH wanted AS (
        SELECT users.user_id, users.job_id, grants.interview_id, grants.index
        FROM unnest(CAST(%(indexes)s AS int[]), CAST(%(interview_ids)s AS uuid[]))
             AS grants (index, interview_id)
        JOIN {_USERS} WITH ORDINALITY AS users (user_id, job_id, number)
          ON users.number = grants.index + 1
    )
"""  # noqa: S608 - constants
_MISSING_OF_EXPLICIT_PAIRS = """wanted WHERE NOT EXISTS (
        SELECT FROM interview_userinterviewaccess AS existing
        WHERE existing.user_id = wanted.user_id AND existing.interview_id = wanted.interview_id
    )"""
# Counted in the database: no timeout ends a backend that blocks on sending rows to its client.
_BY_USER = """, created AS ({insert} RETURNING user_id)
    SELECT user_id, count(*) FROM created GROUP BY user_id
"""
_BY_INDEX = """, created AS ({insert} RETURNING user_id, interview_id)
    SELECT wanted.index, count(*) FROM created JOIN wanted USING (user_id, interview_id)
    GROUP BY wanted.index
"""


@dataclass(frozen=True, slots=True)
class InsertStrategy:
    """One way to insert the grants of a chunk, as statements for each kind of chunk.

    Attributes:
        cross_product: The number of rows changed is the count.
        cross_product_by_user: Returns user IDs and counts.
        explicit_pairs: The number of rows changed is the count.
        explicit_pairs_by_index: Returns request indexes and counts.
    """

    cross_product: str
    cross_product_by_user: str
    explicit_pairs: str
    explicit_pairs_by_index: str

    @classmethod
    def of(
        cls,
        *,
        cross_product_source: str = "wanted",
        explicit_pairs_source: str = "wanted",
        conflict: str = "",
    ) -> InsertStrategy:
        """Build the statements.

        Args:
            cross_product_source: FROM clause of the rows to insert of a cross product.
            explicit_pairs_source: The same of explicit pairs.
            conflict: ON CONFLICT clause.
        """
        product = _INSERT_GRANTS.format(source=cross_product_source, conflict=conflict)
        pairs = _INSERT_GRANTS.format(source=explicit_pairs_source, conflict=conflict)
        return cls(
            _CROSS_PRODUCT + product,
            _CROSS_PRODUCT + _BY_USER.format(insert=product),
            _EXPLICIT_PAIRS + pairs,
            _EXPLICIT_PAIRS + _BY_INDEX.format(insert=pairs),
        )


# Without ON CONFLICT new rows are inserted as fast as by COPY (docs/performance.md). The statement
# fails if another transaction creates one of them meanwhile.
INSERT_ALL = InsertStrategy.of()
INSERT_MISSING = InsertStrategy.of(
    cross_product_source=_MISSING_OF_CROSS_PRODUCT,
    explicit_pairs_source=_MISSING_OF_EXPLICIT_PAIRS,
)
# Names its columns, so that a collision of the primary key is still an error.
INSERT_IF_ABSENT = InsertStrategy.of(conflict="ON CONFLICT (user_id, interview_id) DO NOTHING")


class _RowsSuppressedError(Exception):
    """The statement inserted fewer rows than expected: a trigger suppresses some."""


class PostgresGrants(Session, GrantStore):
    """Grants in the table ``interview_userinterviewaccess``."""

    _locked_interviews: Collection[str] = ()
    _existing_grants: tuple[str, Collection[str]] = ("", ())
    """A user, and interviews that the user is known to have access to."""

    def find_unknown_interviews(
        self, interview_ids: Collection[str], *, granted_to: str | None = None
    ) -> frozenset[str]:
        """See the interface."""
        if not interview_ids:
            return frozenset()
        parameters = {"interview_ids": UuidArray.of(sorted(interview_ids))}
        count = len(interview_ids)
        with self.planned_for(count):
            if (
                granted_to
                and count >= self.bulk_threshold
                and self._are_all_granted(granted_to, count, parameters)
            ):
                self._existing_grants = (granted_to, interview_ids)
                return frozenset()
            if self.value(_LOCK_INTERVIEWS, parameters) == count:
                self._locked_interviews = interview_ids
                return frozenset()
            rows = self.query(_FIND_UNKNOWN_INTERVIEWS, parameters)
            return frozenset(interview_id for (interview_id,) in rows)

    def get_existing_user_access(
        self, user_ids: Collection[str]
    ) -> Sequence[UserInterviewAccessDTO]:
        """See the interface."""
        grants = models.grants.c
        rows = self.query(
            select(grants.user_id, grants.interview_id).where(grants.user_id.in_(user_ids))
        )
        return [UserInterviewAccessDTO(row.user_id, str(row.interview_id)) for row in rows]

    def find_grant_origin(self, user_id: str, interview_id: str) -> GrantOriginDTO:
        """Find a grant and the job that created it; see the interface of its reader."""
        ((*origin,),) = self.query(_FIND_ORIGIN, {"user_id": user_id, "interview_id": interview_id})
        return GrantOriginDTO(*origin)

    def bulk_create_user_access(
        self, requested: Sequence[RequestedGrantsDTO], on_chunk: ChunkDone | None = None
    ) -> Sequence[int]:
        """See the interface."""
        counts = [0] * len(requested)
        chunks = partition(requested, self.chunk_size)
        done, total = 0, sum(chunk.size for chunk in chunks)
        strategy = self._fastest_strategy(requested, total)
        for chunk in chunks:
            with self.planned_for(total):
                for index, created in self._create(chunk, strategy) if strategy else ():
                    counts[index] += created
            done += chunk.size
            if on_chunk:
                on_chunk(done, total)
        # The foreign keys are deferred. Checked here, a violation does not surface in COMMIT. A
        # locked interview exists.
        if strategy and not _are_all_within(self._locked_interviews, requested):
            self.execute("SET CONSTRAINTS ALL IMMEDIATE")
        return counts

    def _are_all_granted(
        self, user_id: str, count: int, interviews: Mapping[str, UuidArray]
    ) -> bool:
        """Return whether the user has access to all of ``count`` interviews."""
        of_user = {"user_id": user_id, "limit": count}
        if self.value(_COUNT_GRANTS_OF_USER, of_user) < count:
            return False
        return bool(self.value(_COUNT_EXISTING_GRANTS, {"user_id": user_id, **interviews}) == count)

    def _fastest_strategy(
        self, requested: Sequence[RequestedGrantsDTO], total: int
    ) -> InsertStrategy | None:
        """Choose how to create ``total`` grants; None if all of them are known to exist."""
        if total < self.bulk_threshold:
            return INSERT_IF_ABSENT
        user_id, granted = self._existing_grants
        if all(one.user_id == user_id for one in requested) and _are_all_within(granted, requested):
            return None
        has_grants = self.value(_HAVE_GRANTS, {"user_ids": [one.user_id for one in requested]})
        return INSERT_MISSING if has_grants else INSERT_ALL

    def _create(self, chunk: Chunk, strategy: InsertStrategy) -> Iterable[tuple[int, int]]:
        """Create a chunk's missing grants.

        Returns:
            Pairs of request index and number of rows; requests that added none may be left out.
        """
        if strategy is not INSERT_IF_ABSENT:
            try:
                with self.savepoint():
                    return self._insert(strategy, chunk)
            except StorageError as error:
                if error.sqlstate != sqlstate.UNIQUE_VIOLATION:
                    raise
            except _RowsSuppressedError:
                pass
        return self._insert(INSERT_IF_ABSENT, chunk)

    def _insert(self, strategy: InsertStrategy, chunk: Chunk) -> Iterable[tuple[int, int]]:
        is_explicit = isinstance(chunk, ExplicitPairs)
        if strategy is INSERT_ALL:
            statement = strategy.explicit_pairs if is_explicit else strategy.cross_product
            if self.execute(statement, chunk.parameters) != chunk.size:
                raise _RowsSuppressedError
            return chunk.counts.items()
        if isinstance(chunk, ExplicitPairs):
            rows: Iterable[Any] = self.query(strategy.explicit_pairs_by_index, chunk.parameters)
            return [(index, created) for index, created in rows]
        if len(chunk.indexes) == 1:
            created = self.execute(strategy.cross_product, chunk.parameters)
            return [(index, created) for index in chunk.indexes.values()]
        rows = self.query(strategy.cross_product_by_user, chunk.parameters)
        return [(chunk.indexes[user_id], created) for user_id, created in rows]


def _are_all_within(
    interview_ids: Collection[str], requested: Sequence[RequestedGrantsDTO]
) -> bool:
    """Return whether all requested interviews are among these.

    The requests of one job share its tuple of IDs, which identity recognizes without a set.
    """
    others = [one for one in requested if one.interview_ids is not interview_ids]
    known = frozenset(interview_ids if others else ())
    return all(known.issuperset(one.interview_ids) for one in others)
