"""Redis servers and Sentinels, as processes on free ports."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import AuthenticationError, RedisError

from devstack.programs import valkey_server
from devstack.service import Service
from tests.support.stores import until

MASTER = "jobs"
"""The master name of the primary."""


class Sentinels:
    """One primary, its replicas and their Sentinels."""

    def __init__(self, folder: Path, replicas: int, sentinels: int, password: str = "") -> None:
        """Choose ports; :func:`sentinels_of` starts the servers."""
        self.folder = folder
        self.password = password
        self.servers: dict[int, Service] = {}
        self.ports = _free_ports(1 + replicas + sentinels)
        self.redis_ports = self.ports[: 1 + replicas]
        self.sentinel_ports = self.ports[1 + replicas :]

    @property
    def url(self) -> str:
        """The URL of queue and results."""
        hosts = ";".join(f"127.0.0.1:{port}" for port in self.sentinel_ports)
        credentials = f":{self.password}@" if self.password else ""
        return f"sentinel://{credentials}{hosts}/0?master_name={MASTER}"

    def environment(self) -> dict[str, object]:
        """Return the environment variables of a worker, a command or a client."""
        return {"CELERY_BROKER_URL": self.url, "REDIS_SENTINEL_PASSWORD": self.password}

    def redis(self, port: int) -> Redis:
        """Return a client of one server."""
        return Redis(port=port, password=self.password or None, socket_timeout=5)

    def primary(self) -> int:
        """Return the port of the primary, as the first Sentinel reports it."""
        with self.redis(self.sentinel_ports[0]) as sentinel:
            address: Any = sentinel.sentinel_get_master_addr_by_name(MASTER)
        return int(address[1])

    def kill(self, port: int) -> None:
        """Kill a server by SIGKILL."""
        os.kill(self.servers[port].pid, signal.SIGKILL)
        self.servers[port].wait(10)

    def start(self, leaving: ExitStack) -> None:
        """Start all servers, and wait until the Sentinels know each other and the replicas."""
        first, *others = self.redis_ports
        secret = ("--requirepass", self.password, "--masterauth", self.password)
        for port in self.redis_ports:
            options = [
                *("--save", "", "--appendonly", "yes", "--dir", str(self._folder(port))),
                *("--repl-diskless-sync-delay", "0"),
                *(("--replicaof", f"127.0.0.1 {first}") if port in others else ()),
                *(secret if self.password else ()),
            ]
            self._serve(leaving, port, options)
        for port in self.sentinel_ports:
            conf = self._folder(port) / "sentinel.conf"
            lines = [
                f"sentinel monitor {MASTER} 127.0.0.1 {first} {len(self.sentinel_ports) // 2 + 1}",
                f"sentinel down-after-milliseconds {MASTER} 2000",
                f"sentinel failover-timeout {MASTER} 10000",
            ]
            if self.password:
                lines += [f"sentinel auth-pass {MASTER} {self.password}"]
                lines += [f"requirepass {self.password}", f"sentinel sentinel-pass {self.password}"]
            conf.write_text("\n".join(lines), encoding="ascii")
            self._serve(leaving, port, [str(conf), "--sentinel"])
        for port in self.sentinel_ports:
            until(lambda port=port: self._is_complete(port), within=30)  # type: ignore[misc] # a loop's

    def _folder(self, port: int) -> Path:
        folder = self.folder / str(port)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _serve(self, leaving: ExitStack, port: int, options: list[str]) -> None:
        self.servers[port] = leaving.enter_context(
            _valkey(self.folder / f"{port}.log", port, options)
        )
        until(lambda: self._replies(port))

    def _replies(self, port: int) -> bool:
        with self.redis(port) as redis:
            return _replies(redis, self.servers[port])

    def _is_complete(self, port: int) -> bool:
        with self.redis(port) as sentinel:
            state: Any = sentinel.sentinel_masters()[MASTER]
        return bool(
            state["num-slaves"] == len(self.redis_ports) - 1
            and state["num-other-sentinels"] == len(self.sentinel_ports) - 1
        )


@contextmanager
def sentinels_of(
    folder: Path, *, replicas: int = 0, sentinels: int = 1, password: str = ""
) -> Iterator[Sentinels]:
    """A primary, replicas and Sentinels that run within the block."""
    with ExitStack() as leaving:
        servers = Sentinels(folder, replicas, sentinels, password)
        servers.start(leaving)
        yield servers


@contextmanager
def redis_of(folder: Path, *options: str) -> Iterator[int]:
    """The port of one server with these options."""
    (port,) = _free_ports(1)
    command = ["--dir", str(folder), "--appendonly", "yes", "--save", "", *options]
    with _valkey(folder / "valkey.log", port, command) as service, Redis(port=port) as redis:
        until(lambda: _replies(redis, service))
        yield port


@contextmanager
def _valkey(log: Path, port: int, options: list[str]) -> Iterator[Service]:
    service = Service(
        f"valkey-{port}",
        # A configuration file must be the first argument.
        [str(valkey_server()), *options, "--port", str(port), "--bind", "127.0.0.1"],
        log=log,
    )
    service.start()
    try:
        yield service
    finally:
        service.stop()


def _replies(redis: Redis, service: Service) -> bool:
    assert service.alive, service.log_tail()
    try:
        return bool(redis.ping())
    except AuthenticationError:
        return True
    except RedisError:
        return False


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
