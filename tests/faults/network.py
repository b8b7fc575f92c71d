"""Two hosts with workers, and a network to the servers that can be cut.

If the machine allows it (root, `ip netns`), each host is a network namespace, and a router in a
third namespace silently drops the packets of a cut. Otherwise a host's connections pass relays
that stop forwarding.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from devstack.service import Service
from tests.support.relay import Pair, SocketRelay
from tests.support.workers import Site, started, worker_service

SERVERS = ("redis", "postgresql")

_POSTGRES_SOCKET = ".s.PGSQL.5432"
_CONNECTIONS = 200


class Forwarder(SocketRelay):
    """Listens on TCP for a server that has only a Unix socket; can stop forwarding."""

    def __init__(self, address: str, server: Path) -> None:
        """Listen for connections.

        Args:
            address: The IP address to listen at; the port is chosen by the system.
            server: The server's socket.
        """
        self._flowing = threading.Event()
        self._flowing.set()
        listener = socket.create_server((address, 0), backlog=_CONNECTIONS)
        self.port: int = listener.getsockname()[1]
        super().__init__(server, listener)

    def stall(self) -> None:
        """Forward nothing, and close no connection."""
        self._flowing.clear()

    def heal(self) -> None:
        """Forward again, including what was received meanwhile."""
        self._flowing.set()

    def close(self) -> None:
        """Close all connections and stop listening."""
        self.heal()
        super().close()

    def pumps(self, pair: Pair) -> tuple[Callable[[], object], Callable[[], object]]:
        """See the base class."""
        client, server = pair
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return (
            lambda: self._pass(pair, client, server),
            lambda: self._pass(pair, server, client),
        )

    def _pass(self, pair: Pair, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                self._flowing.wait()
                target.sendall(data)
        self._flowing.wait()  # a cut network also loses the end of a connection
        self.disconnect(pair)


class Network(ABC):
    """Hosts and their connections to the servers.

    Attributes:
        hosts: Their names.
    """

    hosts = ("a", "b")

    def __init__(self, here: Site) -> None:
        """Take the addresses of a site's servers; see :meth:`open`."""
        folder = Path(here.store.database_url.partition("host=")[2].replace("%2F", "/"))
        self._redis, _, self._options = here.broker.removeprefix("redis+socket://").partition("?")
        self._database = here.store.database_url
        self._sockets = {"redis": Path(self._redis), "postgresql": folder / _POSTGRES_SOCKET}
        self._forwarders: dict[tuple[str, str], Forwarder] = {}

    @abstractmethod
    def command(self, host: str) -> Sequence[str]:
        """Return the prefix of commands that run on the host."""

    @abstractmethod
    def address(self, host: str, server: str) -> str:
        """Return the IP address by which the host reaches the server."""

    @abstractmethod
    def cut(self, host: str, server: str) -> None:
        """Drop everything between the host and the server, in both directions."""

    @abstractmethod
    def heal(self) -> None:
        """Undo all cuts."""

    def open(self) -> None:
        """Create the network."""
        for host in self.hosts:
            for server in SERVERS:
                at = self.address(host, server)
                self._forwarders[host, server] = Forwarder(at, self._sockets[server])

    def close(self) -> None:
        """Remove the network."""
        for forwarder in self._forwarders.values():
            forwarder.close()

    def settings(self, host: str) -> dict[str, str]:
        """Return the environment variables of the host's worker."""
        redis, postgresql = (
            f"{self.address(host, server)}:{self._forwarders[host, server].port}"
            for server in SERVERS
        )
        number = self._options.partition("virtual_host=")[2] or "0"
        user, _, rest = self._database.partition("@")
        database = rest.partition("/")[2].partition("?")[0]
        return {
            "CELERY_BROKER_URL": f"redis://{redis}/{number}",
            "DATABASE_URL": f"{user}@{postgresql}/{database}",
        }

    @contextmanager
    def worker(self, here: Site, host: str, log: Path, **settings: object) -> Iterator[Service]:
        """A worker on a host."""
        service = worker_service(
            log,
            here.environment(**{**self.settings(host), **settings}),
            processes=4,
            name=f"{host}@%h",
            prefix=self.command(host),
        )
        with started(service):
            try:
                yield service
            finally:
                self.heal()


class Relayed(Network):
    """All hosts are this machine; a cut stops relays from forwarding."""

    def command(self, host: str) -> Sequence[str]:  # noqa: ARG002 - the interface's parameters
        """See :class:`Network`."""
        return ()

    def address(self, host: str, server: str) -> str:  # noqa: ARG002 - the interface's parameters
        """See :class:`Network`."""
        return "127.0.0.1"

    def cut(self, host: str, server: str) -> None:
        """See :class:`Network`."""
        self._forwarders[host, server].stall()

    def heal(self) -> None:
        """See :class:`Network`."""
        for forwarder in self._forwarders.values():
            forwarder.heal()


class Namespaces(Network):
    """Each host is a network namespace; this namespace has one address for each host and server.

    The packets pass a router in a third namespace. It drops the packets of a cut, so that the
    sender receives no error.
    """

    _CUT = ("from", "to")

    def __init__(self, here: Site) -> None:
        """See :class:`Network`; names and addresses are unique to this process."""
        super().__init__(here)
        self._id = os.getpid() % 10_000
        self._router = f"chaos{self._id}r"
        self._net = f"10.{64 + self._id % 64}.{self._id // 64}"  # 16 addresses for each network
        self._cuts: list[list[str]] = []

    def command(self, host: str) -> Sequence[str]:
        """See :class:`Network`."""
        return (_ip(), "netns", "exec", self._name(host))

    def address(self, host: str, server: str) -> str:
        """See :class:`Network`."""
        return f"{self._net}.{1 + 2 * self.hosts.index(host) + SERVERS.index(server)}"

    def cut(self, host: str, server: str) -> None:
        """See :class:`Network`."""
        for direction in self._CUT:
            rule = [direction, self.address(host, server), "blackhole"]
            _run("-n", self._router, "rule", "add", *rule)
            self._cuts.append(rule)

    def heal(self) -> None:
        """See :class:`Network`."""
        for rule in self._cuts:
            _run("-n", self._router, "rule", "del", *rule)
        self._cuts.clear()

    def open(self) -> None:
        """See :class:`Network`.

        Raises:
            OSError: if the machine does not allow namespaces; what was created is removed.
        """
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        super().open()

    def _open(self) -> None:
        router, link = self._router, f"c{self._id}s"
        _run("netns", "add", router)
        _run("link", "add", link, "type", "veth", "peer", "name", "servers", "netns", router)
        for host in self.hosts:
            for server in SERVERS:
                _run("addr", "add", f"{self.address(host, server)}/28", "dev", link)
        _run("link", "set", link, "up")
        _run("-n", router, "addr", "add", f"{self._net}.14/28", "dev", "servers")
        _run("-n", router, "link", "set", "servers", "up")
        forwarding = Path("/proc/sys/net/ipv4/ip_forward")
        _run("netns", "exec", router, "sh", "-c", f"echo 1 > {forwarding}")
        for number, host in enumerate(self.hosts, start=1):
            name, net = self._name(host), f"{self._net}.{16 * number}"
            first = 16 * number + 1
            _run("netns", "add", name)
            peer = ("peer", "name", "out", "netns", name)
            _run("-n", router, "link", "add", f"to-{host}", "type", "veth", *peer)
            _run("-n", router, "addr", "add", f"{self._net}.{first}/28", "dev", f"to-{host}")
            _run("-n", router, "link", "set", f"to-{host}", "up")
            _run("-n", name, "addr", "add", f"{self._net}.{first + 1}/28", "dev", "out")
            _run("-n", name, "link", "set", "out", "up")
            _run("-n", name, "link", "set", "lo", "up")
            _run("-n", name, "route", "add", "default", "via", f"{self._net}.{first}")
            _run("route", "add", f"{net}/28", "via", f"{self._net}.14")

    def close(self) -> None:
        """See :class:`Network`; a deleted namespace takes its devices and their routes with it."""
        super().close()
        for name in [self._router, *map(self._name, self.hosts)]:
            with suppress(OSError):
                _run("netns", "del", name)

    def _name(self, host: str) -> str:
        return f"chaos{self._id}{host}"


def _ip() -> str:
    return shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or "ip"


def _run(*arguments: str) -> None:
    """Run `ip`.

    Raises:
        OSError: if the command is missing or fails.
    """
    done = subprocess.run([_ip(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def network(here: Site) -> Iterator[Network]:
    """A network of namespaces or, if they cannot be created, of relays."""
    made: Network = Namespaces(here)
    try:
        made.open()
    except OSError:
        made = Relayed(here)
        made.open()
    try:
        yield made
    finally:
        made.close()
