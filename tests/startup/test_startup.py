"""Start-up: checks of both servers, refused options, TLS, Sentinels and imports."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Thread

import pytest
from interview_access.producer import InterviewAccessClient
from redis import Redis
from sqlalchemy import create_engine, make_url, text

from storage.schema import migrate
from storage.schema.identity import database_identity
from tests.startup.checks import PASSWORD, check, refusal
from tests.storage.test_schema_check import WORKER
from tests.support.commands import run_module
from tests.support.database import role
from tests.support.sentinels import redis_of
from tests.support.workers import QUEUE, ROOT, Site, worker
from worker.broker.claims import PREFIX
from worker.broker.lease import Lease
from worker.settings import Settings
from worker.startup import StartupError
from worker.startup.servers import check_servers


@contextmanager
def resp_server(*replies: str) -> Iterator[int]:
    """The port of a server that completes the handshake and then sends these replies."""

    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            left = list(replies)
            while line := self.rfile.readline():
                words = [
                    self.rfile.readline() and self.rfile.readline() for _ in range(int(line[1:]))
                ]
                command = words[0].strip().upper()
                if command == b"HELLO":
                    self.wfile.write(b"%1\r\n+proto\r\n:3\r\n")
                else:
                    self.wfile.write(b"+OK\r\n" if command == b"CLIENT" else left.pop(0).encode())

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class TestServers:
    """The checks of both servers."""

    def test_suitable_servers_pass(self, here: Site, caplog: pytest.LogCaptureFixture) -> None:
        """The servers of the local stack pass without a warning."""
        check(here.store.database_url, here.broker)
        assert caplog.text == ""

    @pytest.mark.parametrize("database", [0, 1])
    @pytest.mark.parametrize("which", ["queue", "results"])
    def test_cluster_mode_is_refused(
        self, here: Site, tmp_path: Path, which: str, database: int
    ) -> None:
        """A Redis in cluster mode is refused as either server, with any database number."""
        with redis_of(tmp_path, "--cluster-enabled", "yes") as port:
            url = f"redis://127.0.0.1:{port}/{database}"
            urls = (url, here.broker) if which == "queue" else (here.broker, url)
            assert "got a Redis in cluster mode" in refusal(here.store.database_url, *urls)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("", "HELLO must be called with the client already authenticated"),
            ("wrong", "invalid username-password"),
        ],
    )
    @pytest.mark.parametrize("which", ["CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"])
    def test_a_wrong_password_is_refused(
        self, here: Site, tmp_path: Path, which: str, given: str, message: str
    ) -> None:
        """The error for a wrong password names the variable and quotes the server's error."""
        with redis_of(tmp_path, "--requirepass", PASSWORD) as port:
            url = f"redis://:{given}@127.0.0.1:{port}/0"
            broker = which == "CELERY_BROKER_URL"
            urls = (url, here.broker) if broker else (here.broker, url)
            sentence = refusal(here.store.database_url, *urls)
        assert sentence.startswith(f"{which}: Redis at 127.0.0.1:{port} refuses the worker")
        assert message in sentence

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ("~* &* +@all -xadd", "XADD interview-access:dead"),
            ("~interview-access* ~_kombu* &* +@all", "SETEX celery-task-meta-x"),
            ("~* +@all resetchannels", "PUBLISH /3.celeryev/worker.heartbeat"),
            ("~* &/3.* +@all", "PSUBSCRIBE /3.celery.pidbox"),
            ("~interview-access ~interview-access:* &* +@all", "interview-access\\x06\\x169"),
            ("~* &* +@all -zrange", "ZRANGE interview-access:leases"),
            ("~* &* +@all -getrange", "GETRANGE interview-access:job:x"),
            ("~* &* +@all -memory", "MEMORY USAGE interview-access:dead"),
            ("~* &* +@all -client", "CLIENT SETNAME"),
            ("~* &* +@all -client|reply", "CLIENT REPLY SKIP"),
            ("~* &* +@all -info", "'info' command"),
            ("~* &* +@all -evalsha", "'evalsha' command"),
        ],
    )
    def test_a_missing_permission_is_named(
        self, here: Site, tmp_path: Path, rules: str, message: str
    ) -> None:
        """A Redis user that lacks a permission is refused, and the permission is named."""
        with redis_of(tmp_path) as port, Redis(port=port) as redis:
            redis.execute_command("ACL", "SETUSER", "limited", "on", f">{PASSWORD}", *rules.split())
            url = f"redis://limited:{PASSWORD}@127.0.0.1:{port}/3"
            assert message in refusal(here.store.database_url, url)

    def test_a_role_that_may_not_prune_is_refused(self, here: Site) -> None:
        """A worker with a retention needs DELETE on the ledger; the error names the GRANT."""
        with role(here.store.database_url, *WORKER) as url:
            check(url, here.broker)
            settings = Settings(
                database_url=url, celery_broker_url=here.broker, grant_retention_days=90
            )
            with pytest.raises(StartupError, match="run GRANT DELETE ON TABLE"):
                check_servers(settings)

    def test_a_user_who_may_not_read_the_pause_is_warned_of(
        self, here: Site, tmp_path: Path
    ) -> None:
        """A worker whose Redis user may not read the pause starts, and logs a warning."""
        keys = f"~{QUEUE} ~{QUEUE}\x06* ~{QUEUE}-control ~{QUEUE}: ~{QUEUE}:[^p]*"
        rules = f"{keys} ~celery-task-meta-* ~_kombu* ~*.celery.pidbox* &* +@all"
        log = tmp_path / "worker.log"
        with redis_of(tmp_path) as port, Redis(port=port) as redis:
            redis.execute_command(
                "ACL", "SETUSER", "limited", "on", f">{PASSWORD}", *rules.split(" ")
            )
            url = f"redis://limited:{PASSWORD}@127.0.0.1:{port}/0"
            with (
                worker(here, log, CELERY_BROKER_URL=url),
                closing(InterviewAccessClient(f"redis://127.0.0.1:{port}/0")) as client,
            ):
                assert client.wait(client.enqueue("acl", []), timeout=30)["success"]
        assert "Redis does not permit to read interview-access:paused" in log.read_text("utf-8")

    def test_a_missing_database_number_is_refused(self, here: Site, tmp_path: Path) -> None:
        """The error for a database number beyond the server's quotes the server's error."""
        with redis_of(tmp_path, "--databases", "1") as port:
            sentence = refusal(here.store.database_url, f"redis://127.0.0.1:{port}/1")
        assert "DB index is out of range" in sentence

    def test_settings_that_risk_jobs_are_warnings(
        self, here: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Eviction and a missing append-only file are warnings, also for the results' server."""
        options = ("--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
        with redis_of(tmp_path, *options) as port, caplog.at_level(logging.WARNING):
            check(here.store.database_url, here.broker, f"redis://127.0.0.1:{port}/0")
        assert "Redis may evict jobs: variable=CELERY_RESULT_BACKEND" in caplog.text
        assert "Redis loses jobs when it restarts: variable=CELERY_RESULT_BACKEND" in caplog.text
        assert "CELERY_BROKER_URL" not in caplog.text

    def test_a_full_server_passes(self, here: Site, tmp_path: Path) -> None:
        """A worker starts on a Redis whose memory is full."""
        with redis_of(tmp_path) as port, Redis(port=port) as redis:
            redis.config_set("maxmemory", 1)
            check(here.store.database_url, f"redis://127.0.0.1:{port}/0")

    @pytest.mark.parametrize(
        "error",
        [
            "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
            "LOADING Redis is loading the dataset in memory",
            "BUSY Redis is busy running a script.",
            "TRYAGAIN Multiple keys request during rehashing of slot",
            "MISCONF Redis is configured to save RDB snapshots, but it is unable to",
            "OOM command not allowed when used memory > 'maxmemory'.",
        ],
    )
    def test_a_temporary_error_is_a_warning(
        self, here: Site, caplog: pytest.LogCaptureFixture, error: str
    ) -> None:
        """A server that is temporarily unavailable is a warning."""
        with resp_server(f"-{error}\r\n") as port, caplog.at_level(logging.WARNING):
            check(here.store.database_url, f"redis://127.0.0.1:{port}/0")
        assert error.partition(" ")[2] in caplog.text

    @pytest.mark.parametrize(
        "error",
        [
            "DENIED Redis is running in protected mode",
            "ERR unknown command 'info'",
        ],
    )
    def test_any_other_error_is_refused(self, here: Site, error: str) -> None:
        """Any other error of a server is refused and quoted."""
        with resp_server(f"-{error}\r\n") as port:
            sentence = refusal(here.store.database_url, f"redis://127.0.0.1:{port}/0")
        assert error.partition(" ")[2] in sentence

    def test_a_sentinel_url_of_a_redis_is_refused(self, here: Site, tmp_path: Path) -> None:
        """A sentinel:// URL that names a Redis server is refused."""
        with redis_of(tmp_path) as port:
            url = f"sentinel://127.0.0.1:{port}/0?master_name=jobs"
            sentence = refusal(here.store.database_url, url)
        assert f"the Sentinel at 127.0.0.1:{port} refuses the worker: unknown command" in sentence

    def test_a_server_without_visible_settings_passes(
        self, here: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Settings that INFO does not report cause neither a warning nor an error."""
        info = "# Server\r\nuptime_in_seconds:7"
        with resp_server(f"${len(info)}\r\n{info}\r\n", "*0\r\n", "*2\r\n$0\r\n\r\n*0\r\n") as port:
            check(here.store.database_url, f"redis://127.0.0.1:{port}/0")
        assert caplog.text == ""

    def test_unreachable_servers_are_warnings(
        self, here: Site, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Unreachable servers are warnings, because the worker waits for them."""
        with caplog.at_level(logging.WARNING):
            check(here.store.database_url, f"redis+socket://{tmp_path}/none")
            check("postgresql://me@127.0.0.1:1/x", here.broker)
        assert "Redis unreachable, the worker waits: variable=CELERY_BROKER_URL" in caplog.text
        assert "PostgreSQL unavailable" in caplog.text


@contextmanager
def session_of(redis: Redis) -> Iterator[None]:
    """A live worker session."""
    lease = Lease(ttl=2, grace=0)
    lease.open(redis)
    try:
        yield
    finally:
        lease.close()


class TestDatabases:
    """Workers of one queue with different databases."""

    def test_another_database_of_a_live_worker_is_a_warning(
        self, here: Site, migrated_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The warning names both databases, and the worker starts."""
        here.redis.flushdb()
        check(here.store.database_url, here.broker)
        with session_of(here.redis):
            check(migrated_url, here.broker)
        (line,) = caplog.messages
        assert line.startswith("workers of one queue use different databases")
        for url in (migrated_url, here.store.database_url):
            assert str(make_url(url).database) in line

    def test_another_schema_is_another_database(
        self, here: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Tables of another schema in the same database are a warning, too."""
        here.redis.flushdb()
        check(here.store.database_url, here.broker)
        engine = create_engine(here.store.database_url)
        with engine.begin() as connection:
            connection.execute(text("CREATE SCHEMA other"))
        engine.dispose()
        url = make_url(here.store.database_url)
        url = url.update_query_dict({"options": "-csearch_path=other"})
        other = url.render_as_string(hide_password=False)
        migrate(other, report=lambda _: None)
        with session_of(here.redis):
            check(other, here.broker)
        assert "workers of one queue use different databases" in caplog.text

    def test_workers_of_one_database_have_no_warning(
        self, here: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Live workers of the same database are no warning, whatever its URL."""
        here.redis.flushdb()
        check(here.store.database_url, here.broker)
        url = make_url(here.store.database_url)
        with session_of(here.redis):
            spelling = url.update_query_dict({"application_name": "other"})
            check(spelling.render_as_string(hide_password=False), here.broker)
        assert caplog.text == ""

    def test_a_database_moves_when_no_worker_lives(
        self, here: Site, migrated_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Neither a former worker nor the session of one that was killed is a warning."""
        here.redis.flushdb()
        check(here.store.database_url, here.broker)
        here.redis.zadd(f"{PREFIX}leases", {"killed": 7})
        check(migrated_url, here.broker)
        assert caplog.text == ""

    def test_a_role_without_the_system_identifier(self, here: Site) -> None:
        """A role that may not read the system identifier has an identity without it."""
        engine = create_engine(here.store.database_url)
        with engine.connect() as connection:
            full, name = database_identity(connection)
            revoke = "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
            connection.execute(text(f"{revoke}; CREATE ROLE barred; SET LOCAL ROLE barred"))
            assert database_identity(connection) == (full.partition("/")[2], name)
        engine.dispose()


@contextmanager
def ended(here: Site, *words: str, **settings: object) -> Iterator[str]:
    """The error of a worker that ends at its start with status 1."""
    command = ("celery", "-A", "worker", "worker", "-c", "1", *words)
    process = run_module(here.environment(**settings), *command)
    output = process.stdout + process.stderr
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert PASSWORD not in output
    (sentence,) = [line for line in output.splitlines() if "cannot start" in line]
    yield sentence


class TestStart:
    """The worker's start."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["-P", "solo"], "got the pool solo (-P, --pool), expected prefork."),
            (["-P", "threads"], "got the pool thread (-P, --pool), expected prefork."),
            (["-Q", "typo"], "got typo (-Q, --queues), expected interview-access."),
            (["-Q", f"{QUEUE},typo"], "got typo (-Q, --queues), expected interview-access."),
            (["-X", QUEUE], "got no queue (-Q, --queues), expected interview-access."),
            (
                ["--soft-time-limit", "9"],
                "got the soft time limit 9.0 (--soft-time-limit), expected only --time-limit.",
            ),
            (
                ["--autoscale", "4,0"],
                "got the autoscale (4, 0) (--autoscale), expected a number of processes (-c).",
            ),
            (["task.time_limit=0"], "got no time limit, expected task_time_limit in seconds."),
            (["task.acks_late=no"], "got task_acks_late = False, expected True."),
            (["result.serializer=yaml"], "got result_serializer = 'yaml', expected 'json'."),
        ],
    )
    def test_unsafe_options_are_refused(self, here: Site, words: list[str], message: str) -> None:
        """Another pool, an unknown queue or early acknowledgement ends the worker at its start."""
        with ended(here, *words) as sentence:
            assert sentence == f"The worker cannot start: {message}"

    def test_a_failed_check_ends_the_worker(self, here: Site, tmp_path: Path) -> None:
        """A failed check ends the worker with one line and status 1."""
        with redis_of(tmp_path, "--requirepass", PASSWORD) as port:
            url = f"redis://:wrong@127.0.0.1:{port}/0"
            with ended(here, CELERY_BROKER_URL=url) as sentence:
                assert "refuses the worker" in sentence

    @pytest.mark.parametrize(
        ("variable", "end"),
        [
            ("CELERY_BROKER_URL", "#rest@127.0.0.1:6379/0"),
            ("CELERY_RESULT_BACKEND", "@h/0?nonsense=1"),
        ],
    )
    def test_a_malformed_url_ends_the_worker(self, here: Site, variable: str, end: str) -> None:
        """The error for a malformed URL names the variable and shows no part of the password."""
        with ended(here, **{variable: f"redis://:{PASSWORD}{end}"}) as sentence:
            assert sentence.startswith(f"The worker cannot start: {variable}: got 'redis://***")


def after_import(expression: str) -> str:
    """Evaluate an expression in a process that has imported the worker."""
    code = f"import gc, sys, worker.celery; print({expression})"
    urls = {"DATABASE_URL": "postgresql://db/platform", "CELERY_BROKER_URL": "redis://redis:6379/0"}
    command = [sys.executable, "-c", code]
    output = subprocess.check_output(command, cwd=ROOT, env=os.environ | urls, text=True)
    return output.strip()


def test_the_worker_imports_no_orm_and_no_alembic() -> None:
    """The worker imports neither SQLAlchemy's ORM nor Alembic, which would slow its start."""
    assert after_import("{'alembic', 'sqlalchemy.orm'} & sys.modules.keys()") == "set()"


def test_garbage_collection_is_enabled_after_the_import() -> None:
    """The garbage collector is disabled only during the import."""
    assert after_import("gc.isenabled()") == "True"


class TestShadowing:
    """A user's module that has the name of one of the worker's."""

    @pytest.mark.parametrize("file", ["tasks.py", "storage/__init__.py", "celeryconfig.py"])
    def test_the_worker_names_the_file(self, here: Site, tmp_path: Path, file: str) -> None:
        """A module in the working directory ends the worker with one line that names it."""
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
        done = subprocess.run(
            [Path(sys.executable).with_name("celery"), "-A", "worker", "worker"],
            cwd=tmp_path,
            env=here.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        name = file.partition("/")[0].removesuffix(".py")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"The worker's module {name} is shadowed by {path}: run the command in another "
            "directory, or rename that file.\n"
        )

    def test_the_command_names_the_file(self, here: Site, tmp_path: Path) -> None:
        """A module that is earlier on the path ends interview-access, too."""
        path = tmp_path / "tasks.py"
        path.touch()
        environment = here.environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
        done = subprocess.run(
            [Path(sys.executable).with_name("interview-access"), "status", "x"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"The worker's module tasks is shadowed by {path}: ")
