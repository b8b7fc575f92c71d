"""What a worker verifies of PostgreSQL and Redis.

An unreachable server does not stop the worker, which waits for it as the jobs do. A server that
refuses the worker, or does not meet the requirements, stops it with one sentence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from ssl import SSLCertVerificationError
from typing import Any

from celery.utils.log import get_logger
from interview_access.connections import connect
from interview_access.contracts import (
    CONTROL_QUEUE,
    LIMITS_KEY,
    QUEUE,
    announcement_key,
    reply_key,
    result_key,
)
from interview_access.errors import shortened
from interview_access.redis_address import RedisAddress
from redis import Redis
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

from storage.errors import StorageError
from storage.schema import DatabaseUnavailableError, check_schema, read_identity
from worker.broker.claims import DEAD, PAUSED, PREFIX
from worker.broker.scripts import script
from worker.broker.transport import CLIENT_NAME
from worker.settings import Settings
from worker.startup import StartupError

logger = get_logger(__name__)

_OLDEST_REDIS = 7
_SECONDS = 5.0  # to connect, and for each reply
_HEARTBEAT_SECONDS = 2.0  # in which a live session renews its lease at least once
_DATABASE = f"{PREFIX}database"
_LEASES = f"{PREFIX}leases"

_PASSING = (ClusterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
_PASSING_CODES = ("BUSY ", "MISCONF ", "NOREPLICAS ")
"""Error codes for which redis-py has no class; it leaves them in the error's text."""

_LANE = f"{QUEUE}\x06\x169"
_COMMON = {
    "": "PING MULTI EXEC INFO",
    "x": "CLIENT|SETNAME SCRIPT|LOAD",
    f"x 1 {PREFIX}": "EVALSHA",
    f"{PREFIX}replies": "LINDEX RPUSH LPOP EXPIRE",
}
_RESULTS = {result_key("x"): "GET MGET GETRANGE SET SETEX DEL PUBLISH"}
_JOBS = {
    QUEUE: "LPUSH RPUSH LLEN LINDEX LTRIM EXISTS",
    _LANE: "RPUSH LLEN LINDEX LTRIM EXISTS",
    "SKIP": "CLIENT|REPLY",
    f"{QUEUE} {QUEUE}": "BLMOVE",
    f"{QUEUE} {_LANE}": "RPOPLPUSH",
    _DATABASE: "GET SET",
    _LEASES: "ZADD ZREM ZSCORE ZRANGE",
    f"{PREFIX}held:x": "HSET HSETNX HGET HDEL HKEYS HLEN EXISTS",
    f"{PREFIX}deferred": "HSET HGET HDEL",
    f"{PREFIX}due": "ZADD ZREM ZRANGEBYSCORE EXISTS",
    f"{PREFIX}isolated": "LPUSH RPUSH LINDEX LTRIM LLEN EXISTS",
    f"{PREFIX}tries": "HINCRBY HGET HEXISTS HDEL EXPIRE",
    f"{PREFIX}deferrals": "HINCRBY HGET HDEL EXPIRE",
    f"{PREFIX}clock": "HGET HSET HINCRBY",
    f"{PREFIX}relay": "EXISTS SET",
    DEAD: "XADD XRANGE XDEL",
    f"USAGE {DEAD}": "MEMORY",
    f"{PREFIX}counted": "ZADD ZREM ZRANGEBYSCORE EXPIRE",
    f"{PREFIX}dropped": "HINCRBY",
    announcement_key("x"): "SET EXISTS GETRANGE EXPIRE",
    CONTROL_QUEUE: "RPOP",
    f"{CONTROL_QUEUE} {CONTROL_QUEUE}": "BLMOVE",
    LIMITS_KEY: "SET",
    reply_key("x"): "SET GET DEL PUBLISH",
    "_kombu.binding.x": "SADD SREM SMEMBERS",
    "_kombu.binding_permanent.x": "SADD SREM",
    "x.celery.pidbox": "LLEN DEL",
    "x.reply.celery.pidbox": "LPUSH",
    "/{database}.celery.pidbox": "PUBLISH PSUBSCRIBE",
    "/{database}.celeryev/worker.heartbeat": "PUBLISH",
    "": "TIME PUNSUBSCRIBE",
}
"""Commands that a worker sends, by their first arguments: keys and channels as they will be."""

_PAUSE = {PAUSED: "EXISTS GETRANGE"}
"""Commands without which a worker works, but ignores `interview-access pause`."""


def check_servers(settings: Settings) -> None:
    """Verify PostgreSQL's version and schema, and both servers of Redis.

    A server that cannot be reached, and a setting of Redis that risks jobs, is a warning.

    Raises:
        StartupError: if a server refuses the worker or does not meet the requirements.
    """
    database = _check_database(settings.database_url, prunes=settings.retention is not None)
    tables = [_COMMON, _JOBS, _PAUSE]
    if settings.results == settings.broker:
        tables.append(_RESULTS)
    _check_redis(settings.broker, "CELERY_BROKER_URL", *tables, database=database)
    if settings.results != settings.broker:
        _check_redis(settings.results, "CELERY_RESULT_BACKEND", _COMMON, _RESULTS)


def _check_database(database_url: str, *, prunes: bool) -> str:
    """Return the database's identity and name, or an empty string if they are unknown."""
    try:
        problem = check_schema(
            database_url,
            prunes=prunes,
            warn=lambda risk: logger.warning("PostgreSQL may be inconsistent: risk=%s", risk),
            inform=lambda version: logger.info("PostgreSQL schema is newer: version=%s", version),
        )
    except DatabaseUnavailableError as error:
        logger.warning("PostgreSQL unavailable, jobs wait for it: error=%s", error)
        return ""
    except StorageError as error:
        problem = str(error)
    if problem:
        raise StartupError(problem)
    with suppress(StorageError):
        return " ".join(read_identity(database_url))
    return ""


def _check_redis(
    address: RedisAddress, variable: str, *tables: Mapping[str, str], database: str = ""
) -> None:
    commands = [
        f"{command.replace('|', ' ')} {arguments.format(database=address.database)}".strip()
        for table in tables
        for arguments, names in table.items()
        for command in names.split()
    ]
    if address.master_name:
        _check_sentinels(address, variable)
    try:
        with connect(
            # A server in cluster mode refuses another database before it reports its mode.
            replace(address, database=0),
            client_name=CLIENT_NAME,
            connect_timeout=_SECONDS,
            timeout=_SECONDS,
        ) as redis:
            _check_server(redis, variable)
            if address.database:
                redis.execute_command("SELECT", address.database)
            denied: Any = redis.register_script(script("denied_commands"))(args=commands)
            if database and not denied:
                _record_database(redis, database)
    except (RedisError, OSError) as error:
        _raise_refusal(error, variable, f"Redis at {address}")
        logger.warning("Redis unreachable, the worker waits: variable=%s error=%s", variable, error)
        return
    names = sorted(command.decode() for command in denied)
    if any(name.endswith(PAUSED) for name in names):
        logger.warning(
            "Redis does not permit to read interview-access:paused, the worker ignores `pause`: "
            "variable=%s",
            variable,
        )
    if required := [name for name in names if not name.endswith(PAUSED)]:
        listed = shortened(", ".join(required), quoted=False, at_most=2_000)
        raise StartupError(
            f"{variable}: Redis at {address} does not permit its user these commands: {listed}. "
            "Permit them by ACL SETUSER."
        )


def _record_database(redis: Redis, database: str) -> None:
    """Record the worker's database, and warn if live workers have recorded another one.

    It is no error: workers that follow a database through its move recorded the former one.
    """
    record = redis.register_script(script("record_database"))
    try:
        reply: Any = record(keys=[_DATABASE, _LEASES], args=[database])
    except ReadOnlyError:
        return
    before = reply[0].decode(errors="replace")
    counters = dict(zip(reply[1][::2], map(float, reply[1][1::2]), strict=True))
    if not counters or before.partition(" ")[0] in {"", database.partition(" ")[0]}:
        return
    time.sleep(_HEARTBEAT_SECONDS)  # a worker that was killed leaves its session behind
    later: Any = redis.zrange(_LEASES, 0, -1, withscores=True)
    if any(counters.get(session, counter) != counter for session, counter in later):
        logger.warning(
            "workers of one queue use different databases, each job sees only one of them: "
            "database=%s other=%s; set the same DATABASE_URL for all workers, or another "
            "CELERY_BROKER_URL for those of the other database",
            *(shortened(one, quoted=False, at_most=200) for one in (database, before)),
        )


def _raise_refusal(error: Exception, variable: str, server: str) -> None:
    """Raise a StartupError, unless the server may serve the worker later."""
    if isinstance(error.__context__, SSLCertVerificationError):
        raise StartupError(
            f"{variable}: the certificate of {server} cannot be verified: "
            f"{error.__context__.verify_message}. Set ssl_ca_certs to the file of its certificate "
            "authority, and use the host name that the certificate has."
        ) from None
    if _is_refusal(error):
        raise StartupError(f"{variable}: {server} refuses the worker: {error}.") from None


def _is_refusal(error: Exception) -> bool:
    """Whether the server replied by an error, and not by one that passes."""
    if isinstance(error, ResponseError):
        is_passing = isinstance(error, _PASSING) or str(error).startswith(_PASSING_CODES)
        return not is_passing
    return isinstance(error, AuthenticationError)


def _check_server(redis: Redis, variable: str) -> None:
    info: Any = redis.info()
    mode = info.get("redis_mode") or info.get("server_mode")  # Valkey's name for it
    if mode == "sentinel":
        raise StartupError(f"{variable}: got a Sentinel, expected a Redis, or a sentinel:// URL.")
    # Valkey gives the version of the Redis that it is compatible with under this name.
    version = str(info.get("redis_version"))
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < _OLDEST_REDIS:
        raise StartupError(
            f"{variable}: got Redis {version}, expected Redis 7 or Valkey 7.2 at least."
        )
    if mode == "cluster":
        raise StartupError(
            f"{variable}: got a Redis in cluster mode, expected a single one "
            "(cluster-enabled no), with replicas and Sentinels if needed."
        )
    # Managed servers and proxies hide some of these.
    if info.get("role", "master") != "master":
        logger.warning(
            "Redis is a replica, the worker waits until it is promoted: variable=%s", variable
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        logger.warning(
            "Redis may evict jobs: variable=%s maxmemory_policy=%s expected=%s",
            *(variable, policy, "noeviction"),
        )
    if not info.get("aof_enabled", True):
        logger.warning(
            "Redis loses jobs when it restarts: variable=%s appendonly=%s expected=%s",
            *(variable, "no", "yes"),
        )


def _check_sentinels(address: RedisAddress, variable: str) -> None:
    """Tell a name that no Sentinel knows from a primary that is away."""
    names: set[str] = set()
    for host in address.hosts:
        sentinel = RedisAddress(
            "redis", (host,), password=address.sentinel_password, tls=address.tls
        )
        try:
            with connect(
                sentinel, client_name=CLIENT_NAME, connect_timeout=_SECONDS, timeout=_SECONDS
            ) as redis:
                names |= redis.sentinel_masters().keys()
        except (RedisError, OSError) as error:
            _raise_refusal(error, variable, f"the Sentinel at {sentinel}")
            logger.warning("Sentinel unreachable: variable=%s error=%s", variable, error)
    if names and address.master_name not in names:
        raise StartupError(
            f"{variable}: got the master_name {address.master_name!r}, "
            f"expected one that the Sentinels know: {', '.join(sorted(names))}."
        )
