"""Real PostgreSQL and Valkey servers from Python wheels, on Unix sockets.

Owns where their data and sockets are, how they are configured, and which user they run as. Does not
know what they are used for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from devstack.programs import postgres_programs, valkey_server
from devstack.service import LocalStackError, Service, stop_all

DATABASE = "interview_access"

_LOCK_SECONDS = 15.0  # longer than the servers of a killed owner take to end
_POLL_SECONDS = 0.02
_MAX_SOCKET_PATH = 103  # bytes; the limit of macOS, the lowest of the supported systems
_POSTGRES_SOCKET = ".s.PGSQL.5432"  # PostgreSQL chooses this name
_VALKEY_SOCKET = "valkey.sock"


class LocalStack:
    """A PostgreSQL and a Valkey server without a TCP port, for the lifetime of one process.

    They end within ten seconds of the process that starts them, even if it gets a SIGKILL. Their
    sockets are in a temporary folder that is removed when they stop.

    Args:
        data: Folder of the data and logs of both servers; created if missing. Only one stack at a
            time can use it.
        durable: False gives up durability over a crash of the machine (not of a server) for
            speed, as tests can.
        lock_timeout: Seconds to wait for `data` while another stack uses it.

    Attributes:
        data: Absolute path of the data.
        database_url: URL of the database for SQLAlchemy; set by `start`.
        broker_url: URL of the queue for Celery; set by `start`.
        postgres: The PostgreSQL server; set by `start`.
        valkey: The Valkey server; set by `start`.
    """

    database_url: str
    broker_url: str
    postgres: Service
    valkey: Service

    def __init__(
        self, data: Path, *, durable: bool = True, lock_timeout: float = _LOCK_SECONDS
    ) -> None:
        self.data = data.absolute()
        self._durable = durable
        self._lock_timeout = lock_timeout
        self._cleanup: ExitStack | None = None

    def __enter__(self) -> Self:
        """Start the servers."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the servers."""
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return the environment variables that connect a worker or a producer to the servers."""
        return {"DATABASE_URL": self.database_url, "CELERY_BROKER_URL": self.broker_url}

    def start(self) -> None:
        """Start both servers and wait until they are ready; initialize their data if missing.

        Raises:
            LocalStackError: if they are started already, cannot run on this machine, cannot use
                the folder, or another stack uses it. No process is left running.
        """
        if self._cleanup is not None:
            raise LocalStackError(f"the servers of {self.data} run already: call stop() first")
        try:
            with ExitStack() as cleanup:
                self._start(cleanup)
                self._cleanup = cleanup.pop_all()
        except OSError as error:
            raise LocalStackError(
                f"the local servers cannot use {self.data}: {error}. "
                "Give a folder that this user can write to"
            ) from error

    def stop(self) -> None:
        """Stop both servers and remove their sockets; the data stays."""
        if self._cleanup is not None:
            self._cleanup.close()
            self._cleanup = None

    def _start(self, cleanup: ExitStack) -> None:
        programs, valkey_program = postgres_programs(), valkey_server()
        lock = self._lock()
        cleanup.callback(os.close, lock)
        account = _choose_account(self.data)
        sockets = _make_socket_folder(self.data)
        cleanup.callback(shutil.rmtree, sockets, ignore_errors=True)
        cluster, unfinished = self.data / "postgres", self.data / "postgres.unfinished"
        (self.data / "valkey").mkdir(mode=0o700, exist_ok=True)
        if not cluster.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(mode=0o700)
        for name in ("initdb", "postgres", "valkey"):
            (self.data / f"{name}.log").touch(mode=0o600)
        for path in (sockets, *self.data.iterdir()):
            account.own(path)

        valkey_socket, postgres_socket = sockets / _VALKEY_SOCKET, sockets / _POSTGRES_SOCKET
        server = partial(
            Service,
            folder=self.data,
            inherit=[lock],  # the data folder stays locked while any descendant runs
            remove_if_orphaned=sockets,
        )
        self.valkey = server(
            "valkey",
            [
                *(*account.launcher, str(valkey_program)),
                *("--port", "0", "--unixsocket", str(valkey_socket)),
                *("--dir", str(self.data / "valkey"), "--save", "", "--appendonly", "yes"),
                *("--appendfsync", "everysec" if self._durable else "no"),
                *("--maxmemory-policy", "noeviction"),  # a queue must not drop messages
            ],
            log=self.data / "valkey.log",
            is_ready=partial(_valkey_responds, valkey_socket),
        )
        initdb = server(
            "initdb",
            [
                *(*account.launcher, str(programs / "initdb"), "-D", str(unfinished)),
                *("-U", "postgres", "--encoding=UTF8", "--no-locale"),
                "--auth=trust",  # the mode of the sockets' folder restricts access
                *(() if self._durable else ("--no-sync",)),
            ],
            log=self.data / "initdb.log",
        )
        query = partial(_query, programs / "psql", sockets)
        self.postgres = server(
            "postgres",
            [
                *(*account.launcher, str(programs / "postgres"), "-D", str(cluster)),
                *("-c", "listen_addresses=", "-c", f"unix_socket_directories={sockets}"),
                # POSIX shared memory would stay in /dev/shm after a SIGKILL.
                *("-c", "dynamic_shared_memory_type=mmap"),
                *("-c", "timezone=UTC", "-c", "log_timezone=UTC"),
                # Commits still survive a crash of the server: synchronous_commit stays on.
                *(() if self._durable else ("-c", "fsync=off", "-c", "full_page_writes=off")),
            ],
            log=self.data / "postgres.log",
            stop_signal=signal.SIGINT,  # fast shutdown, which disconnects clients
            pid_files=[cluster / "postmaster.pid", Path(f"{postgres_socket}.lock")],
            is_ready=lambda: query("SELECT 1") is not None,
        )
        cleanup.callback(stop_all, [self.postgres, self.valkey, initdb])
        self.valkey.start()
        if not cluster.exists():
            initdb.start()
            if status := initdb.wait():
                raise LocalStackError(f"initdb ended with status {status}{initdb.log_tail()}")
            unfinished.rename(cluster)
        self.postgres.start()
        if not query(f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"):  # noqa: S608 - a constant
            query(f"CREATE DATABASE {DATABASE}")
        self.database_url = f"postgresql+psycopg://postgres@/{DATABASE}?host={sockets}"
        self.broker_url = f"redis+socket://{valkey_socket}"

    def _lock(self) -> int:
        """Lock the data folder, created if missing, and return the descriptor of the lock.

        Raises:
            LocalStackError: if another stack uses the folder, or it has unrelated files.
        """
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.data / "lock"
        if any(self.data.iterdir()) and not path.exists():
            raise LocalStackError(
                f"{self.data}: got a folder with other files in it, expected an empty folder "
                "or the folder of an earlier run"
            )
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + self._lock_timeout
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
                    continue
                holder = os.pread(lock, 1_000, 0).decode(errors="replace") or "another process"
                os.close(lock)
                raise LocalStackError(
                    f"{self.data} is in use by {holder}: waited {self._lock_timeout:g} s. "
                    "Stop that process, or use another folder: interview-access up --data FOLDER"
                ) from None
            command, since = shlex.join(sys.argv)[:200], time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} ({command}), started {since}".encode(), 0)
            return lock


@dataclass(frozen=True, slots=True)
class _Account:
    """The user that the servers run as. PostgreSQL refuses to run as root.

    Attributes:
        uid: User that owns the files of the servers.
        gid: Group that owns them.
        launcher: Command prefix that runs a program as this user; empty for the current user.
    """

    uid: int
    gid: int
    launcher: tuple[str, ...] = ()

    def own(self, path: Path) -> None:
        """Make this user the owner of a file, or of a folder with its contents."""
        if path.stat().st_uid != self.uid:
            for entry in (*path.rglob("*"), path):  # the folder last, because it is checked above
                os.chown(entry, self.uid, self.gid, follow_symlinks=False)


def _choose_account(data: Path) -> _Account:
    """Choose the current user or, for root, the owner of the data folder or an unprivileged user.

    Raises:
        LocalStackError: if root has no means to run a program as another user.
    """
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    owner = data.stat()
    uid, gid = owner.st_uid, owner.st_gid
    try:
        if uid == 0:
            # PostgreSQL requires a user that has a name.
            nobody = pwd.getpwnam("nobody")
            uid, gid = nobody.pw_uid, nobody.pw_gid
            # In a user namespace: root's files, none of its rights. Many containers allow none.
            namespace = ("unshare", "--user", f"--map-user={uid}", f"--map-group={gid}", "--")
            if _run(*namespace, "true").returncode == 0:
                return _Account(0, 0, namespace)
        # The capability lets that user pass folders above the data that are closed to it.
        capability = ("--inh-caps=+dac_override", "--ambient-caps=+dac_override")
        switch = (f"--reuid={uid}", f"--regid={gid}", "--clear-groups", *capability)
        launcher = ("setpriv", *switch, "--pdeathsig=keep", "--")
        _run(*launcher, "true").check_returncode()
    except (KeyError, OSError, subprocess.CalledProcessError) as error:
        raise LocalStackError(
            f"PostgreSQL does not run as root, and running it as another user failed: {error}. "
            "Run this as an ordinary user, or install util-linux and a user `nobody`"
        ) from error
    return _Account(uid, gid, launcher)


def _make_socket_folder(data: Path) -> Path:
    """Create the folder of the sockets, at a path that depends on the data folder only."""
    name = f"interview-access-{hashlib.sha256(os.fsencode(data)).hexdigest()[:16]}"
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdir fails if another user has made it
        folder = Path(parent, name)
        if len(os.fsencode(folder / _POSTGRES_SOCKET)) <= _MAX_SOCKET_PATH:
            with suppress(FileNotFoundError):
                shutil.rmtree(folder)  # left behind if all processes of a stack were killed
            folder.mkdir(mode=0o700)
            return folder
    raise LocalStackError("the path of the temporary folder is too long for a socket: set TMPDIR")


def _query(psql: Path, sockets: Path, statement: str) -> str | None:
    """Return the value that a statement yields, "" if none, or None if it fails."""
    database = "dbname=postgres connect_timeout=5"
    done = _run(psql, "-h", sockets, "-U", "postgres", "-d", database, "-XAtqc", statement)
    return done.stdout.strip() if done.returncode == 0 else None


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 - the commands are our own
        command, capture_output=True, text=True, errors="replace", check=False
    )


def _valkey_responds(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection, suppress(OSError):
        connection.settimeout(1.0)
        connection.connect(str(address))
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"+PONG")  # an error while it loads its data
    return False
