"""Run a worker's start-up checks."""

from __future__ import annotations

import pytest

from worker.settings import Settings
from worker.startup import StartupError
from worker.startup.servers import check_servers

PASSWORD = "s3cret"  # noqa: S105 - of the tests' own servers


def check(
    database_url: str, broker: str, results: str | None = None, sentinel_password: str = ""
) -> None:
    """Run the checks of both servers."""
    settings = Settings(
        database_url=database_url,
        celery_broker_url=broker,
        celery_result_backend=results,
        redis_sentinel_password=sentinel_password,
    )
    check_servers(settings)


def refusal(
    database_url: str, broker: str, results: str | None = None, sentinel_password: str = ""
) -> str:
    """Return the error with which the checks refuse to start."""
    with pytest.raises(StartupError) as refused:
        check(database_url, broker, results, sentinel_password)
    sentence = str(refused.value)
    assert PASSWORD not in sentence
    assert len(sentence.splitlines()) == 1
    return sentence
