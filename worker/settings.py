"""Typed settings from the environment, checked before anything starts."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from interview_access.contracts import DEFAULT_MAX_INTERVIEW_IDS
from interview_access.redis_address import FORMS, RedisAddress, masked
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from storage.database_url import FORM, parse_database_url


def _redis(url: str) -> str:
    RedisAddress.parse(url)
    return url


def _names(listed: object) -> object:
    """Split a list of names that are separated by commas."""
    if not isinstance(listed, str):
        return listed
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise ValueError("at least one name, or an empty value")
    return names


class ListenAddress(NamedTuple):
    """An address to listen on.

    Attributes:
        host: An IPv4 or IPv6 address, or a host name.
        port: The port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: object) -> Self:
        """Parse ``HOST:PORT`` or ``[IPV6]:PORT``.

        Raises:
            ValueError: if it has another form.
        """
        form = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", str(text))
        if not form or not 0 < int(form[3]) < 2**16:
            raise ValueError("HOST:PORT, such as 127.0.0.1:9808 or [::1]:9808")
        return cls(form[1] or form[2], int(form[3]))


class SettingsError(Exception):
    """Environment variables are missing or invalid. The text names each with its value."""


class DatabaseSettings(BaseModel):
    """The database's settings: all that a migration needs.

    Attributes:
        database_url: ``DATABASE_URL`` in the form of SQLAlchemy with psycopg.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    database_url: Annotated[str, AfterValidator(parse_database_url)] = Field(repr=False)

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment of this process. An empty variable counts as not set.

        Raises:
            SettingsError: if a variable is missing or invalid; names it, its value (passwords
                masked) and what was expected.
        """
        variables = {name: name.upper() for name in cls.model_fields}
        values = {name: os.environ[key] for name, key in variables.items() if os.environ.get(key)}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("\n".join(map(_sentence, error.errors()))) from None


class Settings(DatabaseSettings):
    """A worker's settings. The variable of each is its name in capitals.

    Attributes:
        celery_broker_url: The Redis of the queue.
        celery_result_backend: The Redis of the results; by default the broker's.
        redis_sentinel_password: The password of the Sentinels, if they have one.
        grant_chunk_size: Grants inserted by one statement.
        grant_max_interview_ids: Grants that one job may request, duplicates included.
        grant_batch_size: Jobs of one claim at most; 1 disables batches.
        grant_retry_limit: Retries of a job during an outage.
        grant_retry_max_delay: Seconds between two attempts at most. They grow from 1 by doubling,
            with full jitter, which makes about ten minutes in all.
        grant_lease_seconds: Lease TTL. After a worker dies its jobs are redelivered about
            two TTLs later.
        grant_attempt_limit: Attempts of a job that ends its pool process or worker each time.
        grant_stop_grace: Grace period of a graceful shutdown, in seconds.
        grant_callback_queues: Queues, separated by commas, to which the worker may publish the
            callbacks, chains and chords of a message; None: to any queue.
        grant_retention_days: Days after which a finished job is pruned; None: never.
        grant_dead_letter_days: Days after which a dead letter is dropped; None: never.
        grant_dead_letter_bytes: Memory of all dead letters, beyond which the oldest are dropped.
        metrics_address: Where metrics and health are served over HTTP; None: nowhere.
        health_file: The file that is written for probes of health; None: none.
        log_format: Format of the log lines.
        result_retention: Seconds for which a job's result is kept in Redis.
    """

    celery_broker_url: Annotated[str, AfterValidator(_redis)] = Field(repr=False)
    celery_result_backend: Annotated[str, AfterValidator(_redis)] | None = Field(
        default=None, repr=False
    )
    redis_sentinel_password: str | None = Field(default=None, repr=False)
    grant_chunk_size: int = Field(default=10_000, ge=1, le=1_000_000)
    grant_max_interview_ids: int = Field(default=DEFAULT_MAX_INTERVIEW_IDS, ge=1, le=10_000_000)
    grant_batch_size: int = Field(default=100, ge=1, le=1_000)
    grant_retry_limit: int = Field(default=16, ge=0, le=1_000)
    grant_retry_max_delay: int = Field(default=120, ge=1, le=1_800)
    grant_lease_seconds: float = Field(default=8.0, ge=1, le=3_600)
    grant_attempt_limit: int = Field(default=5, ge=1, le=100)
    grant_stop_grace: float = Field(default=25.0, ge=0, le=3_600)
    grant_callback_queues: Annotated[tuple[str, ...] | None, BeforeValidator(_names)] = None
    metrics_address: Annotated[ListenAddress | None, BeforeValidator(ListenAddress.parse)] = None
    health_file: Path | None = None

    grant_retention_days: int | None = Field(default=None, ge=1, le=36_500)
    grant_dead_letter_days: int | None = Field(default=None, ge=1, le=36_500)
    grant_dead_letter_bytes: int = Field(default=256_000_000, ge=1_000_000, le=1_000_000_000_000)
    log_format: Literal["text", "json"] = "text"
    result_retention: int = Field(default=86_400, ge=60, le=31_536_000)

    @model_validator(mode="after")
    def _results_beside_the_queue(self) -> Self:
        self.celery_result_backend = self.celery_result_backend or self.celery_broker_url
        return self

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment; see the base class. Refuse variables that only Celery reads."""
        for name in ("CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
            if os.environ.get(name):
                raise SettingsError(f"{name}: got a value, expected CELERY_BROKER_URL alone")
        return super().from_environment()

    @property
    def broker(self) -> RedisAddress:
        """The Redis of the queue."""
        return self._address(self.celery_broker_url)

    @property
    def results(self) -> RedisAddress:
        """The Redis of the results."""
        return self._address(self.celery_result_backend or self.celery_broker_url)

    @property
    def retention(self) -> timedelta | None:
        """The time after which a finished job is pruned."""
        return timedelta(days=self.grant_retention_days) if self.grant_retention_days else None

    def _address(self, url: str) -> RedisAddress:
        return RedisAddress.parse(url, sentinel_password=self.redis_sentinel_password)


_URLS = {"DATABASE_URL": FORM, "CELERY_BROKER_URL": FORMS["redis"], "CELERY_RESULT_BACKEND": ""}


def _sentence(problem: Any) -> str:
    name = str(problem["loc"][0]).upper()
    if problem["type"] == "missing":
        return f"{name}: not set, expected {_URLS[name]}"
    expected = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    received = str(problem["input"])
    return (
        f"{name}: got {masked(received.removeprefix('jdbc:')) if name in _URLS else repr(received)}"
        f", expected {expected}"
    )
