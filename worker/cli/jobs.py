"""interview-access status, jobs, cancel and purge."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from typing import NoReturn

import click
from celery.exceptions import CeleryError
from interview_access.contracts import (
    FINAL_STATES,
    JOB_ID_RULE,
    JobStatus,
    describe,
    is_job_id,
)
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from storage.dtos import FinishedJobDTO, FinishedJobFilterDTO
from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import NEEDED, TO_CANCEL_JOBS, TO_READ_JOBS, Needed, explain_denial
from tasks import ledger
from tasks.audit import read_time
from worker.app import WorkerApp, create_app
from worker.cli.environment import read_settings
from worker.cli.terminal import (
    FAILED,
    PERMIT,
    UNAVAILABLE,
    end,
    one_line,
    print_fields,
    read_age,
)
from worker.operations.inspection import inspect
from worker.operations.waiting import JobFilter, SelectedJob, WaitingJobs
from worker.services.job_status import JobStatusService
from worker.services.outbox_relay import message_of
from worker.settings import DatabaseSettings, Settings

_MOST_JOBS = 10_000
_CANNOT_LIST = "The finished jobs cannot be read"
_CANNOT_READ = "The job's state cannot be read"
_CANNOT_CANCEL = "Not all jobs are cancelled"
_CHECK_SERVERS = "check that Redis and PostgreSQL can be reached, and run the command again"


def _job_id(_: object, __: object, job_id: str | None) -> str | None:
    if job_id is not None and not is_job_id(job_id):
        raise click.BadParameter(f"got {describe(job_id)}, expected {JOB_ID_RULE}.")
    return job_id


@click.command()
@click.argument("job_id", callback=_job_id)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(job_id: str, *, as_json: bool) -> None:
    """Report a job's state and result, from the ledger, the results and its announcement.

    The exit status is 0 in every state, and 3 if Redis or PostgreSQL is unavailable.
    """
    with _connected(_CANNOT_READ, TO_READ_JOBS) as (app, redis):
        known = JobStatusService(app.storage, app.backend).status(redis, job_id)
    _print_status(known, as_json=as_json)


class _Moment(click.ParamType[datetime]):
    name = "moment"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        text = str(value)
        age = read_age(text)
        moment = read_time(text) if age is None else datetime.now(UTC) - age
        if moment is None:
            raise click.BadParameter(
                f"got {one_line(text)!r}, expected an age such as 30min, 12h or 7d, or a time in "
                "ISO 8601 such as 2030-01-31T12:00:00Z.",
                ctx,
                param,
            )
        return moment


def _storable(_: object, __: object, given: str | None) -> str | None:
    with suppress(UnicodeEncodeError):
        (given or "").encode()
        return given
    raise click.BadParameter(f"got {describe(given)}, expected text in UTF-8.")


@click.command()
@click.option("--user", metavar="ID", callback=_storable, help="Jobs for this user alone.")
@click.option("--actor", metavar="NAME", callback=_storable, help="Jobs requested by this actor.")
@click.option("--state", type=click.Choice(sorted(FINAL_STATES)), help="Jobs in this state.")
@click.option(
    "--since",
    type=_Moment(),
    metavar="AGE|TIME",
    help="Jobs that finished within an age such as 12h or 7d, or since a time in ISO 8601 (UTC if "
    "it has no offset).",
)
@click.option("--until", type=_Moment(), metavar="AGE|TIME", help="Jobs that finished before.")
@click.option(
    "--limit",
    type=click.IntRange(1, _MOST_JOBS),
    default=100,
    show_default=True,
    help="Number of jobs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each job.")
def jobs(
    *,
    user: str | None,
    actor: str | None,
    state: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """List finished jobs, newest first: who requested them, when, and which worker executed them.

    Options combine. Only jobs in the ledger are listed: neither unfinished ones, which `queue`
    counts, nor pruned ones. A cohort's job is for no user alone.

    Only PostgreSQL is used. The exit status is 3 if it is unavailable.
    """
    wanted = FinishedJobFilterDTO(user, actor, state, since, until)
    settings = read_settings(DatabaseSettings)
    with (
        _storage_errors(_CANNOT_LIST, TO_READ_JOBS, settings),
        closing(PostgresStorage(settings.database_url)) as storage,
    ):
        found = storage.list_finished_jobs(wanted, limit)
    for one in found:
        known = ledger.status_of(one).model_dump(mode="json", exclude_none=True)
        click.echo(json.dumps(known) if as_json else _line(one))
    if not found:
        click.echo("No finished job is selected.", err=True)
    elif len(found) == limit:
        click.echo(f"The newest {limit:,} are listed; --limit and --until list others.", err=True)


def _line(finished: FinishedJobDTO) -> str:
    job, outcome, audit = finished.job, finished.outcome, finished.job.audit
    known = {
        "user": job.user_id,
        "created": outcome.figures and outcome.figures.created,
        "error": outcome.error and outcome.error["type"],
        "attempts": audit.attempts,
        "worker": audit.worker,
        "actor": audit.actor,
        "reason": audit.reason,
    }
    at = f"{finished.finished_at:%F %T}Z" if finished.finished_at else "-"
    fields = (f"{name}={value}" for name, value in known.items() if value is not None)
    return one_line("  ".join((at, f"{outcome.state:<9}", job.job_id, job.task, *fields)))


@click.command()
@click.argument("job_id", required=False, callback=_job_id)
@click.option("--user", metavar="ID", help="Cancel the waiting jobs for this user alone.")
@click.option("--task", metavar="NAME", help="Cancel the waiting jobs of this task.")
@click.option("--queued", is_flag=True, help="Cancel all waiting jobs.")
@click.option("--dry-run", is_flag=True, help="Print the waiting jobs that would be cancelled.")
@click.option("--yes", is_flag=True, help="Do not ask before waiting jobs are cancelled.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each job.")
def cancel(
    job_id: str | None,
    *,
    user: str | None,
    task: str | None,
    queued: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Cancel a job: it does not start, or stops after its current chunk. Report its state.

    An ID that is not known yet can be cancelled: a job that is sent under it later does not start.

    Instead of an ID, --user and --task select waiting and delayed jobs and unsent outbox requests,
    and --queued selects all of them. A job for several users is selected by its task only. The
    selected jobs are cancelled at once and printed; their messages stay, and have no effect. Jobs
    that workers have claimed are not selected.

    The exit status is 0 if the job is cancelled or its cancellation is requested, 1 if it had
    finished, and 3 if Redis or PostgreSQL is unavailable: cancel it again then.
    """
    has_filter = queued or user is not None or task is not None
    if (job_id is not None) == has_filter or (queued and (user is not None or task is not None)):
        raise click.UsageError("Give either a job ID, or --user and --task, or --queued.")
    if job_id is None:
        _cancel_waiting(JobFilter(user, task), dry_run=dry_run, yes=yes, as_json=as_json)
        return
    if dry_run or yes:
        raise click.UsageError("--dry-run and --yes belong to --user, --task and --queued.")
    with _connected(_CANNOT_READ, TO_CANCEL_JOBS) as (app, redis):
        known = JobStatusService(app.storage, app.backend).cancel(redis, job_id)
    _print_status(known, as_json=as_json)
    if known.state == "unknown":
        click.echo(
            "No job with this ID is known. The cancellation is kept: a job that is delivered under "
            "this ID does not start.",
            err=True,
        )
    sys.exit(0 if known.cancel_requested or known.state == "cancelled" else FAILED)


def _cancel_waiting(wanted: JobFilter, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    with _connected(_CANNOT_CANCEL, NEEDED) as (app, redis):
        jobs = WaitingJobs(app, redis, message_of)
        if dry_run:
            selected = _print_each(jobs.select(wanted), as_json=as_json)
            click.echo(f"{_counted(selected)} would be cancelled.", err=True)
            return
        if not yes:
            number = sum(1 for _ in jobs.select(wanted))
            if number == 0:
                click.echo("No waiting job is selected.", err=True)
                return
            click.confirm(f"Cancel {_counted(number)}?", abort=True, err=True)
        settled = _print_each(_noting_others(jobs.cancel(wanted)), as_json=as_json)
    click.echo(f"{_counted(settled)} cancelled.", err=True)


@click.command()
@click.option("--outbox", is_flag=True, help="Also cancel and delete unsent outbox requests.")
@click.option("--dry-run", is_flag=True, help="Say what would be purged, and purge nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(*, outbox: bool, dry_run: bool, yes: bool) -> None:
    """Cancel all waiting and delayed jobs and remove their messages, after a confirmation.

    Each purged job is cancelled in the ledger, and its producer polls that result. A message
    without a readable job ID becomes a dead letter. Jobs that workers have claimed run on, and jobs
    that are sent meanwhile stay. Pause the queue before, so that workers claim nothing meanwhile.

    The exit status is 3 if Redis or PostgreSQL is unavailable: purge again then.
    """
    with _connected(_CANNOT_CANCEL, NEEDED) as (app, redis):
        snapshot = inspect(redis)
        unsent = app.storage().count_requests().unsent if outbox else 0
        lanes = ", ".join(f"{one.name} {one.waiting:,}" for one in snapshot.lanes if one.waiting)
        waiting = f"{snapshot.waiting:,} waiting" + (f" ({lanes})" if lanes else "")
        found = f"{waiting} and {snapshot.delayed:,} delayed jobs"
        found += f" and {unsent:,} unsent outbox requests" if outbox else ""
        rest = f"{snapshot.claimed:,} claimed jobs stay"
        if dry_run:
            click.echo(f"{found} would be purged; {rest}.")
            return
        if not yes:
            click.confirm(f"Purge {found}? ({rest})", abort=True, err=True)
        jobs = WaitingJobs(app, redis, message_of)
        purged, unreadable = 0, 0
        for job in _noting_others(jobs.purge(with_outbox=outbox)):
            purged += bool(job.job_id)
            unreadable += not job.job_id
    click.echo(f"{_counted(purged)} purged.")
    if unreadable:
        click.echo(
            f"Dead letters now, because their job IDs cannot be read: {unreadable:,}.", err=True
        )


def _noting_others(jobs: Iterator[SelectedJob]) -> Iterator[SelectedJob]:
    """Pass on the jobs that are settled, and print a note for each other one."""
    for job in jobs:
        if job.is_settled:
            yield job
        else:
            name = one_line(job.job_id, 255)
            click.echo(f"{name}: not cancelled, a worker is executing it.", err=True)


def _print_each(jobs: Iterator[SelectedJob], *, as_json: bool) -> int:
    """Print a line for each job. Returns their number."""
    number = 0
    for job in jobs:
        number += 1
        if as_json:
            click.echo(json.dumps({"job_id": job.job_id, "task": job.task}))
        else:
            click.echo(f"{one_line(job.job_id, 255) or 'unreadable'}  {one_line(job.task, 255)}")
    return number


def _counted(number: int) -> str:
    return "1 job" if number == 1 else f"{number:,} jobs"


@contextmanager
def _connected(failure: str, needed: Needed) -> Iterator[tuple[WorkerApp, Redis]]:
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
        cause = error.__cause__ or error
        is_denied = isinstance(cause, NoPermissionError)
        _end_unavailable(failure, cause, PERMIT if is_denied else _CHECK_SERVERS)


@contextmanager
def _storage_errors(failure: str, needed: Needed, settings: DatabaseSettings) -> Iterator[None]:
    """Exit with one sentence if PostgreSQL is unavailable or denies access; see _connected."""
    try:
        yield
    except StorageError as error:
        denial = explain_denial(error, settings.database_url, needed)
        _end_unavailable(failure, denial or error, "" if denial else _CHECK_SERVERS)


def _end_unavailable(failure: str, reason: object, remedy: str) -> NoReturn:
    what = str(reason).rstrip(".").replace(". ", ": ")  # redis-py's are two sentences
    sentence = "; ".join(filter(None, [f"{failure}: {what}", remedy]))
    end(UNAVAILABLE, one_line(f"{sentence}."))


def _print_status(known: JobStatus, *, as_json: bool) -> None:
    fields = known.model_dump(mode="json", exclude_none=True)
    if as_json:
        click.echo(json.dumps(fields))
        return
    if known.error:
        fields["error"] = f"{known.error.type}: {known.error.sentence}"
    if known.progress:
        fields["progress"] = f"{known.progress.done:,} of {known.progress.total:,}"
    if known.created_by_user:
        fields["created_by_user"] = list(known.created_by_user)
    print_fields(fields)
