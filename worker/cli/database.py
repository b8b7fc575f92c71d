"""interview-access migrate, prune, erase, explain and lost-jobs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Iterator
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
from storage.schema import migrate as migrate_schema
from tasks.erasure import erase_jobs, erase_requests, find_unfinished_requests
from tasks.retention import SHORTEST_RETENTION
from tasks.retention import prune as prune_jobs
from worker.app import create_app
from worker.broker.dead_letters import DeadLetterLimits, DeadLetters
from worker.cli.environment import read_settings
from worker.cli.terminal import FAILED, UNAVAILABLE, end, not_empty, one_line
from worker.operations.lost_jobs import LostJob, LostJobs
from worker.operations.waiting import WaitingJobs
from worker.services.erasure import (
    announced_jobs_naming,
    dead_letters_naming,
    delete_announcements,
    delete_results,
    unfinished_jobs_naming,
)
from worker.services.outbox_relay import message_of
from worker.settings import DatabaseSettings, Settings

_ANY_BYTES = 2**53
_BUSY_SECONDS = 1.0  # between two attempts while a worker prunes
_MESSAGES = 100_000  # unfinished ones that are read
_LISTED = 10
_FORGOTTEN = 500  # jobs in one command of Redis
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
@click.option("--dry-run", is_flag=True, help="Change nothing; report what would be done.")
def migrate(*, dry_run: bool) -> None:
    """Migrate the database's tables to the newest revision, also while they are in use.

    Creates missing tables, and adopts those of the platform's Django service. Removes duplicate
    grants, except the one with the lowest ID: run --dry-run first, which reports their number.

    The first line says whether running workers may stay. On the newer schema of a later release,
    nothing is done.
    """
    settings = read_settings(DatabaseSettings)
    try:
        migrate_schema(settings.database_url, dry_run=dry_run, report=click.echo)
    except StorageError as error:
        end(FAILED, str(error))


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


@click.command()
@click.option(
    "--user",
    "user_id",
    required=True,
    metavar="ID",
    callback=not_empty,
    help="Whose data is erased.",
)
@click.option("--dry-run", is_flag=True, help="Change nothing; report what would be erased.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def erase(*, user_id: str, dry_run: bool, yes: bool) -> None:
    """Erase one person: the user ID is removed from the ledger, results and outbox.

    Dead letters that name the user are dropped. Outcomes and counts stay. Grants and attempts
    belong to the platform, which deletes them itself.

    Delayed messages of jobs that were cancelled are removed. The exit status is 1, and nothing else
    is changed, while another message names the user: wait for its job, or cancel it, and run the
    command again.
    """
    with _servers() as (storage, redis):
        app = create_app(read_settings(Settings))
        waiting = {*unfinished_jobs_naming(redis, user_id, at_most=_MESSAGES)}
        finished = {job_id for job_id in waiting if storage.get_finished_job(job_id)}
        _refuse({*find_unfinished_requests(storage, user_id)} | waiting - finished)
        if not dry_run and not yes:
            click.confirm(f"Erase the user {one_line(user_id)} for good?", abort=True, err=True)
        if finished and not dry_run:
            WaitingJobs(app, redis, message_of).discard_delayed(finished)
            _refuse({*unfinished_jobs_naming(redis, user_id, at_most=_MESSAGES)})
        jobs: set[str] = set()
        results = 0
        backend = app.backend
        for page in erase_jobs(storage, user_id, dry_run=dry_run):
            jobs |= {*page.job_ids}
            if not dry_run:
                results += delete_results(backend, page.job_ids, user_id)
                delete_announcements(redis, page.job_ids)
        requests = erase_requests(storage, user_id, dry_run=dry_run)
        letters = [*dead_letters_naming(redis, user_id)]
        lettered = {one.job_id for one in letters if one.job_id} - jobs
        announced = announced_jobs_naming(redis, user_id, lettered) - jobs
        if not dry_run:
            results += delete_results(backend, lettered, user_id)
            delete_announcements(redis, announced)
            DeadLetters(redis).drop(letters)
    done = "would be erased" if dry_run else "erased"
    counts = {
        "jobs": len(jobs),
        "requests": requests,
        "dead letters": len(letters),
        "other announcements": len(announced),
    }
    for name, count in (counts if dry_run else counts | {"results": results}).items():
        click.echo(f"{name:<24} {count:>12,} {done}")


def _refuse(job_ids: Collection[str]) -> None:
    """Exit if there are unfinished jobs that name a user."""
    if job_ids:
        listed = ", ".join(one_line(job_id, 255) for job_id in sorted(job_ids)[:_LISTED])
        end(
            FAILED,
            f"Jobs whose messages name the user: {len(job_ids):,} ({listed}); wait for them, or "
            "cancel them with `interview-access cancel`, and run the command again.",
        )


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each job.")
@click.option("--forget", is_flag=True, help="Delete their results and announcements in Redis.")
@click.option("--yes", is_flag=True, help="Do not ask before they are deleted.")
def lost_jobs(*, as_json: bool, forget: bool, yes: bool) -> None:
    """List jobs that succeeded, but that the ledger does not have.

    PostgreSQL loses jobs and their grants when it is restored from an older backup. Until their
    results expire, Redis has these. Producers read the former results, until --forget deletes them:
    then the outbox sends its jobs again, and producers send theirs again under the same job IDs.
    """
    with _servers() as (storage, redis):
        jobs = LostJobs(storage, create_app(read_settings(Settings)).backend, redis)
        found = []
        for job in jobs:
            found.append(job.job_id)
            click.echo(_as_json(job) if as_json else _line(job))
        if forget and found:
            if not yes:
                click.confirm(f"Forget {len(found):,} lost jobs?", abort=True, err=True)
            for start in range(0, len(found), _FORGOTTEN):
                jobs.forget(found[start : start + _FORGOTTEN])
    counted = "1 lost job" if len(found) == 1 else f"{len(found):,} lost jobs"
    click.echo(f"{counted}{' forgotten' if forget else ''}.", err=True)


def _as_json(job: LostJob) -> str:
    return json.dumps(job._asdict(), default=datetime.isoformat)


def _line(job: LostJob) -> str:
    sent = f"sent {job.sent_at:%F %T}Z" if job.sent_at else "not announced"
    counted = job.result.get("created_access_count", job.result.get("interview_attempt_id"))
    return one_line(f"{job.job_id}  {job.task or '-'}  {sent}  {counted}")


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
