"""How Celery connects to Redis: addresses, TLS, Sentinels, timeouts and names of connections."""

from __future__ import annotations

from typing import Any

import kombu
from celery.app.amqp import AMQP
from interview_access.producer import KEEPALIVE, sentinel_options
from interview_access.redis_address import RedisAddress, masked

from worker.settings import Settings

CLIENT_NAME = "interview-access-worker"
"""The name of a worker's connections in ``CLIENT LIST``."""

_SENTINEL_SECONDS = 3.0  # for the replies of all Sentinels together
_MASK = "***"


def celery_settings(settings: Settings) -> dict[str, Any]:
    """Celery's settings that follow from the addresses of both servers.

    Celery reads CELERY_BROKER_URL by itself, but for the two settings of reading and writing.
    """
    broker, results = settings.broker, settings.results
    return {
        "broker_read_url": broker.celery_url,
        "broker_write_url": broker.celery_url,
        "broker_transport_options": {
            "client_name": CLIENT_NAME,
            **_sentinels(broker),
            **({} if broker.path else KEEPALIVE),
        },
        "redis_client_name": CLIENT_NAME,
        "result_backend_transport_options": {
            **_sentinels(results),
            "connection": {
                **({} if results.path else KEEPALIVE),
                # Of rediss:// Celery's backend learns by the URL.
                **(results.connection_options if results.master_name else {}),
            },
        },
    }


def _sentinels(address: RedisAddress) -> dict[str, Any]:
    if not address.master_name:
        return {}
    return {
        "master_name": address.master_name,
        "sentinel_kwargs": sentinel_options(address, _SENTINEL_SECONDS),
    }


class BrokerConnection(kombu.Connection):  # type: ignore[misc] # kombu ships no types
    """kombu's own, without passwords in its description, which `inspect stats` and Flower show."""

    def ensure(self, obj: Any, fun: Any, *args: Any, **policy: Any) -> Any:
        """Retry only as often as the caller says.

        A worker's heartbeat event names no limit: kombu would keep the main loop from everything
        else for as long as Redis is away.
        """
        return super().ensure(obj, fun, *args, **{"max_retries": 0, **policy})

    def info(self) -> dict[str, Any]:
        """Describe the connection."""
        info: dict[str, Any] = super().info()
        options = dict(info["transport_options"])
        options.pop("sentinel_kwargs", None)
        hostname = info["hostname"] or ""
        return {
            **info,
            "hostname": masked(hostname).strip("'") if "://" in hostname else hostname,
            "password": info["password"] and _MASK,
            "alternates": [masked(url).strip("'") for url in info["alternates"]],
            "transport_options": options,
        }

    def as_uri(self, *args: Any, **options: Any) -> str:
        """As kombu writes it; Flower asks for the password."""
        plain = kombu.Connection(**dict(self._info(resolve=False)))
        return str(plain.as_uri(*args, **options))


class Protocol(AMQP):  # type: ignore[misc] # Celery ships no types
    """Celery's own, with connections that describe themselves without a password."""

    Connection = BrokerConnection
