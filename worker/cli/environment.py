"""Settings of the subcommands, and the servers that they work with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TypeVar

from celery.exceptions import CeleryError
from interview_access.connections import CLIENT_NAME, connect
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import Needed, explain_denial
from worker.app import WorkerApp, create_app
from worker.cli.terminal import UNAVAILABLE, end, one_line
from worker.settings import DatabaseSettings, Settings, SettingsError

S = TypeVar("S", bound=DatabaseSettings)

_CHECK = "check that {} can be reached, and run the command again"
_PERMIT = (
    "permit it by ACL SETUSER (the keys begin with interview-access and celery-task-meta-), or run "
    "the command as the user worker of deploy/redis/users.acl"
)

# redis-py has no class for a denial within a script. The second is that of Redis 7.0.
_IN_SCRIPT = ("ACL failure in script: ", "The user executing the script can't ")


def read_settings(kind: type[S]) -> S:
    """Read settings from the environment; exit with status 2 if one is missing or invalid.

    Args:
        kind: The settings' class.
    """
    try:
        return kind.from_environment()
    except SettingsError as error:
        end(2, str(error))


@contextmanager
def connected(failure: str, needed: Needed) -> Iterator[tuple[WorkerApp, Redis]]:
    """Connect to both servers; exit with one sentence if one is unavailable or denies access.

    Args:
        failure: What failed then, for the sentence.
        needed: The privileges that the command needs.
    """
    settings = read_settings(Settings)
    app = create_app(settings)
    try:
        with (
            _storage_errors(failure, settings, needed),
            app.connection_for_write() as connection,
        ):
            yield app, connection.default_channel.client
    except (CeleryError, OperationalError, RedisError, OSError) as error:
        end(UNAVAILABLE, redis_failure(failure, error.__cause__ or error, settings))


@contextmanager
def opened_queue(failure: str) -> Iterator[Redis]:
    """Connect to the queue's Redis alone; exit as :func:`connected` does.

    Args:
        failure: What failed then, for the sentence.
    """
    settings = read_settings(Settings)
    try:
        with connect(settings.broker, client_name=CLIENT_NAME) as redis:
            yield redis
    except (RedisError, OSError) as error:
        end(UNAVAILABLE, redis_failure(failure, error, settings))


@contextmanager
def opened_storage(failure: str, *needed: Needed) -> Iterator[PostgresStorage]:
    """Open PostgreSQL alone; exit as :func:`connected` does.

    Args:
        failure: What failed then, for the sentence.
        *needed: The privileges that the command needs.
    """
    settings = read_settings(DatabaseSettings)
    with (
        _storage_errors(failure, settings, *needed),
        closing(PostgresStorage(settings.database_url)) as storage,
    ):
        yield storage


def redis_failure(failure: str, error: BaseException, settings: Settings) -> str:
    """Describe an error of Redis: a permission that the user lacks, or an outage.

    Args:
        failure: What failed, for the beginning of the sentence.
        error: The error.
        settings: The addresses of the Redis servers, which have the user.

    Returns:
        One sentence, which says what to do.
    """
    reason = str(error)
    if not isinstance(error, NoPermissionError) and not reason.startswith(_IN_SCRIPT):
        return _sentence(failure, reason, _CHECK.format("Redis"))
    users = {one.username or "default" for one in (settings.broker, settings.results)}
    # Redis names the user with a command, but not with a key. The rest is the script's digest.
    denied = reason.removeprefix(_IN_SCRIPT[0]).partition(" script: ")[0]
    who = " or ".join(sorted(users))
    return _sentence(failure, f"Redis denies the user {who} a command or a key, {denied}", _PERMIT)


def storage_failure(
    failure: str, error: StorageError, settings: DatabaseSettings, *needed: Needed
) -> str:
    """Describe an error of PostgreSQL: privileges that the role lacks, a lock, or an outage.

    Args:
        failure: What failed, for the beginning of the sentence.
        error: The error.
        settings: The address of PostgreSQL.
        *needed: The privileges that the command needs.

    Returns:
        One sentence, which says what to do.
    """
    if denial := explain_denial(error, settings.database_url, *needed):
        return _sentence(failure, denial)
    return _sentence(failure, str(error), error.remedy or _CHECK.format("PostgreSQL"))


@contextmanager
def _storage_errors(failure: str, settings: DatabaseSettings, *needed: Needed) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        end(UNAVAILABLE, storage_failure(failure, error, settings, *needed))


def _sentence(failure: str, reason: str, *remedy: str) -> str:
    what = reason.rstrip(".").replace(". ", ": ")  # redis-py's are two sentences
    return one_line(f"{'; '.join([f'{failure}: {what}', *remedy])}.")
