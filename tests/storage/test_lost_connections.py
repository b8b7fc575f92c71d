"""Lost connections and poolers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import pytest
from sqlalchemy import NullPool, make_url
from sqlalchemy.exc import OperationalError

from storage.connections import open_engine, parse_url
from storage.errors import LedgerConflictError, StorageError
from storage.migrations import locks
from storage.postgres import DatabaseLimits, PostgresStorage, PostgresTransaction
from tests.storage.transactions import failing_transaction, finish, finished
from tests.support.database import role
from tests.support.relay import Pair, Relay, SocketRelay
from tests.support.stores import PATIENCE_SECONDS, Background, PostgresStore, until

_BACKEND_KEY_DATA = re.compile(rb"(K\0\0\0\x0c)....", re.DOTALL)
"""PostgreSQL's BackendKeyData message, with the process ID of the session."""

_OTHER_PROCESS = (1).to_bytes(4)
"""The process ID that is reported instead."""

_READY_FOR_QUERY = b"Z\0\0\0\x05I"
"""PostgreSQL's ReadyForQuery message outside a transaction."""


@pytest.fixture(scope="module")
def postgres_url(_stores_url: str) -> str:
    """One database for all tests of this file, which change rows only."""
    return _stores_url


class Pooler(SocketRelay):
    """Reports another process ID to clients, like PgBouncer, and can have no free server."""

    def __init__(self, server: str) -> None:
        self.is_saturated = False
        """Whether statements on new connections get no server."""
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
                    if _READY_FOR_QUERY in data:
                        is_ready.set()
                    client.sendall(
                        _BACKEND_KEY_DATA.sub(lambda found: found[1] + _OTHER_PROCESS, data)
                    )
            self.disconnect(pair)

        return requests, replies


CHECK_SECONDS = 0.3
"""Short time limit for a missing reply, in seconds."""

SLEEP = "SELECT 7 FROM pg_sleep(%(seconds)s)"


@dataclass
class Network:
    """A storage behind a relay."""

    relay: Relay
    storage: PostgresStorage


@pytest.fixture
def network(postgres: PostgresStore) -> Iterator[Network]:
    """A storage behind a relay, with a short time limit for missing replies."""
    url = make_url(postgres.database_url)
    relay = Relay(f"{url.query['host']}/.s.PGSQL.5432")
    through = url.set(host="127.0.0.1", port=relay.port, query={})
    limits = DatabaseLimits(check=0.5)
    storage = PostgresStorage(through.render_as_string(hide_password=False), limits=limits)
    yield Network(relay, storage)
    storage.close()
    relay.close()


@pytest.fixture
def pooler(postgres: PostgresStore) -> Iterator[Pooler]:
    """A pooler in front of the database."""
    pooler = Pooler(f"{make_url(postgres.database_url).query['host']}/.s.PGSQL.5432")
    yield pooler
    pooler.close()


@pytest.fixture
def pooled_url(postgres: PostgresStore, pooler: Pooler) -> str:
    """The database URL through the pooler."""
    url = make_url(postgres.database_url).set(host="127.0.0.1", port=pooler.port, query={})
    return url.render_as_string(hide_password=False)


class TestLostConnection:
    """Lost connections are detected; working ones are not interrupted."""

    def test_connection_lost_between_transactions_is_replaced(self, network: Network) -> None:
        """The next transaction begins on a new connection."""
        finish(network.storage, finished("a"))
        network.relay.drop_data()
        assert network.storage.get_finished_job("a") == finished("a")

    def test_connection_lost_within_a_transaction_is_an_outage(self, network: Network) -> None:
        """The transaction fails, and the next one works."""
        with failing_transaction(StorageError, network.storage) as transaction:
            transaction.find_jobs(["a"])
            network.relay.drop_data()
            with pytest.raises(StorageError, match="no reply") as caught:
                transaction.record_jobs([finished("a")])
            raise caught.value
        assert caught.value.is_outage
        finish(network.storage, finished("b"))

    def test_connection_lost_before_commit_is_an_outage(self, network: Network) -> None:
        """A COMMIT without a reply is an error; the ledger shows that it was not committed."""
        with failing_transaction(StorageError, network.storage) as transaction:
            transaction.record_jobs([finished("a")])
            network.relay.drop_data()
        assert network.storage.get_finished_job("a") is None

    def test_running_statement_is_not_interrupted(self, network: Network) -> None:
        """A statement that takes longer than a reply may be missing is not interrupted."""
        with network.storage.transaction() as transaction:
            transaction.query("SELECT pg_sleep(1.5)")
            assert transaction.find_cancelled_jobs(["a"]) == frozenset()

    @pytest.mark.parametrize("options", [{}, {"target_session_attrs": "read-write"}])
    def test_check_connects_to_the_same_server(
        self, postgres: PostgresStore, network: Network, options: dict[str, str]
    ) -> None:
        """Of several hosts, only the server of the connection is asked about a statement."""
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

    def test_statement_that_waits_for_a_lock_is_not_interrupted(
        self, postgres: PostgresStore, network: Network
    ) -> None:
        """A statement that waits for another transaction is not interrupted."""
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

    def test_refused_check_counts_as_a_reply(self, postgres: PostgresStore) -> None:
        """A refused second connection, as at a role's connection limit, counts as a reply."""
        with role(postgres.database_url) as url:
            postgres.execute(f"ALTER ROLE {make_url(url).username} CONNECTION LIMIT 1")
            storage = PostgresStorage(url, limits=DatabaseLimits(check=CHECK_SECONDS))
            with storage.transaction() as transaction:
                assert transaction.value(SLEEP, {"seconds": 8 * CHECK_SECONDS}) == 7
            storage.close()

    def test_a_frozen_session_on_a_unix_socket_is_lost(self, postgres: PostgresStore) -> None:
        """A session that reads nothing is detected where no TCP timeout applies."""
        storage = PostgresStorage(postgres.database_url, limits=DatabaseLimits(check=CHECK_SECONDS))
        with failing_transaction(StorageError, storage) as transaction:
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


class TestPooler:
    """A pooler that accepts connections without having a free server."""

    def test_saturated_pooler_does_not_interrupt_a_statement(
        self, pooler: Pooler, pooled_url: str
    ) -> None:
        """A second connection without a reply does not mean that the first one is lost."""
        storage = PostgresStorage(pooled_url, limits=DatabaseLimits(check=CHECK_SECONDS))
        with storage.transaction() as transaction:
            transaction.find_cancelled_jobs(["a"])
            pooler.is_saturated = True
            assert transaction.value(SLEEP, {"seconds": 8 * CHECK_SECONDS}) == 7
        storage.close()

    def test_connecting_through_a_paused_pooler_fails(
        self, pooler: Pooler, pooled_url: str
    ) -> None:
        """A paused pooler does not block a worker's start or a migration forever."""
        pooler.is_saturated = True
        engine = open_engine(
            parse_url(pooled_url), application_name="test", check_seconds=CHECK_SECONDS
        )
        with pytest.raises(OperationalError, match="no reply"):
            engine.connect()

    def test_relay_polls_through_a_pooler(self, pooled_url: str) -> None:
        """Through a pooler no notification is awaited: the session may change."""
        storage = PostgresStorage(pooled_url)
        assert storage.wait_for_requests(60) is None
        assert not storage.has_due_requests()
        storage.close()

    def test_migration_statement_is_not_interrupted(self, pooled_url: str) -> None:
        """A statement of any length is not interrupted, inside or outside a transaction."""
        engine = open_engine(
            parse_url(pooled_url),
            application_name="test",
            check_seconds=CHECK_SECONDS,
            poolclass=NullPool,
            execution_options={"isolation_level": "AUTOCOMMIT"},
        )
        with engine.connect() as connection:
            with locks.transaction(connection):
                connection.exec_driver_sql(f"SELECT pg_sleep({4 * CHECK_SECONDS})")
            locks.run_concurrently(connection, f"SELECT pg_sleep({4 * CHECK_SECONDS})", "index")


def recorded_before(storage: PostgresStorage, job_id: str) -> bool:
    """Return whether recording a job conflicts with the ledger."""
    try:
        finish(storage, finished(job_id))
    except LedgerConflictError:
        return True
    return False
