"""interview-access migrate, prune, erase, explain and lost-jobs."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import click
from interview_access.contracts import ORIGIN_LENGTHS, describe
from interview_access.contracts.identifiers import USER_ID_RULE, is_user_id

from storage.dtos import PruneCountsDTO
from storage.errors import StorageError
from storage.schema import TO_ERASE, TO_EXPLAIN_GRANTS, TO_PRUNE, TO_READ_JOBS
from storage.schema import migrate as migrate_schema
from tasks.attribution import GrantExplanation
from tasks.attribution import explain as explain_grant
from tasks.erasure import erase_jobs, erase_requests, find_unfinished_requests
from tasks.retention import SHORTEST_RETENTION
from tasks.retention import prune as prune_jobs
from worker.app import create_app
from worker.broker.dead_letters import DeadLetterLimits, DeadLetters
from worker.cli.environment import opened_queue, opened_storage, read_settings
from worker.cli.terminal import (
    FAILED,
    SPELLINGS,
    counted,
    end,
    one_line,
    print_fields,
    read_interview_id,
    read_user_id,
)
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

_CANNOT_PRUNE = "Not everything is pruned"
_CANNOT_ERASE = "Not everything is erased"
_CANNOT_EXPLAIN = "The grant cannot be read"
_CANNOT_READ = "The lost jobs cannot be read"

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
    with (
        opened_queue(_CANNOT_PRUNE) as redis,
        opened_storage(_CANNOT_PRUNE, TO_READ_JOBS, TO_PRUNE) as storage,
    ):
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


def _person(_: object, __: object, given: str) -> str:
    """Accept a user ID, and the longer name of an actor, which is erased as well."""
    longest = ORIGIN_LENGTHS["actor"]
    if not is_user_id(given) and not (given.isprintable() and 1 <= len(given) <= longest):
        raise click.BadParameter(
            f"got {describe(given)}, expected {USER_ID_RULE}, or the name of an actor, 1 to "
            f"{longest} printable characters."
        )
    return given


@click.command()
@click.option(
    "--user",
    "user_id",
    required=True,
    metavar="ID",
    callback=_person,
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
    with (
        opened_queue(_CANNOT_ERASE) as redis,
        opened_storage(_CANNOT_ERASE, TO_READ_JOBS, TO_ERASE) as storage,
    ):
        app = create_app(read_settings(Settings))
        waiting = {*unfinished_jobs_naming(redis, user_id, at_most=_MESSAGES)}
        finished = {job_id for job_id in waiting if storage.get_finished_job(job_id)}
        _refuse({*find_unfinished_requests(storage, user_id)} | waiting - finished)
        if ids := [one.id for one in dead_letters_naming(redis, user_id)]:
            click.echo(
                f"Dead letters that name the user and are dropped: {_listed(ids)}; requeue what is "
                "still wanted before.",
                err=True,
            )
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
            results += delete_results(backend, lettered | announced, user_id)
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
        end(
            FAILED,
            f"Jobs whose messages name the user: {_listed(job_ids)}; wait for them, or cancel them "
            "with `interview-access cancel`, and run the command again.",
        )


def _listed(ids: Collection[str]) -> str:
    """Return the number of IDs, and the first of them."""
    return f"{len(ids):,} ({', '.join(one_line(one, 255) for one in sorted(ids)[:_LISTED])})"


@click.command()
@click.option(
    "--user", "user_id", required=True, metavar="ID", callback=read_user_id, help="Whose access."
)
@click.option(
    "--interview",
    "interview_id",
    required=True,
    metavar="UUID",
    callback=read_interview_id,
    help=f"The interview: {SPELLINGS}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def explain(*, user_id: str, interview_id: str, as_json: bool) -> None:
    """Report whether a user has access to an interview, and which job created the grant.

    It is the job whose number of created grants includes this one. The grant keeps the job's ID
    when the job is pruned. Grants that the platform itself created, and those from before migration
    0011, name no job. One that was deleted and created again names the later job.

    The exit status is 0 if the user has access, also if no job is named, 1 if the user has none,
    and 3 if PostgreSQL is unavailable.
    """
    with opened_storage(_CANNOT_EXPLAIN, TO_EXPLAIN_GRANTS) as storage:
        found = explain_grant(storage, user_id, interview_id)
    fields = {
        "user_id": user_id,
        "interview_id": interview_id,
        "interview_exists": found.origin.is_interview,
        "has_access": found.origin.is_granted,
    }
    job = found.job and found.job.model_dump(
        mode="json", exclude_none=True, exclude={"user_id", "result", "created_by_user"}
    )
    if as_json:
        click.echo(json.dumps({**fields, "job": job, "job_is_pruned": found.is_pruned}))
    else:
        print_fields({**fields, **(job or {})})
        if note := _note(found):
            click.echo(note, err=True)
    sys.exit(0 if found.origin.is_granted else FAILED)


def _note(found: GrantExplanation) -> str | None:
    """Return a sentence about what the fields do not say."""
    if not found.origin.is_interview:
        return "No interview has this ID."
    if not found.origin.is_granted:
        return "The user has no access to the interview."
    if found.job is None:
        return "The grant names no job: the platform created it, or a job before migration 0011."
    if found.is_pruned:
        return "The job was pruned: what remains is its state and its number of created grants."
    if found.job.state == "unknown":
        return "The job created the grant, but the ledger has neither its row nor a tombstone."
    return None


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
    with opened_queue(_CANNOT_READ) as redis, opened_storage(_CANNOT_READ, TO_READ_JOBS) as storage:
        jobs = LostJobs(storage, create_app(read_settings(Settings)).backend, redis)
        found = []
        for job in jobs:
            found.append(job.job_id)
            click.echo(_as_json(job) if as_json else _line(job))
        if forget and found:
            if not yes:
                click.confirm(f"Forget {counted(len(found), 'lost job')}?", abort=True, err=True)
            for start in range(0, len(found), _FORGOTTEN):
                jobs.forget(found[start : start + _FORGOTTEN])
    click.echo(f"{counted(len(found), 'lost job')}{' forgotten' if forget else ''}.", err=True)


def _as_json(job: LostJob) -> str:
    return json.dumps(job._asdict(), default=datetime.isoformat)


def _line(job: LostJob) -> str:
    sent = f"sent {job.sent_at:%F %T}Z" if job.sent_at else "not announced"
    count = job.result.get("created_access_count", job.result.get("interview_attempt_id"))
    return one_line(f"{job.job_id}  {job.task or '-'}  {sent}  {count}")


def _report(counts: PruneCountsDTO, dead_letters: int, done: str) -> None:
    for name, count in asdict(counts).items():
        click.echo(f"{_TABLES[name]:<24} {count:>12,} {done}")
    click.echo(f"{'dead letters':<24} {dead_letters:>12,} {done}")
