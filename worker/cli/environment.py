"""Settings of the subcommands, and the servers that they work with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import NoReturn, TypeVar

from celery.exceptions import CeleryError
from interview_access.connections import CLIENT_NAME, connect
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import Needed, explain_denial
from worker.app import WorkerApp, create_app
from worker.cli.terminal import PERMIT, UNAVAILABLE, end, one_line
from worker.settings import DatabaseSettings, Settings, SettingsError

S = TypeVar("S", bound=DatabaseSettings)

_CHECK_SERVERS = "check that Redis and PostgreSQL can be reached, and run the command again"
_CHECK_REDIS = "check that Redis can be reached, and run the command again"


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
            _storage_errors(failure, needed, settings),
            app.connection_for_write() as connection,
        ):
            yield app, connection.default_channel.client
    except (CeleryError, OperationalError, RedisError, OSError) as error:
        _end_without_redis(failure, error.__cause__ or error, _CHECK_SERVERS)


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
        _end_without_redis(failure, error, _CHECK_REDIS)


@contextmanager
def opened_storage(failure: str, needed: Needed) -> Iterator[PostgresStorage]:
    """Open PostgreSQL alone; exit as :func:`connected` does.

    Args:
        failure: What failed then, for the sentence.
        needed: The privileges that the command needs.
    """
    settings = read_settings(DatabaseSettings)
    with (
        _storage_errors(failure, needed, settings),
        closing(PostgresStorage(settings.database_url)) as storage,
    ):
        yield storage


@contextmanager
def _storage_errors(failure: str, needed: Needed, settings: DatabaseSettings) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        denial = explain_denial(error, settings.database_url, needed)
        _end_unavailable(failure, denial or error, "" if denial else _CHECK_SERVERS)


def _end_without_redis(failure: str, error: BaseException, remedy: str) -> NoReturn:
    is_denied = isinstance(error, NoPermissionError)
    _end_unavailable(failure, error, PERMIT if is_denied else remedy)


def _end_unavailable(failure: str, reason: object, remedy: str) -> NoReturn:
    what = str(reason).rstrip(".").replace(". ", ": ")  # redis-py's are two sentences
    sentence = "; ".join(filter(None, [f"{failure}: {what}", remedy]))
    end(UNAVAILABLE, one_line(f"{sentence}."))
