"""interview-access prune and erase."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click
from interview_access.connections import CLIENT_NAME, connect
from redis import Redis
from redis.exceptions import RedisError

from storage.dtos import PruneCountsDTO
from storage.errors import StorageError
from storage.postgres import PostgresStorage
from tasks.retention import SHORTEST_RETENTION
from tasks.retention import prune as prune_jobs
from worker.broker.dead_letters import DeadLetterLimits, DeadLetters
from worker.cli.environment import read_settings
from worker.cli.terminal import UNAVAILABLE, end, one_line
from worker.settings import Settings

_ANY_BYTES = 2**53
_BUSY_SECONDS = 1.0  # between two attempts while a worker prunes
_TABLES = {
    "jobs": "ledger rows",
    "rejections": "lists of rejected IDs",
    "cohorts": "counts of cohorts",
    "cancellations": "cancellations",
    "requests": "answered outbox requests",
}


class _Age(click.ParamType[timedelta]):
    name = "age"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> timedelta:
        given = re.fullmatch(r"(\d{1,5})([dw])", str(value))
        days = int(given[1]) * {"d": 1, "w": 7}[given[2]] if given else 0
        if days < SHORTEST_RETENTION.days:
            raise click.BadParameter(
                f"got {one_line(value)!r}, expected days or weeks of one day or more, such as 90d "
                "or 12w.",
                ctx,
                param,
            )
        return timedelta(days=days)


@click.command()
@click.option("--older-than", type=_Age(), required=True, metavar="AGE", help="Such as 90d or 12w.")
@click.option("--dry-run", is_flag=True, help="Delete nothing; report what would be deleted.")
def prune(*, older_than: timedelta, dry_run: bool) -> None:
    """Delete finished jobs and dead letters of an age, in small transactions beside the workers.

    A tombstone is kept of each job, so that a late copy of its message gets its outcome and is not
    executed again. Interrupt the command at any time: what it has deleted stays deleted, and the
    next run continues. The grants are not touched.
    """
    with _servers() as (storage, redis):
        letters = DeadLetters(redis)
        if dry_run:
            with storage.transaction() as transaction:
                counts = transaction.count_prunable(older_than)
            before = datetime.now(UTC) - older_than
            _report(counts, sum(one.time < before for one in letters), "would be deleted")
            return
        counts, dropped = PruneCountsDTO(), 0
        try:
            for batch in prune_jobs(storage, older_than):
                counts += batch.counts or PruneCountsDTO()
                # As long as it took, so that jobs have half of the time for themselves.
                time.sleep(batch.seconds if batch.counts else _BUSY_SECONDS)
            limits, has_more = DeadLetterLimits(_ANY_BYTES, older_than.days), True
            while has_more:
                page = letters.prune(limits)
                dropped, has_more = dropped + page.aged, page.has_more
        finally:
            _report(counts, dropped, "deleted")


def _report(counts: PruneCountsDTO, dead_letters: int, done: str) -> None:
    for name, count in asdict(counts).items():
        click.echo(f"{_TABLES[name]:<24} {count:>12,} {done}")
    click.echo(f"{'dead letters':<24} {dead_letters:>12,} {done}")


@contextmanager
def _servers() -> Iterator[tuple[PostgresStorage, Redis]]:
    settings = read_settings(Settings)
    try:
        with (
            closing(PostgresStorage(settings.database_url)) as storage,
            connect(settings.broker, client_name=CLIENT_NAME) as redis,
        ):
            yield storage, redis
    except (StorageError, RedisError, OSError) as error:
        end(UNAVAILABLE, one_line(f"The command cannot be completed, run it again: {error}"))
