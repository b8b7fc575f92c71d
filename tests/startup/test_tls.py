"""TLS to both servers, with a private certificate authority."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from interview_access.errors import QueueUnavailableError
from sqlalchemy import make_url, text

from storage.errors import StorageError
from storage.samples import NAMED_SAMPLES, load_samples
from storage.schema import check_schema
from tests.startup.checks import PASSWORD, check, refusal
from tests.support.clients import CLIENTS
from tests.support.commands import run_module
from tests.support.database import connected
from tests.support.stores import until
from tests.support.tls_relay import CA, CLIENT, ELSEWHERE, KEY, OTHER_CA, SERVER, tls_relay
from tests.support.workers import Site, worker

CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :database"


def socket_of_redis(here: Site) -> str:
    """Return the path of Redis' socket."""
    return here.broker.removeprefix("redis+socket://").partition("?")[0]


def socket_of_postgresql(database_url: str) -> str:
    """Return the path of PostgreSQL's socket."""
    return f"{make_url(database_url).query['host']}/.s.PGSQL.5432"


def database_by_tls(database_url: str, port: int, **options: object) -> str:
    """Return the database's URL at a TLS relay."""
    named = {name: str(value) for name, value in options.items()}
    url = make_url(database_url).set(host="localhost", port=port, password=PASSWORD)
    url = url.set(query={"sslmode": "verify-full", **named})
    return url.render_as_string(hide_password=False)


def redis_by_tls(port: int, **options: object) -> str:
    """Return the URL of Redis at a TLS relay."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"rediss://localhost:{port}/14?{query}"


@pytest.fixture
def redis_port(here: Site) -> Iterator[int]:
    """The port of a TLS relay to the site's Redis."""
    with tls_relay(socket_of_redis(here)) as port:
        yield port


def test_everything_by_tls(here: Site, redis_port: int, database_url: str, tmp_path: Path) -> None:
    """`migrate`, a worker and both clients work with the certificate authority's file."""
    redis_url = redis_by_tls(redis_port, ssl_ca_certs=CA)
    log = tmp_path / "worker.log"
    with tls_relay(socket_of_postgresql(database_url)) as port:
        url = database_by_tls(database_url, port, sslrootcert=CA)
        addresses = {"DATABASE_URL": url, "CELERY_BROKER_URL": redis_url}
        assert run_module(here.environment(**addresses), "worker.cli", "migrate").returncode == 0
        load_samples(database_url, len(NAMED_SAMPLES))
        check(url, redis_url)
        with worker(here, log, **addresses):
            for name, make in CLIENTS.items():
                client = make(redis_url)
                job_id = client.enqueue(f"tls {name}", [NAMED_SAMPLES[0]])
                assert client.wait(job_id, timeout=30)["created_access_count"] == 1
                client.close()
    assert "Traceback" not in log.read_text(encoding="utf-8")


def test_certificate_files_are_read_at_each_connection(
    here: Site, redis_port: int, migrated_url: str, tmp_path: Path
) -> None:
    """A worker whose authority's file was wrong connects when it is replaced, without a restart."""
    file, log = tmp_path / "authority.pem", tmp_path / "worker.log"
    shutil.copy(CA, file)
    load_samples(migrated_url, len(NAMED_SAMPLES))
    with tls_relay(socket_of_postgresql(migrated_url)) as port:
        addresses = {
            "DATABASE_URL": database_by_tls(migrated_url, port, sslrootcert=file),
            "CELERY_BROKER_URL": redis_by_tls(redis_port, ssl_ca_certs=file),
        }
        with worker(here, log, **addresses) as service:
            shutil.copy(OTHER_CA, file)
            with connected(here.store.database_url, autocommit=True) as connection:
                connection.execute(text(CUT), {"database": make_url(migrated_url).database})
            here.redis.client_kill_filter(_type="normal", skipme=True)
            until(lambda: b"Cannot connect to rediss" in log.read_bytes())
            until(lambda: b"service=OutboxRelay error_type=StorageError" in log.read_bytes())
            shutil.copy(CA, file)
            job_id = here.send("renewed", [NAMED_SAMPLES[0]])
            assert here.answer(job_id)["status"] == "SUCCESS"
            assert service.alive


def test_certificates_are_verified_by_default(here: Site, redis_port: int) -> None:
    """Worker and clients refuse a certificate of an authority that they do not know."""
    url = redis_by_tls(redis_port)
    sentence = refusal(here.store.database_url, url)
    assert "the certificate of Redis at localhost:" in sentence
    for make in CLIENTS.values():
        client = make(url)
        with pytest.raises(QueueUnavailableError, match="certificate verify failed"):
            client.enqueue("ann", [NAMED_SAMPLES[0]])
        client.close()


def test_a_redis_of_another_authority_is_refused(here: Site, redis_port: int) -> None:
    """The error names the variable, the reason and the option."""
    url = redis_by_tls(redis_port, ssl_ca_certs=OTHER_CA)
    assert refusal(here.store.database_url, url) == (
        f"CELERY_BROKER_URL: the certificate of Redis at localhost:{redis_port} cannot be "
        "verified: unable to get local issuer certificate. Set ssl_ca_certs to the file of its "
        "certificate authority, and use the host name that the certificate has."
    )


def test_a_redis_of_another_name_is_refused(here: Site) -> None:
    """The error quotes the host name that the certificate does not have."""
    with tls_relay(socket_of_redis(here), certificate=ELSEWHERE) as port:
        sentence = refusal(here.store.database_url, redis_by_tls(port, ssl_ca_certs=CA))
    assert "certificate is not valid for 'localhost'" in sentence


def test_a_client_certificate_for_redis(here: Site) -> None:
    """A Redis that requires a client's certificate accepts the worker with one."""
    files = {"ssl_certfile": CLIENT, "ssl_keyfile": KEY}
    with tls_relay(socket_of_redis(here), for_clients_of=CA) as port:
        check(here.store.database_url, redis_by_tls(port, ssl_ca_certs=CA, **files))


@pytest.mark.parametrize(
    ("certificate", "options", "reason"),
    [
        (SERVER, {"sslrootcert": OTHER_CA}, "certificate verify failed"),
        (SERVER, {"sslrootcert": "/none"}, 'root certificate file "/none" does not exist'),
        (ELSEWHERE, {"sslrootcert": CA}, 'does not match host name "localhost"'),
    ],
    ids=["another authority", "no file", "another name"],
)
def test_a_postgresql_that_cannot_be_verified_is_refused(
    here: Site, certificate: Path, options: dict[str, object], reason: str
) -> None:
    """The worker does not wait for it; the error quotes libpq, and names what to check."""
    path = socket_of_postgresql(here.store.database_url)
    with tls_relay(path, certificate=certificate) as port:
        sentence = refusal(database_by_tls(here.store.database_url, port, **options), here.broker)
    assert sentence.startswith(f"TLS to PostgreSQL at postgresql://postgres@localhost:{port}/")
    assert reason in sentence
    assert "check the options ssl… and the host of DATABASE_URL" in sentence


def test_a_client_certificate_for_postgresql(here: Site, tmp_path: Path) -> None:
    """A server that requires a client's certificate accepts one; libpq checks the key's mode."""
    key = tmp_path / "client.key"
    shutil.copy(KEY, key)
    path = socket_of_postgresql(here.store.database_url)
    options = {"sslrootcert": CA, "sslcert": CLIENT, "sslkey": key}
    with tls_relay(path, for_clients_of=CA) as port:
        url = database_by_tls(here.store.database_url, port, **options)
        key.chmod(0o644)
        with pytest.raises(StorageError, match=r"private key file .* has group or world access"):
            check_schema(url)
        key.chmod(0o600)
        assert check_schema(url) is None
