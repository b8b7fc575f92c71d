"""All of the SQL: the store on PostgreSQL.

Safety rests on two keys and nothing else: the ledger's primary key decides who does a job, the
unique key of (user_id, interview_id) decides who made a grant. Locks are taken in one order
everywhere (jobs, interviews by id, grants by user and interview, ledger rows by job id), so that
racing transactions of ours wait for each other and never in a circle.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format
from sqlalchemy import (
    Connection,
    CursorResult,
    Executable,
    PoolProxiedConnection,
    Row,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.exc import DBAPIError

from storage import models
from storage.connections import LOOK_SECONDS, driver_errors_translated, open_engine, parsed
from storage.dtos import (
    AccessOrderDTO,
    AccessRequestDTO,
    AnswerDTO,
    FiguresDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    JobDTO,
    RejectedIdsDTO,
    UserInterviewAccessDTO,
)
from storage.interface import (
    MAX_REQUEST_BYTES,
    ChunkDone,
    HasFileno,
    InterviewStorageInterface,
    InterviewTransactionInterface,
    JobBusyError,
    LedgerConflictError,
    LedgerError,
    StorageError,
)
from storage.notifications import RequestNotifications

_LOCK_NOT_HAD = "55P03"
_NOT_UNIQUE = "23505"

_UUID_OID = psycopg.adapters.types["uuid"].oid


# Timestamps as Python can hold them: it knows neither infinity nor years before 1.
_READABLE = """
    greatest(least({0}, clock_timestamp()), clock_timestamp() - interval '100 years')
"""
_REQUESTED_AT = _READABLE.format("requested_at")
_REQUEST_COLUMNS = """
    job_id, user_id, interview_ids, {requested_at} AS requested_at,
    CASE WHEN sent_at IS NOT NULL THEN {sent_at} END AS sent_at
"""
_REQUEST = _REQUEST_COLUMNS.format(requested_at=_REQUESTED_AT, sent_at=_READABLE.format("sent_at"))
_GET_REQUEST = "SELECT {columns} FROM grant_access_request WHERE job_id = %(job_id)s"
_GET_REQUEST = _GET_REQUEST.format(columns=_REQUEST)
# Each of the first two has an index in its order.
_HAS_DUE_REQUESTS = (
    "SELECT EXISTS (SELECT FROM grant_access_request WHERE look_at <= statement_timestamp())"
)
_DUE_REQUESTS = """
    SELECT job_id, look_at, pg_column_size(interview_ids) AS size FROM grant_access_request
    WHERE sent_at IS {null} AND look_at <= statement_timestamp()
    ORDER BY look_at LIMIT %(limit)s {less} FOR UPDATE SKIP LOCKED
"""
# A page by stored size is decompressed, and bounded by the memory that it takes up in Python: the
# text of its IDs, and about 64 bytes for each.
_TAKE_DUE_REQUESTS = """
    WITH never_sent AS ({never_sent}), sent AS ({sent}), due AS (
        SELECT job_id, row_number() OVER page AS number, sum(size) OVER page AS stored
        FROM (SELECT 1 AS turn, * FROM never_sent UNION ALL SELECT 2, * FROM sent) AS either
        WINDOW page AS (ORDER BY turn, look_at, job_id ROWS UNBOUNDED PRECEDING)
    ), sized AS (
        SELECT number, request.*, CASE
            WHEN pg_column_size(interview_ids) + octet_length(user_id)::bigint <= %(request_bytes)s
             AND cardinality(interview_ids)::bigint * 64 <= %(request_bytes)s
            THEN octet_length(array_send(interview_ids)) + octet_length(user_id)::bigint
                 + cardinality(interview_ids)::bigint * 64
        END AS size
        FROM due JOIN grant_access_request AS request USING (job_id)
        WHERE number = 1 OR stored <= %(page_bytes)s
    ), page AS (
        SELECT *, size <= %(request_bytes)s IS TRUE AS is_read,
            sum(size) FILTER (WHERE size <= %(request_bytes)s) OVER (ORDER BY number) AS total
        FROM sized
    )
    SELECT job_id, requested_at, sent_at, NOT is_read AS is_too_large,
        CASE WHEN is_read THEN user_id ELSE '' END AS user_id,
        CASE WHEN is_read THEN interview_ids ELSE '{{}}' END AS interview_ids
    FROM (SELECT {columns}, number, is_read, total FROM page) AS page
    WHERE number = 1 OR NOT is_read OR total <= %(page_bytes)s ORDER BY number
"""
_TAKE_DUE_REQUESTS = _TAKE_DUE_REQUESTS.format(
    columns=_REQUEST,
    never_sent=_DUE_REQUESTS.format(null="NULL", less=""),
    sent=_DUE_REQUESTS.format(null="NOT NULL", less="- (SELECT count(*) FROM never_sent)"),
)
_LOOK_AGAIN_AT_REQUESTS = """
    UPDATE grant_access_request
    SET sent_at = CASE WHEN %(sent)s THEN clock_timestamp() ELSE sent_at END,
        look_at = clock_timestamp() + least(
            greatest(clock_timestamp() - {requested_at}, interval '1 s'), interval '60 s')
    WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
"""
_LOOK_AGAIN_AT_REQUESTS = _LOOK_AGAIN_AT_REQUESTS.format(requested_at=_REQUESTED_AT)

_REPLY_SECONDS = 30
"""How much longer than a statement may take its reply is waited for."""

# The first statement of each transaction. Local to it: a pooler may share the connection.
_SETTINGS = (
    "SELECT pg_backend_pid() AS pid,"
    # Bounds in time. The last is PostgreSQL 17's, and would end a statement that waits for others.
    " set_config('lock_timeout', %(lock)s, true),"
    " set_config('statement_timeout', %(statement)s, true),"
    " set_config('idle_in_transaction_session_timeout', %(idle)s, true),"
    " set_config('client_connection_check_interval', '1s', true),"
    " CASE WHEN current_setting('transaction_timeout', true) <> '0'"
    " THEN set_config('transaction_timeout', '0', true) END,"
    # What is kept, and how values are written.
    " set_config('synchronous_commit', 'on', true),"
    " set_config('DateStyle', 'ISO, MDY', true),"
    " set_config('IntervalStyle', 'postgres', true),"
    " set_config('TimeZone', 'UTC', true),"
    # Every plan uses an index, also a plan cached while the table was small. Where no index fits,
    # before PostgreSQL 18 the inflated cost estimate triggers JIT compilation.
    " set_config('enable_seqscan', 'off', true),"
    " set_config('jit', 'off', true)"
)

_OF_JOBS = (
    "SELECT {columns} FROM ("
    "SELECT job_id, hashtextextended('grant_access_job:' || job_id, 0) AS key"
    " FROM unnest(CAST(%(job_ids)s AS text[])) AS job_id ORDER BY key OFFSET 0) AS jobs {others}"
)
_TRY_LOCK_JOBS = _OF_JOBS.format(
    columns="job_id, pg_try_advisory_xact_lock(key), pid",
    others=f"CROSS JOIN ({_SETTINGS}) AS settings",
)
_LOCK_JOBS = _OF_JOBS.format(columns="job_id, pg_advisory_xact_lock(key)", others="")
_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %(lock)s, true)"

# Ends holders whose client has stopped responding: idle between two statements, or not receiving
# the rows of a statement that has passed its own time limit. pg_locks shows a 64-bit key in halves.
_HOLDERS = """
    JOIN pg_locks ON locktype = 'advisory' AND objsubid = 1 AND granted
     AND CAST(classid AS bigint) << 32 | CAST(objid AS bigint) = key AND pid <> pg_backend_pid()
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    JOIN pg_stat_activity USING (pid)
"""
_HELD_BY_OTHER_ROLES = _OF_JOBS.format(
    columns="coalesce(bool_and(usename <> current_user), false)", others=_HOLDERS
)
_END_UNRESPONSIVE_HOLDERS = _OF_JOBS.format(
    columns="pg_terminate_backend(pid)",
    others=_HOLDERS
    + """
    WHERE state IN ('idle in transaction', 'idle in transaction (aborted)')
      AND state_change < clock_timestamp() - CAST(%(unresponsive)s AS interval)
       OR state = 'active' AND wait_event_type = 'Client'
      AND query_start < clock_timestamp() - CAST(%(statement)s AS interval)
""",
)
_NOT_PERMITTED = "42501"

_JOB_COLUMNS = (
    "job_id, task, state, user_id, request_digest,"
    " requested, repeated, already_granted, created, result, error"
)
# Only two index conditions: no join that the planner could turn into a scan of a whole index.
_FIND_JOBS = """
    SELECT * FROM (
        SELECT {columns}, finished_at FROM grant_access_job
        WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
    ) AS finished FULL JOIN (
        SELECT job_id, true AS is_cancelled FROM grant_access_cancellation
        WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
    ) AS cancelled USING (job_id)
"""
_FIND_JOBS = _FIND_JOBS.format(columns=_JOB_COLUMNS)
_FIND_CANCELLED_JOBS = (
    "SELECT job_id FROM grant_access_cancellation WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))"
)

# Rows are passed as JSON: psycopg would inspect and adapt eleven arrays.
_RECORD_JOBS = """
    INSERT INTO grant_access_job ({columns}, finished_at)
    SELECT jobs.*, clock_timestamp()
    FROM json_to_recordset(CAST(%(jobs)s AS json))
         AS jobs (job_id text, task text, state text, user_id text, request_digest text,
                  requested int, repeated int, already_granted int, created int,
                  result jsonb, error jsonb)
    ORDER BY job_id COLLATE "C"
"""
_RECORD_JOBS = _RECORD_JOBS.format(columns=_JOB_COLUMNS)

# Of all that the user has, no more is looked at than can tell.
_COUNT_ACCESS_OF_USER = """
    SELECT count(*) FROM (
        SELECT FROM interview_userinterviewaccess WHERE user_id = %(user_id)s LIMIT %(at_most)s
    ) AS standing
"""
_COUNT_ACCESS = """
    SELECT count(*) FROM interview_userinterviewaccess
    WHERE user_id = %(user_id)s AND interview_id = ANY (CAST(%(interview_ids)s AS uuid[]))
"""
_HAVE_ACCESS = """
    SELECT EXISTS (
        SELECT FROM interview_userinterviewaccess WHERE user_id = ANY (CAST(%(user_ids)s AS text[]))
    )
"""

_HOLD_INTERVIEWS = """
    WITH held AS (
        SELECT FROM interview_interview
        WHERE id = ANY (CAST(%(interview_ids)s AS uuid[])) ORDER BY id FOR KEY SHARE
    )
    SELECT count(*) FROM held
"""

# Names what is missing, not what is there: the answer is short for a job of any size. A CTE that
# locks rows is run to its end, so every interview that stands is held.
_FIND_UNKNOWN_INTERVIEWS = """
    WITH held AS (
        SELECT id FROM interview_interview
        WHERE id = ANY (CAST(%(interview_ids)s AS uuid[])) ORDER BY id FOR KEY SHARE
    )
    SELECT wanted.id::text FROM unnest(CAST(%(interview_ids)s AS uuid[])) AS wanted (id)
    WHERE NOT EXISTS (SELECT FROM held WHERE held.id = wanted.id)
"""

_INSERT_ACCESS = """
    INSERT INTO interview_userinterviewaccess (user_id, interview_id)
    SELECT user_id, interview_id FROM {source} ORDER BY user_id COLLATE "C", interview_id {conflict}
"""
_PRODUCT = """
    WITH wanted AS (
        SELECT user_id, interview_id
        FROM unnest(CAST(%(user_ids)s AS text[])) AS users (user_id)
        CROSS JOIN unnest(CAST(%(interview_ids)s AS uuid[])) AS interviews (interview_id)
    )
"""
# No join, whose plan would hang on what is known of a table that grows; and of each user a range of
# the key is read in its order.
_MISSING_OF_PRODUCT = """
    unnest(CAST(%(user_ids)s AS text[])) AS users (user_id)
    CROSS JOIN LATERAL (
        SELECT interview_id FROM unnest(CAST(%(interview_ids)s AS uuid[])) AS wanted (interview_id)
        EXCEPT
        SELECT interview_id FROM interview_userinterviewaccess AS standing
        WHERE standing.user_id = users.user_id
          AND interview_id BETWEEN CAST(%(first)s AS uuid) AND CAST(%(last)s AS uuid)
    ) AS missing"""
_MIXTURE = """
    WITH wanted AS (
        SELECT users.user_id, grants.interview_id, grants.owner
        FROM unnest(CAST(%(owners)s AS int[]), CAST(%(interview_ids)s AS uuid[]))
             AS grants (owner, interview_id)
        JOIN unnest(CAST(%(user_ids)s AS text[])) WITH ORDINALITY AS users (user_id, number)
          ON users.number = grants.owner + 1
    )
"""
_MISSING_OF_MIXTURE = """wanted WHERE NOT EXISTS (
        SELECT FROM interview_userinterviewaccess AS standing
        WHERE standing.user_id = wanted.user_id AND standing.interview_id = wanted.interview_id
    )"""
# Counted in the database: no timeout ends a backend that blocks on sending rows to its client.
_BY_USER = """, created AS ({insert} RETURNING user_id)
    SELECT user_id, count(*) FROM created GROUP BY user_id
"""
_BY_ORDER = """, created AS ({insert} RETURNING user_id, interview_id)
    SELECT wanted.owner, count(*) FROM created JOIN wanted USING (user_id, interview_id)
    GROUP BY wanted.owner
"""


@dataclass(frozen=True, slots=True)
class _CreateAccess:
    """Makes grants.

    Attributes:
        product: How many there are is the statement's row count.
        product_by_user: Counted by user.
        mixture: As of a product.
        mixture_by_order: Counted by the number of the order.
    """

    product: str
    product_by_user: str
    mixture: str
    mixture_by_order: str

    @classmethod
    def by(
        cls, *, of_product: str = "wanted", of_mixture: str = "wanted", conflict: str = ""
    ) -> _CreateAccess:
        product = _INSERT_ACCESS.format(source=of_product, conflict=conflict)
        mixture = _INSERT_ACCESS.format(source=of_mixture, conflict=conflict)
        return cls(
            _PRODUCT + product,
            _PRODUCT + _BY_USER.format(insert=product),
            _MIXTURE + mixture,
            _MIXTURE + _BY_ORDER.format(insert=mixture),
        )


# Rows that are known not to stand go in at COPY's pace where no conflict is provided for
# (docs/performance.md); where somebody else makes the same row meanwhile, this one fails.
_CREATE_ALL = _CreateAccess.by()
_CREATE_MISSING = _CreateAccess.by(of_product=_MISSING_OF_PRODUCT, of_mixture=_MISSING_OF_MIXTURE)
# Without the conflict's columns a collision of the primary key would be swallowed too.
_CREATE_IN_A_RACE = _CreateAccess.by(conflict="ON CONFLICT (user_id, interview_id) DO NOTHING")
_MANY = 1_000
"""Grants, or ids, for which a savepoint, a look at what stands and a plan of their own cost less
than they save."""

_TOGETHER = 10_000
"""Ids of which something is made at once: of a million it would take a hundred MB."""


@dataclass(frozen=True)
class DatabaseLimits:
    """How long PostgreSQL lets one transaction of ours go on, in seconds.

    Attributes:
        lock: A wait for one lock.
        several: The same in a transaction of several jobs, which are then done one by one.
        busy: A wait for the lock of a job that another transaction holds.
        unresponsive: How long that transaction may wait for its client before it is ended: its
            worker is dead, cut off or frozen.
        statement: One statement.
        idle: A transaction between two statements.
        look: A reply that is missing, before the server is asked whether it is working on it.
    """

    lock: float = 20
    several: float = 1
    busy: float = 1
    unresponsive: float = 10
    statement: float = 120
    idle: float = 60
    look: float = LOOK_SECONDS

    @cached_property
    def settings(self) -> Mapping[str, str]:
        """What each transaction sets, as PostgreSQL writes it."""
        return {"statement": f"{self.statement}s", "idle": f"{self.idle}s"}


class PostgresStorage(InterviewStorageInterface):
    """The store on PostgreSQL. Make one in each process: connections do not survive a fork."""

    def __init__(
        self, database_url: str, *, chunk_size: int = 10_000, limits: DatabaseLimits | None = None
    ) -> None:
        """Connects at the first use.

        Args:
            database_url: ``postgresql://…``, with or without ``+psycopg``.
            chunk_size: Grants inserted by one statement.
            limits: Bounds in time.

        Raises:
            StorageError: if the URL is not a PostgreSQL URL.
        """
        self._limits = limits or DatabaseLimits()
        self._engine = open_engine(
            parsed(database_url),
            application_name="interview-access-worker",
            look_seconds=self._limits.look,
            reply_seconds=self._limits.statement + _REPLY_SECONDS,
            pool_size=1,
            max_overflow=-1,  # a worker's child has one thread and keeps one connection
        )
        event.listen(self._engine, "connect", _teach_uuids)
        self._chunk_size = chunk_size

    @contextmanager
    def transaction(self) -> Iterator[PostgresTransaction]:
        """See the interface."""
        with driver_errors_translated():
            connection = self._engine.connect()
        try:
            transaction = PostgresTransaction(connection, self._chunk_size, self._limits)
            yield transaction
            with driver_errors_translated():
                connection.commit()
        except StorageError as error:
            if error.needs_new_connection:
                with driver_errors_translated():
                    connection.invalidate()
            raise
        finally:
            with driver_errors_translated():
                connection.close()

    def get_finished_job(self, job_id: str) -> FinishedJobDTO | None:
        """See the interface."""
        with self.transaction() as transaction:
            finished = transaction.find_jobs([job_id]).finished.get(job_id)
            return finished and transaction.with_details(finished)

    def get_request(self, job_id: str) -> AccessRequestDTO | None:
        """See the interface."""
        with self.transaction() as transaction:
            return transaction.request(job_id)

    def make_requests_due(self) -> None:
        """See the interface."""
        with self.transaction() as transaction:
            transaction.make_requests_due()

    def has_due_requests(self) -> bool:
        """See the interface: one cheap statement, since an idle worker executes no other."""
        with self._session() as connection:
            driver: Any = connection.driver_connection
            ((has_due,),) = driver.execute(_HAS_DUE_REQUESTS).fetchall()
            driver.commit()
        return bool(has_due)

    def wait_for_requests(self, seconds: float, wakeup: HasFileno | None = None) -> bool | None:
        """See the interface: a pooler has no session that notifications reach."""
        with self._session() as connection:
            return RequestNotifications.of(connection).wait(seconds, wakeup)

    @contextmanager
    def _session(self) -> Iterator[PoolProxiedConnection]:
        """The driver's connection, without SQLAlchemy's transactions."""
        with driver_errors_translated():
            connection = self._engine.raw_connection()
            try:
                yield connection
            except psycopg.Error as error:
                connection.invalidate(error)
                raise
            finally:
                connection.close()

    def is_cancelled(self, job_id: str) -> bool:
        """See the interface."""
        with self.transaction() as transaction:
            return bool(transaction.find_cancelled_jobs([job_id]))

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()


class PostgresTransaction(InterviewTransactionInterface):
    """One transaction on one connection."""

    def __init__(self, connection: Connection, chunk_size: int, limits: DatabaseLimits) -> None:
        self._held: Collection[str] = ()
        self._granted: tuple[str, Collection[str]] = ("", ())
        self._connection = connection
        self._limits = limits
        self._chunk_size = chunk_size
        self._begun = False

    def _query(
        self, statement: str | Executable, parameters: Any = None
    ) -> Sequence[Row[*tuple[Any, ...]]]:
        """Execute a statement and fetch its rows."""
        with driver_errors_translated():
            return self._run(statement, parameters).all()

    def _value(self, statement: str, parameters: Any) -> Any:
        """Execute a statement that returns one value."""
        ((value,),) = self._query(statement, parameters)
        return value

    def _execute(self, statement: str | Executable, parameters: Any = None) -> int:
        """Execute a statement; the number of rows that it changed."""
        with driver_errors_translated():
            return self._run(statement, parameters).rowcount

    def _run(self, statement: str | Executable, parameters: Any) -> CursorResult[*tuple[Any, ...]]:
        """Execute a statement; text goes to the driver as it is, without being compiled."""
        if not self._begun:
            self._begin(_SETTINGS, lock=self._limits.lock)
        if isinstance(statement, str):
            return self._connection.exec_driver_sql(statement, parameters)
        return self._connection.execute(statement, parameters)

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        """Undo what the block did where it raises; the transaction can go on."""
        with driver_errors_translated():
            savepoint = self._connection.begin_nested()
        try:
            yield
        except BaseException:
            with suppress(StorageError), driver_errors_translated():
                savepoint.rollback()
            raise
        with driver_errors_translated():
            savepoint.commit()

    def _begin(
        self, statement: str, *, lock: float, **others: object
    ) -> Sequence[Row[*tuple[Any, ...]]]:
        """Execute a statement with the transaction's settings, the first one where that can be."""
        parameters = {**self._limits.settings, "lock": f"{lock}s", **others}
        is_first, self._begun = not self._begun, True
        try:
            rows = self._connection.exec_driver_sql(statement, parameters).all()
        except DBAPIError as error:
            if not (is_first and error.connection_invalidated):
                raise
            self._connection.rollback()  # the pool's connection was lost since its last use
            rows = self._connection.exec_driver_sql(statement, parameters).all()
        driver: Any = self._connection.connection.driver_connection
        driver.server_pid = rows[0].pid
        return rows

    def lock_jobs(self, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
        """See the interface."""
        if not job_ids:
            return frozenset()
        ids = {"job_ids": list(job_ids)}
        patience = self._limits.lock if wait else self._limits.several
        with driver_errors_translated():
            rows = self._begin(_TRY_LOCK_JOBS, lock=patience, **ids)
        ours = frozenset(job_id for job_id, got, _ in rows if got)
        if not wait or len(ours) == len(job_ids):
            return ours
        if not self._get_locks(ids):
            ended = self._end_unresponsive_holders(ids)
            if not (ended and self._get_locks(ids)) and not self._are_held_by_other_roles(ids):
                raise JobBusyError("another transaction holds the job's lock")
        return frozenset(job_ids)

    def _are_held_by_other_roles(self, ids: Mapping[str, object]) -> bool:
        """Whether no worker holds the locks; the ledger's key alone then decides who is first."""
        return bool(self._query(_HELD_BY_OTHER_ROLES, ids)[0][0])

    def _get_locks(self, ids: Mapping[str, object]) -> bool:
        """Wait shortly for the jobs' locks."""
        try:
            with self._savepoint():
                self._execute(_LOCK_TIMEOUT, {"lock": f"{self._limits.busy}s"})
                self._execute(_LOCK_JOBS, ids)
                self._execute(_LOCK_TIMEOUT, {"lock": f"{self._limits.lock}s"})
        except StorageError as error:
            if error.sqlstate != _LOCK_NOT_HAD:
                raise
            return False
        return True

    def _end_unresponsive_holders(self, ids: Mapping[str, object]) -> bool:
        """End the transactions that hold the jobs' locks and wait for a client that is gone."""
        limits = {
            "unresponsive": f"{self._limits.unresponsive}s",
            "statement": f"{self._limits.statement}s",
        }
        try:
            with self._savepoint():
                ended = self._query(_END_UNRESPONSIVE_HOLDERS, {**ids, **limits})
        except StorageError as error:
            if error.sqlstate != _NOT_PERMITTED:
                raise
            return False
        return bool(ended)

    def find_jobs(self, job_ids: Collection[str]) -> FoundJobsDTO:
        """See the interface."""
        rows = self._query(_FIND_JOBS, {"job_ids": list(job_ids)})
        return FoundJobsDTO(
            {row.job_id: _finished_job(row) for row in rows if row.state},
            frozenset(row.job_id for row in rows if row.is_cancelled),
        )

    def with_details(self, finished: FinishedJobDTO) -> FinishedJobDTO:
        """The same with what is not read with other jobs' answers."""
        rejected = self._query(
            select(
                models.rejections.c.unknown_interview_ids,
                models.rejections.c.malformed_interview_ids,
            ).where(models.rejections.c.job_id == finished.job.job_id)
        )
        by_user = self._query(
            select(models.cohorts.c.created_by_user).where(
                models.cohorts.c.job_id == finished.job.job_id
            )
        )
        answer = replace(
            finished.answer,
            created_by_user=next((counts for (counts,) in by_user), None),
            rejected=next((RejectedIdsDTO(*map(tuple, row)) for row in rejected), None),
        )
        return replace(finished, answer=answer)

    def request_cancellation(self, job_id: str) -> None:
        """See the interface."""
        self._execute(upsert(models.cancellations).values(job_id=job_id).on_conflict_do_nothing())

    def find_cancelled_jobs(self, job_ids: Collection[str]) -> frozenset[str]:
        """See the interface."""
        found = self._query(_FIND_CANCELLED_JOBS, {"job_ids": list(job_ids)})
        return frozenset(job_id for (job_id,) in found)

    def find_unknown_interviews(
        self, interview_ids: Collection[str], *, granted_to: str | None = None
    ) -> frozenset[str]:
        """See the interface."""
        if not interview_ids:
            return frozenset()
        wanted = {"interview_ids": _UuidArray.of(sorted(interview_ids))}
        count = len(interview_ids)
        with self._planned_for(count):
            if granted_to and count >= _MANY and self._all_stand(granted_to, count, wanted):
                self._granted = (granted_to, interview_ids)
                return frozenset()
            if self._value(_HOLD_INTERVIEWS, wanted) == count:
                self._held = interview_ids
                return frozenset()
            unknown = self._query(_FIND_UNKNOWN_INTERVIEWS, wanted)
            return frozenset(interview_id for (interview_id,) in unknown)

    @contextmanager
    def _planned_for(self, size: int) -> Iterator[None]:
        """Have statements on many things planned for just those.

        A plan that serves arrays of any length is made for ten elements: it may compare each of
        100,000 ids with each of 100,000 rows.
        """
        driver: Any = self._connection.connection.driver_connection
        threshold = driver.prepare_threshold
        if size >= _MANY:
            driver.prepare_threshold = None
        try:
            yield
        finally:
            driver.prepare_threshold = threshold

    def _all_stand(self, user_id: str, count: int, wanted: Mapping[str, _UuidArray]) -> bool:
        """Whether a user has been granted all of so many interviews."""
        of_user = {"user_id": user_id, "at_most": count}
        if self._value(_COUNT_ACCESS_OF_USER, of_user) < count:
            return False
        of_these = {"user_id": user_id, **wanted}
        return bool(self._value(_COUNT_ACCESS, of_these) == count)

    def get_interview_details(self, interview_ids: Collection[str]) -> Sequence[InterviewDTO]:
        """See the interface."""
        interview, config = models.interviews.c, models.interview_configs.c
        rows = self._query(
            select(
                interview.id,
                interview.title,
                interview.description,
                interview.duration,
                config.is_default_access_allowed,
                config.should_end_interview_after_duration,
            )
            .outerjoin(models.interview_configs, config.interview_id == interview.id)
            .where(interview.id.in_(interview_ids))
            .order_by(interview.id)
            .with_for_update(read=True, key_share=True, of=models.interviews)
        )
        return [_interview(row) for row in rows]

    def get_existing_user_access(
        self, user_ids: Collection[str]
    ) -> Sequence[UserInterviewAccessDTO]:
        """See the interface."""
        rows = self._query(
            select(models.grants.c.user_id, models.grants.c.interview_id).where(
                models.grants.c.user_id.in_(user_ids)
            )
        )
        return [UserInterviewAccessDTO(row.user_id, str(row.interview_id)) for row in rows]

    def bulk_create_user_access(
        self, orders: Sequence[AccessOrderDTO], on_chunk: ChunkDone | None = None
    ) -> Sequence[int]:
        """See the interface."""
        counts = [0] * len(orders)
        chunks = _chunks(orders, self._chunk_size)
        done, total = 0, sum(chunk.size for chunk in chunks)
        create = self._fastest_way(orders, total)
        for chunk in chunks:
            with self._planned_for(total):
                for number, created in self._create(chunk, create) if create else ():
                    counts[number] += created
            done += chunk.size
            if on_chunk:
                on_chunk(done, total)
        # The keys are declared deferred; checked here, one that fails does so in its own words and
        # not in those of a COMMIT. Of an interview that is held none fails.
        if create and not _all_within(self._held, orders):
            self._execute("SET CONSTRAINTS ALL IMMEDIATE")
        return counts

    def _fastest_way(self, orders: Sequence[AccessOrderDTO], total: int) -> _CreateAccess | None:
        """How to make so many grants, of which some may stand; None where all are known to."""
        if total < _MANY:
            return _CREATE_IN_A_RACE
        user_id, granted = self._granted
        if all(one.user_id == user_id for one in orders) and _all_within(granted, orders):
            return None
        users = {"user_ids": [order.user_id for order in orders]}
        standing = self._value(_HAVE_ACCESS, users)
        return _CREATE_MISSING if standing else _CREATE_ALL

    def _create(self, chunk: _Chunk, create: _CreateAccess) -> Iterable[tuple[int, int]]:
        """Make a chunk's grants that are missing; how many each order added, 0 perhaps left out."""
        if create is not _CREATE_IN_A_RACE:
            try:
                with self._savepoint():
                    return self._create_by(create, chunk)
            except StorageError as error:
                if error.sqlstate != _NOT_UNIQUE:
                    raise
            except _RowsKeptOutError:
                pass  # they are counted one by one
        return self._create_by(_CREATE_IN_A_RACE, chunk)

    def _create_by(self, create: _CreateAccess, chunk: _Chunk) -> Iterable[tuple[int, int]]:
        if create is _CREATE_ALL:
            statement = create.mixture if isinstance(chunk, _Mixture) else create.product
            made = self._execute(statement, chunk.parameters)
            if made != chunk.size:
                raise _RowsKeptOutError
            return chunk.counts.items()
        if isinstance(chunk, _Mixture):
            rows = self._query(create.mixture_by_order, chunk.parameters)
            return [(number, created) for number, created in rows]
        if len(chunk.numbers) == 1:
            made = self._execute(create.product, chunk.parameters)
            return [(number, made) for number in chunk.numbers.values()]
        rows = self._query(create.product_by_user, chunk.parameters)
        return [(chunk.numbers[user_id], created) for user_id, created in rows]

    def create_interview_attempt(self, attempts: Sequence[InterviewAttemptDTO]) -> None:
        """See the interface."""
        if not attempts:
            return
        rows = [asdict(attempt) for attempt in attempts]
        self._execute(insert(models.interview_attempts), rows)
        self._execute("SET CONSTRAINTS ALL IMMEDIATE")

    def record_jobs(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """See the interface."""
        if not jobs:
            return
        entries = json.dumps([_ledger_row(job) for job in jobs])
        try:
            recorded = self._execute(_RECORD_JOBS, {"jobs": entries})
        except StorageError as error:
            if error.sqlstate != _NOT_UNIQUE:
                raise
            raise LedgerConflictError("another transaction has recorded one of the jobs") from error
        if recorded != len(jobs):
            raise LedgerError(f"{len(jobs)} jobs to record, but {recorded} rows were inserted")
        for table, details in (
            (models.rejections, {job.job.job_id: _rejected(job.answer) for job in jobs}),
            (models.cohorts, {job.job.job_id: _by_user(job.answer) for job in jobs}),
        ):
            rows = [{"job_id": job_id, **found} for job_id, found in details.items() if found]
            if rows:
                put = upsert(table)
                columns = {name: put.excluded[name] for name in rows[0] if name != "job_id"}
                put = put.on_conflict_do_update(index_elements=["job_id"], set_=columns)
                self._execute(put, rows)

    def request(self, job_id: str) -> AccessRequestDTO | None:
        """The request under this id, if there is one."""
        rows = self._query(_GET_REQUEST, {"job_id": job_id})
        return next(map(_request, rows), None)

    def take_due_requests(
        self, limit: int, *, page_bytes: int = MAX_REQUEST_BYTES
    ) -> Sequence[AccessRequestDTO]:
        """See the interface."""
        bounds = {"limit": limit, "page_bytes": page_bytes, "request_bytes": MAX_REQUEST_BYTES}
        rows = self._query(_TAKE_DUE_REQUESTS, bounds)
        return [replace(_request(row), is_too_large=row.is_too_large) for row in rows]

    def forget_answered_requests(self, job_ids: Collection[str]) -> frozenset[str]:
        """See the interface."""
        answered = select(models.jobs.c.job_id).where(models.jobs.c.job_id.in_(job_ids))
        forgotten = self._query(
            delete(models.requests)
            .where(models.requests.c.job_id.in_(answered))
            .returning(models.requests.c.job_id)
        )
        return frozenset(job_id for (job_id,) in forgotten)

    def look_again_at_requests(self, job_ids: Collection[str], *, sent: bool) -> None:
        """See the interface."""
        self._execute(_LOOK_AGAIN_AT_REQUESTS, {"job_ids": list(job_ids), "sent": sent})

    def make_requests_due(self) -> None:
        """Make every outbox request due now."""
        now = func.clock_timestamp()
        self._execute(
            update(models.requests).where(models.requests.c.look_at > now).values(look_at=now)
        )


class _RowsKeptOutError(Exception):
    """Fewer rows were made than grants inserted: a trigger of the table's keeps some out."""


@dataclass(frozen=True, slots=True)
class _Product:
    """Grants of users who all want the same interviews.

    Attributes:
        numbers: Of each user's order.
    """

    numbers: Mapping[str, int]
    interview_ids: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.numbers) * len(self.interview_ids)

    @property
    def counts(self) -> Mapping[int, int]:
        """How many grants each order asks for."""
        return dict.fromkeys(self.numbers.values(), len(self.interview_ids))

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "user_ids": list(self.numbers),
            "interview_ids": _UuidArray.of(self.interview_ids),
            "first": self.interview_ids[0],
            "last": self.interview_ids[-1],
        }


@dataclass(frozen=True, slots=True)
class _Mixture:
    """Grants of orders that each want their own.

    Attributes:
        user_ids: Of all orders.
        owners: The number of the order that each grant counts for.
    """

    user_ids: Sequence[str]
    owners: Sequence[int]
    interview_ids: Sequence[str]

    @property
    def size(self) -> int:
        return len(self.owners)

    @property
    def counts(self) -> Mapping[int, int]:
        """How many grants each order asks for first."""
        return Counter(self.owners)

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "user_ids": self.user_ids,
            # A literal: psycopg would inspect each element of a list.
            "owners": "{" + ",".join(map(str, self.owners)) + "}",
            "interview_ids": _UuidArray.of(self.interview_ids),
        }


_Chunk = _Product | _Mixture
"""Grants that one statement makes."""


def _chunks(orders: Sequence[AccessOrderDTO], size: int) -> Sequence[_Chunk]:
    """All grants asked for, each once, by user and interview."""
    # Code points sort as UTF-8 bytes do, and canonical UUID text as uuid: PostgreSQL's own orders.
    numbers = {order.user_id: number for number, order in enumerate(orders)}
    wanted = orders[0].interview_ids if orders else ()
    if len(numbers) < len(orders) or any(order.interview_ids != wanted for order in orders):
        owners, interview_ids = _in_lock_order(orders)
        user_ids = [order.user_id for order in orders]
        return [
            _Mixture(user_ids, owners[start : start + size], interview_ids[start : start + size])
            for start in range(0, len(owners), size)
        ]
    ids, users = sorted(wanted), sorted(numbers)
    together = max(size // len(ids), 1) if ids else 1
    return [
        _Product({user: numbers[user] for user in users[first : first + together]}, some)
        for first in range(0, len(users), together)
        for start in range(0, len(ids), size)
        if (some := ids[start : start + size])
    ]


def _all_within(interview_ids: Collection[str], orders: Sequence[AccessOrderDTO]) -> bool:
    """Whether no order wants others; most often they want just the same ones, of one job."""
    others = [order for order in orders if order.interview_ids is not interview_ids]
    known = frozenset(interview_ids if others else ())
    return all(known.issuperset(order.interview_ids) for order in others)


def _in_lock_order(orders: Sequence[AccessOrderDTO]) -> tuple[list[int], list[str]]:
    """The number of the order that each grant counts for, the first that asks; and the ids."""
    by_user: dict[str, list[int]] = {}
    for number, order in enumerate(orders):
        by_user.setdefault(order.user_id, []).append(number)
    owners: list[int] = []
    interview_ids: list[str] = []
    for user_id in sorted(by_user):
        first: dict[str, int] = {}
        for number in by_user[user_id]:
            first = dict.fromkeys(orders[number].interview_ids, number) | first
        ordered = sorted(first)
        interview_ids += ordered
        owners += map(first.__getitem__, ordered)
    return owners, interview_ids


@dataclass(frozen=True, slots=True)
class _UuidArray:
    """Canonical ids as PostgreSQL reads an array of UUIDs that is sent in binary.

    To read many of them out of text takes the server longer than to find their rows does, and
    psycopg's own array makes an object of each. The format is that of array_recv, in PostgreSQL's
    src/backend/utils/adt/arrayfuncs.c.
    """

    content: bytearray

    @classmethod
    def of(cls, interview_ids: Sequence[str]) -> _UuidArray:
        dimensions, nulls, first = 1, 0, 1
        head = struct.pack("!iiIii", dimensions, nulls, _UUID_OID, len(interview_ids), first)
        length = f"{16:08x}"  # in bytes, before each of them
        content = bytearray(head)
        for at in range(0, len(interview_ids), _TOGETHER):
            some = length.join(["", *interview_ids[at : at + _TOGETHER]])
            content += bytes.fromhex(some.replace("-", ""))
        return cls(content)


class _UuidArrayDumper(Dumper):
    format = Format.BINARY
    oid = psycopg.adapters.types["uuid"].array_oid

    def dump(self, obj: _UuidArray) -> bytearray:
        return obj.content


def _teach_uuids(connection: psycopg.Connection[Any], _: object) -> None:
    connection.adapters.register_dumper(_UuidArray, _UuidArrayDumper)


def _ledger_row(job: FinishedJobDTO) -> dict[str, Any]:
    answer = job.answer
    return {
        "job_id": job.job.job_id,
        "task": job.job.task,
        "state": answer.state,
        "user_id": job.job.user_id,
        "request_digest": job.job.request_digest,
        "result": answer.result,
        "error": answer.error,
        **(asdict(answer.figures) if answer.figures else {}),
    }


def _rejected(answer: AnswerDTO) -> dict[str, Any]:
    rejected = answer.rejected
    return (
        {
            "unknown_interview_ids": rejected.unknown,
            "malformed_interview_ids": rejected.malformed,
        }
        if rejected
        else {}
    )


def _by_user(answer: AnswerDTO) -> dict[str, Any]:
    by_user = answer.created_by_user
    return {} if by_user is None else {"created_by_user": by_user}


def _finished_job(row: Row[Any]) -> FinishedJobDTO:
    figures = (
        FiguresDTO(row.requested, row.repeated, row.already_granted, row.created)
        if row.requested is not None
        else None
    )
    return FinishedJobDTO(
        JobDTO(row.job_id, row.task, row.user_id, row.request_digest),
        AnswerDTO(row.state, row.result, row.error, figures),
        row.finished_at,
    )


def _request(row: Row[*tuple[Any, ...]]) -> AccessRequestDTO:
    return AccessRequestDTO(
        row.job_id, row.user_id, tuple(row.interview_ids), row.requested_at, row.sent_at
    )


def _interview(row: Row[*tuple[Any, ...]]) -> InterviewDTO:
    configured = row.should_end_interview_after_duration is not None
    return InterviewDTO(
        id=str(row.id),
        title=row.title,
        description=row.description,
        duration=row.duration,
        is_default_access_allowed=row.is_default_access_allowed if configured else False,
        should_end_interview_after_duration=(
            row.should_end_interview_after_duration if configured else True
        ),
    )
