"""A TLS relay in front of a server without TLS."""

from __future__ import annotations

import asyncio
import ssl
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

_FOLDER = Path(__file__).parent / "tls"

CA = _FOLDER / "ca.pem"
"""A private certificate authority, as all certificates here valid from 2020 to 2120."""
OTHER_CA = _FOLDER / "other-ca.pem"
"""An authority that has signed none of the others."""
SERVER = _FOLDER / "server.pem"
"""A server's certificate for localhost and 127.0.0.1, signed by the authority."""
ELSEWHERE = _FOLDER / "elsewhere.pem"
"""A server's certificate for another host, signed by the authority."""
CLIENT = _FOLDER / "client.pem"
"""A client's certificate, signed by the authority."""
KEY = _FOLDER / "server.key"
"""The key of the three certificates."""

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")  # by which a client of PostgreSQL asks for TLS


@contextmanager
def tls_relay(
    path: str, *, certificate: Path = SERVER, for_clients_of: Path | None = None
) -> Iterator[int]:
    """A port that terminates TLS and forwards to the Unix socket at this path.

    TLS begins at once, or after the request of PostgreSQL's protocol if the socket is PostgreSQL's.

    Args:
        path: Path of the socket.
        certificate: The server's certificate.
        for_clients_of: The authority that must have signed a client's certificate.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=for_clients_of)
    context.load_cert_chain(certificate, KEY)
    if for_clients_of:
        context.verify_mode = ssl.CERT_REQUIRED
    asks_for_tls = ".s.PGSQL." in path
    loop = asyncio.new_event_loop()

    async def pass_on(source: StreamReader, target: StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                target.write(data)
                await target.drain()
        target.close()

    async def accept(reader: StreamReader, writer: StreamWriter) -> None:
        # The client may refuse the certificate, and the relay may end before its clients.
        with closing(writer), suppress(OSError, EOFError, asyncio.CancelledError):
            if asks_for_tls:
                assert await reader.readexactly(len(_SSL_REQUEST)) == _SSL_REQUEST
                writer.write(b"S")
                await writer.start_tls(context)
            server_reader, server_writer = await asyncio.open_unix_connection(path)
            with closing(server_writer):
                await asyncio.gather(pass_on(reader, server_writer), pass_on(server_reader, writer))

    first = None if asks_for_tls else context
    server = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0, ssl=first))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_stop(server), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
