"""What a worker looks at before it takes its first job, and says in one line where it is wrong.

A server that cannot be reached stops nothing: Celery waits for Redis, and jobs wait for
PostgreSQL. A server that is there and cannot do the work stops the worker.
"""

from __future__ import annotations

from typing import Any

import kombu
from celery import Celery
from celery.utils.log import get_logger
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from storage.interface import StorageError, TransientStorageError
from storage.schema import check_schema
from worker.settings import Settings
from worker.transport import missing_seam

logger = get_logger(__name__)

_OLDEST_REDIS = 7


def check_servers(settings: Settings, app: Celery) -> None:
    """Look at both servers' versions, at the schema, and at what Redis may throw away.

    Raises:
        SystemExit: with what was found, what was expected and what to do, where a server is too
            old or the tables do not fit. What risks jobs without refusing them is a warning.
    """
    problem = None
    if missing := missing_seam():
        raise SystemExit(
            f"The worker cannot start: expected {missing}, on which worker/transport.py stands; "
            f"got kombu {kombu.__version__}. Install the versions of requirements.lock."
        )
    try:
        problem = check_schema(settings.database_url)
    except TransientStorageError as error:
        logger.warning("PostgreSQL cannot be reached; jobs will wait for it: %s", error)
    except StorageError as error:
        problem = str(error)
    try:
        problem = problem or _redis_problem(app)
    except (OperationalError, RedisError, OSError) as error:
        logger.warning("Redis cannot be reached; the worker waits for it: %s", error)
    if problem:
        raise SystemExit(f"The worker cannot start: {problem}")


def _redis_problem(app: Celery) -> str | None:
    with app.connection_for_read() as connection:
        info: dict[str, Any] = connection.default_channel.client.info()
    # Valkey gives the version of the Redis that it stands for under this name.
    version = str(info["redis_version"])
    if int(version.partition(".")[0]) < _OLDEST_REDIS:
        return f"got Redis {version}, expected Redis 7 or Valkey 7.2 at least"
    if info["maxmemory_policy"] != "noeviction":
        logger.warning(
            "Redis may throw jobs and results away: got maxmemory-policy %s, expected noeviction",
            info["maxmemory_policy"],
        )
    if not info["aof_enabled"]:
        logger.warning("Redis loses jobs when it restarts: got appendonly no, expected yes")
    return None
