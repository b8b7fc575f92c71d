"""The servers that both clients connect to."""

from __future__ import annotations

from typing import Any

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import result_key
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sentinel://:s3cret@host:26379", "got 'sentinel:.*@host:26379', expected a master_name"),
        ("amqp://guest:s3cret@host//", r"got 'amqp://guest:\*\*\*@.*expected redis://"),
        ("localhost:6379/s3cret", "got no URL, expected redis://.*; the scheme is missing"),
        ("localhost:6379", "got 'localhost:6379', expected redis://localhost:6379; the scheme is"),
        ("localhost", "got 'localhost', expected redis://localhost:6379/0; the scheme is missing"),
        ("10.0.0.7/1", "got '10.0.0.7/1', expected redis://10.0.0.7:6379/1; the scheme is missing"),
        ("s3cret.s3cret", "got no URL, expected redis://:PASSWORD@HOST:6379/0, .*; the scheme is"),
        ("redis.example.com:6379/1", "expected redis://redis.example.com:6379/1; the scheme is"),
        ("user:123456", "got no URL, expected redis://.*; the scheme is missing"),
        ("unix:///run/redis.sock", r"expected redis\+socket:///PATH.*, not unix://"),
        ("valkey://host", "got 'valkey://host', expected redis://.*, not valkey://"),
        (5, "expected redis://.*, got the number 5"),
        ("http://host:6379", "got 'http://host:6379', expected redis://"),
        ("redis://:s3cret/@host:6379/0", "got 'redis://.*@host:6379/0'.*percent-encoded"),
        ("redis://:s3cret#s3cret@host", "percent-encoded .*%23 for #"),
        ("redis://:s3cret@host:port/0", "expected a host and a port"),
        ("redis://:s3cret@host:6379/one", "expected a database number"),
        ("redis://:s3cret@host:99999/0", "expected a host and a port"),
        ("redis://:s3cret@host:6379/0?virtual_host=s3cret", "expected a database number"),
        ("redis://:s3cret@host:6379/0?no_such_option=s3cret", "expected no options but db"),
        ("rediss://:s3cret@host:6379/0?ssl_cert_reqs=s3cret", "required, optional or none"),
        ("redis+socket://:s3cret@/run/redis.sock?virtual_host=x", "redis.socket:///PATH"),
    ],
)
@pytest.mark.parametrize("kind", CLIENTS)
def test_an_invalid_url_raises_a_value_error(kind: str, url: Any, says: str) -> None:
    """The ValueError names the argument and what was expected, and contains no password."""
    for name, arguments in (("broker_url", (url,)), ("result_backend", ("redis://host", url))):
        with pytest.raises(ValueError, match=says) as caught:
            CLIENTS[kind](*arguments)
        assert str(caught.value).startswith(f"{name}: ")
        assert "s3cret" not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("redis://", {"db": 0}),
        ("redis://host", {"host": "host", "db": 0}),
        ("redis://host:1234//", {"host": "host", "port": 1234, "db": 0}),
        ("redis://:pa%2Fss@host/1", {"password": "pa/ss", "host": "host", "db": 1}),
        ("redis://ann:pass@host/1", {"username": "ann", "password": "pass"}),
        ("redis://host/1?virtual_host=/3", {"db": 3}),
        ("rediss://host/1?ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": "none", "db": 1}),
        ("rediss://host?ssl_cert_reqs=required", {"ssl_cert_reqs": "required"}),
        ("rediss://host", {"ssl_cert_reqs": "required", "port": 6379}),
        ("redis+socket:///run/r.sock?virtual_host=3", {"path": "/run/r.sock", "db": 3}),
        ("redis+socket://:pass@/run/r.sock", {"path": "/run/r.sock", "password": "pass"}),
    ],
)
def test_a_url_is_parsed_as_celery_parses_it(url: str, wanted: dict[str, object]) -> None:
    """Both clients connect to the server of the URL, in each spelling that Celery accepts."""
    clients = (InterviewAccessClient(url), AsyncInterviewAccessClient(url))
    for pool in (client._queue.connection_pool for client in clients):
        found = {name: pool.connection_kwargs.get(name) for name in wanted}
        assert found | {"db": found.get("db")} == wanted | {"db": found.get("db")}
        if "db" in wanted:
            assert found["db"] == wanted["db"]
        assert ("SSL" in pool.connection_class.__name__) == url.startswith("rediss")


def test_results_can_be_on_another_server(broker: str, server: LocalStack) -> None:
    """The result is read from the server of the result backend."""
    elsewhere = f"{server.broker_url}?virtual_host=8"
    path = server.broker_url.removeprefix("redis+socket://")
    for make in CLIENTS.values():
        client = make(broker, elsewhere)
        with Redis(unix_socket_path=path, db=8) as redis:
            redis.set(result_key("far"), '{"status": "SUCCESS", "result": {"success": true}}')
            assert client.wait("far", timeout=5) == {"success": True}
            redis.flushdb()
        client.close()


def test_urls_default_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments the URLs are those of the environment; a missing one is a ValueError."""
    for make in CLIENTS.values():
        monkeypatch.delenv("CELERY_BROKER_URL", raising=False)
        monkeypatch.delenv("CELERY_RESULT_BACKEND", raising=False)
        with pytest.raises(ValueError, match=r"expected a URL .* in CELERY_BROKER_URL"):
            make()
        monkeypatch.setenv("CELERY_BROKER_URL", "redis://host")
        make().close()
        monkeypatch.setenv("CELERY_RESULT_BACKEND", "db+postgresql://ann:s3cret@host/db")
        with pytest.raises(ValueError, match=r"CELERY_RESULT_BACKEND: got 'db\+postgresql://"):
            make()
