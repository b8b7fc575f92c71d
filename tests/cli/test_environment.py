"""Sentences about errors of Redis and PostgreSQL, which all commands print."""

from __future__ import annotations

import pytest
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from storage.errors import JobBusyError, StorageError
from worker.cli.environment import redis_failure, storage_failure
from worker.settings import Settings

SETTINGS = Settings(
    celery_broker_url="redis://operator:secret@127.0.0.1:1/0",
    database_url="postgresql://nobody@127.0.0.1:1/none",
)
DIGEST = "script: on @user_script:124."


@pytest.mark.parametrize(
    ("error", "denied"),
    [
        (NoPermissionError("No permissions to access a key"), "No permissions to access a key"),
        (
            ResponseError(f"ACL failure in script: No permissions to access a key {DIGEST}"),
            "No permissions to access a key",
        ),
        (
            ResponseError(f"The user executing the script can't run this command {DIGEST}"),
            "The user executing the script can't run this command",
        ),
    ],
    ids=["command", "script", "script of Redis 7.0"],
)
def test_a_denial_of_redis_names_user_and_remedy(error: RedisError, denied: str) -> None:
    """A missing permission is no outage, also within a script."""
    sentence = redis_failure("The queue is missing", error, SETTINGS)
    assert sentence.startswith(
        "The queue is missing: Redis denies the user operator a command or a key, "
        f"{denied}; permit it by ACL SETUSER"
    )
    assert sentence.endswith("or run the command as the user worker of deploy/redis/users.acl.")


def test_users_of_queue_and_results_are_both_named() -> None:
    """If results are in another Redis, either user may be the one that lacks the permission."""
    settings = SETTINGS.model_copy(update={"celery_result_backend": "redis://127.0.0.1:1/1"})
    denied = redis_failure("x", NoPermissionError("No permissions to access a key"), settings)
    assert "denies the user default or operator a command" in denied


@pytest.mark.parametrize(
    "error", [StorageError("canceling statement due to lock timeout", "55P03"), JobBusyError()]
)
def test_a_lock_is_not_an_outage(error: StorageError) -> None:
    """After a wait for a lock the sentence says what holds it, and names no server."""
    assert storage_failure("x", error, SETTINGS) == (
        f"x: {error}; wait until the other transaction that holds the lock has ended, and run the "
        "command again."
    )


def test_a_database_without_tables_is_to_be_migrated() -> None:
    """A missing table has a remedy of its own."""
    error = StorageError('relation "grant_access_job" does not exist', "42P01")
    assert storage_failure("x", error, SETTINGS).endswith("; run `interview-access migrate`.")
