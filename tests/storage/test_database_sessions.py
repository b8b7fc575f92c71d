"""What a database session depends on, and what it leaves behind: errors, settings, privileges."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from uuid import uuid4

import pytest
from sqlalchemy import NullPool, make_url
from sqlalchemy.exc import OperationalError

from storage.connections import open_engine, parsed
from storage.dtos import AccessRequestDTO, InterviewAttemptDTO, RequestedGrantsDTO
from storage.errors import JobBusyError, LedgerConflictError, LedgerError, StorageError
from storage.interface import Storage
from storage.migrations import locks
from storage.postgres import DatabaseLimits, PostgresStorage, PostgresTransaction
from tests.storage.test_storage_conformance import ends_with, finish, finished
from tests.support.database import role
from tests.support.relay import Pair, SocketRelay
from tests.support.stores import PATIENCE_SECONDS, Background, PostgresStore, an_interview, until

NOON = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)


def with_options(database_url: str, **options: str) -> str:
    """The URL with more connection options."""
    url = make_url(database_url).update_query_dict(options)
    return url.render_as_string(hide_password=False)


@contextmanager
def storage_of(database_url: str) -> Iterator[PostgresStorage]:
    """A storage on a database, closed at the end."""
    storage = PostgresStorage(database_url)
    try:
        yield storage
    finally:
        storage.close()


class TestOutage:
    """Which errors are about one job, and which tell that no other job would fare better."""

    @pytest.mark.parametrize(
        "sqlstate",
        [
            None,  # no server replied
            *("08006", "08P01", "28P01", "3D000"),  # no connection
            *("53100", "53300", "57P01", "57P03", "58030"),  # the server is full, ends or fails
            *("25006", "42501", "42P01", "42703", "42P10", "55000", "F0000"),  # not set up for us
            *("HV000", "ZZ999"),  # nothing that we know of
        ],
    )
    def test_anything_unknown_is_an_outage(self, sqlstate: str | None) -> None:
        """An error is an outage unless its code is known to be about one job."""
        assert StorageError("reason", sqlstate).is_outage

    @pytest.mark.parametrize(
        "sqlstate",
        [
            *("21000", "22001", "22P02", "23503", "23505", "40001", "40P01", "44000", "54000"),
            *("P0001", "XX000", "XX001", "55P03", "57014"),
            *("25P02", "25P03", "25P04", "26000", "42P05", "0A000"),
        ],
    )
    def test_what_concerns_one_job_is_none(self, sqlstate: str) -> None:
        """Values, rows, locks and the state of one connection are no outage."""
        assert not StorageError("reason", sqlstate).is_outage

    def test_busy_jobs_and_defects_are_none(self) -> None:
        """A busy job and a contradiction in the ledger concern the jobs at hand."""
        assert not JobBusyError("reason").is_outage
        assert not LedgerError("reason").is_outage


class TestDriverErrors:
    """No exception of SQLAlchemy or psycopg leaves the storage."""

    def test_an_option_that_is_none_of_libpq(self, migrated_url: str) -> None:
        """A connection option of another driver's is an outage: jobs wait until it is mended."""
        with (
            pytest.raises(StorageError, match="options of libpq only, without schema") as caught,
            storage_of(with_options(migrated_url, schema="public")) as storage,
        ):
            storage.is_cancelled("a")
        assert caught.value.is_outage

    @pytest.mark.parametrize(
        "url",
        [
            "mysql://ann:geheim@db/x",
            "postgresql://ann:ge@heim@db/x",
            "postgresql://ann:geheim@db:port/x",
            "postgresql://db/x?host=a:1&host=b:2&port=3&password=geheim",
            "postgresql://ann:geheim@/x?host=/nonexistent&connect_timeout=soon",
            "postgresql://ann:geheim@/x?host=/nonexistent&sslmode=perhaps",
            "geheim",
        ],
    )
    def test_a_url_that_leads_nowhere(self, url: str) -> None:
        """Whatever is wrong with the URL is an outage, told without any part of its password."""
        with pytest.raises(StorageError) as caught, storage_of(url) as storage:
            storage.is_cancelled("a")
        assert caught.value.is_outage
        assert "geheim" not in str(caught.value)
        assert "heim" not in str(caught.value)

    def test_a_value_that_python_cannot_hold(self, postgres: PostgresStore) -> None:
        """A row that the driver cannot read is about the job that reads it."""
        with pytest.raises(StorageError) as caught, postgres.storage.transaction() as transaction:
            transaction.query("SELECT 'infinity'::timestamptz")
        assert not caught.value.is_outage

    def test_a_missing_privilege(self, postgres: PostgresStore) -> None:
        """A privilege that is missing is an outage."""
        with role(postgres.database_url) as url, storage_of(url) as storage:
            with pytest.raises(StorageError) as caught:
                storage.is_cancelled("a")
            assert caught.value.sqlstate == "42501"
            assert caught.value.is_outage


class TestFailedTransaction:
    """What becomes of a transaction's connection when it fails."""

    @pytest.mark.parametrize(
        "error",
        [
            JobBusyError("another transaction holds the job's lock"),
            LedgerError("a defect"),
            StorageError("an interview is missing", "23503"),
            ValueError("none of the storage's"),
        ],
    )
    def test_one_job_s_error_keeps_it(self, postgres: PostgresStore, error: Exception) -> None:
        """After an error that concerns one job the connection is rolled back and serves on."""
        before = server_process(postgres.storage)
        with ends_with(type(error), postgres.storage) as transaction:
            transaction.request_cancellation("a")
            raise error
        assert server_process(postgres.storage) == before
        assert not postgres.storage.is_cancelled("a")

    @pytest.mark.parametrize("sqlstate", [None, "57P01", "26000", "42P05", "0A000"])
    def test_an_outage_or_a_stale_statement_closes_it(
        self, postgres: PostgresStore, sqlstate: str | None
    ) -> None:
        """After an outage, and for a prepared statement that is stale, a new one is opened."""
        before = server_process(postgres.storage)
        with ends_with(StorageError, postgres.storage) as transaction:
            transaction.request_cancellation("a")
            raise StorageError("reason", sqlstate)
        assert server_process(postgres.storage) != before
        assert not postgres.storage.is_cancelled("a")


def server_process(storage: Storage) -> int:
    """The process of the server that serves a storage's only connection."""
    with storage.transaction() as transaction:
        assert isinstance(transaction, PostgresTransaction)
        return int(transaction.value("SELECT pg_backend_pid()", None))


SETTINGS = [
    ("DateStyle", "German"),
    ("DateStyle", "SQL, DMY"),
    ("IntervalStyle", "iso_8601"),
    ("IntervalStyle", "sql_standard"),
    ("IntervalStyle", "postgres_verbose"),
    ("TimeZone", "Asia/Kolkata"),
    ("client_encoding", "LATIN1"),
    ("client_encoding", "SQL_ASCII"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("standard_conforming_strings", "off"),
    ("array_nulls", "off"),
    ("extra_float_digits", "-15"),
    ("transaction_timeout", "250ms"),
    ("statement_timeout", "250ms"),
    ("lock_timeout", "250ms"),
    ("idle_in_transaction_session_timeout", "250ms"),
    ("row_security", "off"),
    ("track_activities", "off"),
]
"""What a server, a database or a role may have set."""


class TestSettings:
    """Results depend on no default of server, database or role."""

    @pytest.mark.parametrize(("setting", "value"), SETTINGS)
    def test_results_are_the_same(self, postgres: PostgresStore, setting: str, value: str) -> None:
        """A database's own setting changes neither what is stored nor what is read."""
        interview = an_interview(
            title="Zoë 日本語 \\' %s", duration=timedelta(days=-1, hours=40, microseconds=7)
        )
        postgres.add_interview(interview)
        postgres.configure(setting, value)
        request = AccessRequestDTO("r", "Zoë 日本語", ("NULL", None, "\\"), NOON)
        postgres.add_request(request)
        with postgres.another() as storage:
            with storage.transaction() as transaction:
                transaction.lock_jobs(["日本語"], wait=True)
                transaction.query("SELECT pg_sleep(0.3)")  # longer than the timeouts above
                assert transaction.get_interview_details([interview.id]) == [interview]
                transaction.create_interview_attempt(
                    [InterviewAttemptDTO(str(uuid4()), interview.id, "Zoë", NOON, None, NOON)]
                )
                order = RequestedGrantsDTO("Zoë 日本語", (interview.id,))
                assert transaction.bulk_create_user_access([order]) == [1]
                transaction.record_jobs([finished("a")])
                assert transaction.lock_due_requests(10) == [request]
            again = storage.get_finished_job("a")
        assert again == finished("a")
        assert again.finished_at
        assert abs(datetime.now(UTC) - again.finished_at) < timedelta(minutes=5)
        (attempt,) = postgres.attempts()
        assert attempt.start_datetime == attempt.scheduled_end_datetime == NOON
        assert postgres.granted("Zoë 日本語") == [interview.id]

    def test_nothing_is_left_on_the_connection(self, postgres: PostgresStore) -> None:
        """After a transaction its session has no setting and no lock that it did not have before.

        A pooler gives the session to another service next.
        """
        finish(postgres.storage, finished("a"))
        with postgres.storage._engine.connect() as connection:
            settings = (
                "SELECT name, setting FROM pg_settings"
                " WHERE source = 'session' AND NOT starts_with(name, 'transaction')"
            )
            assert connection.exec_driver_sql(settings).all() == []
            locks = "SELECT * FROM pg_locks WHERE locktype = 'advisory'"
            assert connection.exec_driver_sql(locks).all() == []


class Relay(SocketRelay):
    """A way to a server that forgets its connections and serves new ones, as a firewall may."""

    def __init__(self, server: str, port: int = 0) -> None:
        self.is_used = False
        """Whether anything has connected to it."""
        self._generation = 0
        listener = socket.create_server(("127.0.0.1", port))
        self.port: int = listener.getsockname()[1]
        super().__init__(Path(server), listener)

    def forget(self) -> None:
        """Swallow whatever comes over the connections that there are, and close none."""
        self._generation += 1

    def pumps(self, pair: Pair) -> tuple[Callable[[], object], Callable[[], object]]:
        """See the base class."""
        self.is_used = True
        (client, server), generation = pair, self._generation
        return (
            lambda: self._pump(pair, client, server, generation),
            lambda: self._pump(pair, server, client, generation),
        )

    def _pump(
        self, pair: Pair, source: socket.socket, target: socket.socket, generation: int
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if generation == self._generation:
                    target.sendall(data)
        if generation == self._generation:
            self.disconnect(pair)


class Pooler(SocketRelay):
    """As PgBouncer: it gives a session another process's number, and may have no server free."""

    def __init__(self, server: str) -> None:
        self.is_saturated = False
        """Whether it accepts connections, and passes no statement on that comes over new ones."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = listener.getsockname()[1]
        super().__init__(Path(server), listener)

    def pumps(self, pair: Pair) -> tuple[Callable[[], object], Callable[[], object]]:
        """See the base class."""
        (client, server), waits, is_ready = pair, self.is_saturated, Event()

        def requests() -> None:
            with contextlib.suppress(OSError):
                while data := client.recv(65_536):
                    if not (waits and is_ready.is_set()):
                        server.sendall(data)
            self.disconnect(pair)

        def replies() -> None:
            with contextlib.suppress(OSError):
                while data := server.recv(65_536):
                    if _READY in data:
                        is_ready.set()
                    client.sendall(_SESSION.sub(lambda found: found[1] + _ANOTHER, data))
            self.disconnect(pair)

        return requests, replies


_SESSION = re.compile(rb"(K\0\0\0\x0c)....", re.DOTALL)
"""PostgreSQL's message of the number of a session's process."""

_ANOTHER = (1).to_bytes(4)

_READY = b"Z\0\0\0\x05I"
"""The end of a reply, outside of a transaction."""


@dataclass
class Network:
    """A store behind a relay."""

    relay: Relay
    storage: PostgresStorage


@pytest.fixture
def network(postgres: PostgresStore) -> Iterator[Network]:
    """A store behind a relay, whose replies may be missing for a moment only."""
    url = make_url(postgres.database_url)
    relay = Relay(f"{url.query['host']}/.s.PGSQL.5432")
    through = url.set(host="127.0.0.1", port=relay.port, query={})
    limits = DatabaseLimits(check=0.5)
    storage = PostgresStorage(through.render_as_string(hide_password=False), limits=limits)
    yield Network(relay, storage)
    storage.close()
    relay.close()


class TestLostConnection:
    """A connection that a server no longer has is noticed, and one that waits is left alone."""

    def test_one_lost_between_two_transactions_is_replaced(self, network: Network) -> None:
        """The next transaction begins on a new connection, and knows nothing of the old one."""
        finish(network.storage, finished("a"))
        network.relay.forget()
        assert network.storage.get_finished_job("a") == finished("a")

    def test_one_lost_within_a_transaction_is_an_outage(self, network: Network) -> None:
        """The transaction fails, and the next one works."""
        with ends_with(StorageError, network.storage) as transaction:
            transaction.find_jobs(["a"])
            network.relay.forget()
            with pytest.raises(StorageError, match="no reply") as caught:
                transaction.record_jobs([finished("a")])
            raise caught.value
        assert caught.value.is_outage
        finish(network.storage, finished("b"))

    def test_one_lost_before_commit_is_an_outage(self, network: Network) -> None:
        """A COMMIT without a reply may or may not have been kept; the ledger knows."""
        with ends_with(StorageError, network.storage) as transaction:
            transaction.record_jobs([finished("a")])
            network.relay.forget()
        assert network.storage.get_finished_job("a") is None

    def test_a_statement_that_runs_is_waited_for(self, network: Network) -> None:
        """A statement that takes longer than a reply may be missing is not cut off."""
        with network.storage.transaction() as transaction:
            transaction.query("SELECT pg_sleep(1.5)")
            assert transaction.find_cancelled_jobs(["a"]) == frozenset()

    @pytest.mark.parametrize("options", [{}, {"target_session_attrs": "read-write"}])
    def test_the_server_that_is_asked_is_the_connection_s_own(
        self, postgres: PostgresStore, network: Network, options: dict[str, str]
    ) -> None:
        """Of several hosts no other is asked about a statement, as it knows nothing of it."""
        with socket.create_server(("127.0.0.1", 0)) as reserved:
            port = reserved.getsockname()[1]
        url = make_url(postgres.database_url)
        hosts = [f"127.0.0.1:{port}", f"127.0.0.1:{network.relay.port}"]
        both = url.set(host=None, port=None, query={"host": hosts, **options})
        storage = PostgresStorage(
            both.render_as_string(hide_password=False), limits=DatabaseLimits(check=0.3)
        )
        with storage.transaction() as transaction:
            transaction.find_cancelled_jobs(["a"])
            first = Relay(str(url.query["host"]) + "/.s.PGSQL.5432", port)
            transaction.query("SELECT pg_sleep(1)")
        assert not first.is_used
        storage.close()
        first.close()

    def test_a_lock_is_waited_for(self, postgres: PostgresStore, network: Network) -> None:
        """A statement that waits for another transaction is not cut off either."""
        with postgres.storage.transaction() as holder:
            holder.record_jobs([finished("a")])
            waiting = Background(lambda: recorded_before(network.storage, "a"))
            postgres.until_waiting(waiting)
            until(
                lambda: (
                    postgres.value(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                        " AND wait_event_type = 'Lock' AND query_start < now() - interval '1 s'"
                    )
                    == 1
                )
            )
        assert waiting.result()

    def test_a_server_that_refuses_another_connection_is_waited_for(
        self, postgres: PostgresStore
    ) -> None:
        """A refusal, as at a role's limit of connections, is a reply: the statement goes on."""
        with role(postgres.database_url) as url:
            postgres.execute(f"ALTER ROLE {make_url(url).username} CONNECTION LIMIT 1")
            storage = PostgresStorage(url, limits=DatabaseLimits(check=LOOK))
            with storage.transaction() as transaction:
                assert transaction.value(SLEEP, {"seconds": 8 * LOOK}) == 7
            storage.close()

    def test_a_frozen_session_on_a_unix_socket_is_lost(self, postgres: PostgresStore) -> None:
        """A session that reads nothing is noticed where no kernel's timeout is."""
        storage = PostgresStorage(postgres.database_url, limits=DatabaseLimits(check=LOOK))
        with ends_with(StorageError, storage) as transaction:
            assert isinstance(transaction, PostgresTransaction)
            pid = transaction.value("SELECT pg_backend_pid()", None)
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            try:
                with pytest.raises(StorageError, match="no reply") as caught:
                    transaction.find_cancelled_jobs(["a"])
            finally:
                os.kill(pid, signal.SIGCONT)
            assert time.monotonic() - began < PATIENCE_SECONDS
            raise caught.value
        storage.close()


LOOK = 0.3
"""Seconds for which a reply may be missing, where a test waits for several times as many."""

SLEEP = "SELECT 7 FROM pg_sleep(%(seconds)s)"


@pytest.fixture
def pooler(postgres: PostgresStore) -> Iterator[Pooler]:
    """A pooler before the database."""
    pooler = Pooler(f"{make_url(postgres.database_url).query['host']}/.s.PGSQL.5432")
    yield pooler
    pooler.close()


@pytest.fixture
def pooled_url(postgres: PostgresStore, pooler: Pooler) -> str:
    """The database's URL through the pooler."""
    url = make_url(postgres.database_url).set(host="127.0.0.1", port=pooler.port, query={})
    return url.render_as_string(hide_password=False)


class TestPooler:
    """A pooler may accept a connection for which it has no server."""

    def test_a_statement_is_waited_for_while_no_other_server_is_free(
        self, pooler: Pooler, pooled_url: str
    ) -> None:
        """That the second connection has no reply does not mean that the first one is lost."""
        storage = PostgresStorage(pooled_url, limits=DatabaseLimits(check=LOOK))
        with storage.transaction() as transaction:
            transaction.find_cancelled_jobs(["a"])
            pooler.is_saturated = True
            assert transaction.value(SLEEP, {"seconds": 8 * LOOK}) == 7
        storage.close()

    def test_a_connection_without_a_reply_is_lost(self, pooler: Pooler, pooled_url: str) -> None:
        """A paused pooler delays neither a worker's start nor a migration for ever."""
        pooler.is_saturated = True
        engine = open_engine(parsed(pooled_url), application_name="test", check_seconds=LOOK)
        with pytest.raises(OperationalError, match="no reply"):
            engine.connect()

    def test_no_notification_is_waited_for(self, pooled_url: str) -> None:
        """A relay behind a pooler polls: the session that listens may be another service's next."""
        storage = PostgresStorage(pooled_url)
        assert storage.wait_for_requests(60) is None
        assert not storage.has_due_requests()
        storage.close()

    def test_a_migration_is_waited_for(self, pooled_url: str) -> None:
        """A statement of any length is not cut off, in a transaction or beside one."""
        engine = open_engine(
            parsed(pooled_url),
            application_name="test",
            check_seconds=LOOK,
            poolclass=NullPool,
            execution_options={"isolation_level": "AUTOCOMMIT"},
        )
        with engine.connect() as connection:
            with locks.transaction(connection):
                connection.exec_driver_sql(f"SELECT pg_sleep({4 * LOOK})")
            locks.run_concurrently(connection, f"SELECT pg_sleep({4 * LOOK})", "index")


def recorded_before(storage: PostgresStorage, job_id: str) -> bool:
    """Whether the ledger has a job that a transaction tries to record."""
    try:
        finish(storage, finished(job_id))
    except LedgerConflictError:
        return True
    return False
