"""Typed settings from the environment, checked before anything starts."""

from __future__ import annotations

import os
import re
from typing import Annotated, Self

from interview_access.contracts import DEFAULT_MAX_INTERVIEW_IDS
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator


def masked(url: str) -> str:
    """The URL without its password."""
    # To the last @, for a password in a URL that is no good may hold anything.
    without = re.sub(r":(?!//).*@", ":***@", url, flags=re.DOTALL)
    return re.sub(r"(?<=password=)[^&]*", "***", without)


def _postgresql(url: str) -> str:
    """PostgreSQL's own form of URL, or SQLAlchemy's; the driver is always psycopg."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"postgresql", "postgresql+psycopg"}:
        raise ValueError("postgresql://USER:PASSWORD@HOST:5432/DATABASE")
    return f"postgresql+psycopg://{rest}"


def _redis(url: str) -> str:
    if not re.match(r"(redis|rediss|redis\+socket|sentinel)://", url):
        raise ValueError(
            "redis://:PASSWORD@HOST:6379/0, or rediss://, redis+socket:// or sentinel://"
        )
    return url


class SettingsError(Exception):
    """Settings in the environment are missing or wrong; its text names each, with what came."""


class DatabaseSettings(BaseModel):
    """Where the data is: all that a migration is told.

    Attributes:
        database_url: From ``DATABASE_URL``, as SQLAlchemy with psycopg takes it.
    """

    database_url: Annotated[str, AfterValidator(_postgresql)] = Field(repr=False)

    @classmethod
    def from_environment(cls) -> Self:
        """The settings of this process.

        Raises:
            SettingsError: naming each variable that is missing or wrong, its value (passwords
                masked) and what was expected.
        """
        variables = {name: name.upper() for name in cls.model_fields}
        told = {name: os.environ[key] for name, key in variables.items() if key in os.environ}
        try:
            return cls.model_validate(told)
        except ValidationError as error:
            raise SettingsError("\n".join(map(_told, error.errors()))) from None


class Settings(DatabaseSettings):
    """What a worker is told by its environment; each name there is the field's in capitals.

    Attributes:
        celery_broker_url: Where the queue is.
        celery_result_backend: Where results go; the broker's, unless given.
        grant_chunk_size: Grants inserted by one statement.
        grant_max_interview_ids: Grants that one job may ask for, ids as given.
        grant_batch_size: Small jobs that one child does in one transaction; 1: each by itself.
        grant_retry_limit: Tries after the first while the database is in trouble.
        grant_retry_max_delay: Seconds between two tries at most; they grow from 1 by doubling and
            are drawn at random up to that, which makes about ten minutes in all.
        grant_lease_seconds: For how long a worker has spoken when it renews its lease; a dead one's
            jobs run elsewhere after about two such times.
        grant_attempt_limit: Tries of a job that ends its worker's process each time.
        grant_stop_grace: Seconds for which a worker that is asked to stop lets jobs go on.
    """

    celery_broker_url: Annotated[str, AfterValidator(_redis)] = Field(repr=False)
    celery_result_backend: Annotated[str, AfterValidator(_redis)] | None = Field(
        default=None, repr=False
    )
    grant_chunk_size: int = Field(default=10_000, ge=1, le=1_000_000)
    grant_max_interview_ids: int = Field(default=DEFAULT_MAX_INTERVIEW_IDS, ge=1, le=10_000_000)
    grant_batch_size: int = Field(default=100, ge=1, le=1_000)
    grant_retry_limit: int = Field(default=16, ge=0, le=1_000)
    grant_retry_max_delay: int = Field(default=120, ge=1, le=1_800)
    grant_lease_seconds: float = Field(default=8.0, ge=1, le=3_600)
    grant_attempt_limit: int = Field(default=5, ge=1, le=100)
    grant_stop_grace: float = Field(default=25.0, ge=0, le=3_600)

    @model_validator(mode="after")
    def _results_beside_the_queue(self) -> Self:
        self.celery_result_backend = self.celery_result_backend or self.celery_broker_url
        return self


def _told(problem: object) -> str:
    assert isinstance(problem, dict)  # noqa: S101 - pydantic's ErrorDetails
    name = str(problem["loc"][0]).upper()
    if problem["type"] == "missing":
        wanted = {
            "DATABASE_URL": "postgresql://USER:PASSWORD@HOST:5432/DATABASE",
            "CELERY_BROKER_URL": "redis://:PASSWORD@HOST:6379/0",
        }[name]
        return f"{name}: not set, expected {wanted}"
    expected = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{name}: got {masked(str(problem['input']))!r}, expected {expected}"
