"""interview-access status, jobs, cancel and purge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime

import click
from interview_access.contracts import (
    FINAL_STATES,
    JOB_ID_RULE,
    JobStatus,
    describe,
    is_job_id,
)

from storage.dtos import FinishedJobDTO, FinishedJobFilterDTO
from storage.schema import NEEDED, TO_CANCEL_JOBS, TO_LIST_JOBS, TO_READ_GRANTS, TO_READ_JOBS
from tasks.outcomes import status_of
from worker.cli.environment import connected, opened_storage
from worker.cli.terminal import (
    FAILED,
    SPELLINGS,
    Moment,
    WholeNumber,
    counted,
    end,
    one_line,
    print_fields,
    read_interview_id,
    read_user_id,
)
from worker.operations.inspection import inspect
from worker.operations.waiting import JobFilter, SelectedJob, WaitingJobs
from worker.services.job_status import JobStatusService
from worker.services.outbox_relay import message_of

_MOST_JOBS = 10_000
_CANNOT_LIST = "The finished jobs cannot be read"
_CANNOT_READ = "The job's state cannot be read"
_CANNOT_CANCEL = "Not all jobs are cancelled"


def _job_id(_: object, __: object, job_id: str | None) -> str | None:
    if job_id is not None and not is_job_id(job_id):
        raise click.BadParameter(
            f"got {describe(job_id)}, expected {JOB_ID_RULE}.", param_hint="'JOB_ID'"
        )
    return job_id


@click.command()
@click.argument("job_id", callback=_job_id)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(job_id: str, *, as_json: bool) -> None:
    """Report a job's state and result, from the ledger, the results and its announcement.

    The exit status is 0 in every state, and 3 if Redis or PostgreSQL is unavailable.
    """
    with connected(_CANNOT_READ, TO_READ_JOBS) as (app, redis):
        known = JobStatusService(app.storage, app.backend).status(redis, job_id)
    _print_status(known, as_json=as_json)


def _storable(_: object, __: object, given: str | None) -> str | None:
    with suppress(UnicodeEncodeError):
        (given or "").encode()
        return given
    raise click.BadParameter(f"got {describe(given)}, expected text in UTF-8.")


@click.command()
@click.option(
    "--user",
    metavar="ID",
    callback=read_user_id,
    help="Jobs for this user alone, and jobs of cohorts that created grants of this user, if these "
    "still exist.",
)
@click.option(
    "--interview",
    metavar="UUID",
    callback=read_interview_id,
    help="Jobs that created grants of this interview, if these still exist; with --user, the job "
    f"that created this grant. The UUID is {SPELLINGS}.",
)
@click.option("--actor", metavar="NAME", callback=_storable, help="Jobs requested by this actor.")
@click.option("--state", type=click.Choice(sorted(FINAL_STATES)), help="Jobs in this state.")
@click.option(
    "--since",
    type=Moment(),
    metavar="AGE|TIME",
    help="Jobs that finished within an age such as 12h or 7d, or since a time in ISO 8601 (UTC if "
    "it has no offset).",
)
@click.option("--until", type=Moment(), metavar="AGE|TIME", help="Jobs that finished before.")
@click.option(
    "--limit",
    type=WholeNumber(1, _MOST_JOBS),
    default=100,
    show_default=True,
    metavar="N",
    help=f"Number of jobs, at most {_MOST_JOBS:,}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each job.")
def jobs(
    *,
    user: str | None,
    interview: str | None,
    actor: str | None,
    state: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    as_json: bool,
) -> None:
    """List finished jobs, newest first: who requested them, when, and which worker executed them.

    Options combine. Only jobs in the ledger are listed: neither unfinished ones, which `queue`
    counts, nor pruned ones.

    Only PostgreSQL is used. The exit status is 3 if it is unavailable.
    """
    if since and until and until <= since:
        raise click.UsageError(
            f"--until: got {until.isoformat(timespec='seconds')}, expected a time after --since, "
            f"{since.isoformat(timespec='seconds')}."
        )
    wanted = FinishedJobFilterDTO(user, interview, actor, state, since, until)
    reads_grants = user is not None or interview is not None
    needed = (TO_LIST_JOBS, TO_READ_GRANTS) if reads_grants else (TO_LIST_JOBS,)
    with opened_storage(_CANNOT_LIST, *needed) as storage:
        found = storage.list_finished_jobs(wanted, limit)
    for one in found:
        known = status_of(one).model_dump(mode="json", exclude_none=True)
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
    fields = (f"{name}={_word(value)}" for name, value in known.items() if value is not None)
    words = at, f"{outcome.state:<9}", _word(job.job_id), _word(job.task), *fields
    return one_line("  ".join(words))


def _word(value: object) -> str:
    """Quote a value of a message that has spaces: it must not read as several fields."""
    text = str(value)
    return repr(text) if " " in text else text


@click.command()
@click.argument("job_id", required=False, callback=_job_id)
@click.option(
    "--user",
    metavar="ID",
    callback=read_user_id,
    help="Cancel the waiting jobs for this user alone.",
)
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
    given = {
        "a job ID": job_id is not None,
        "--queued": queued,
        "--user or --task": user is not None or task is not None,
    }
    if [*given.values()].count(True) != 1:
        names = " and ".join(name for name, is_given in given.items() if is_given) or "nothing"
        raise click.UsageError(
            f"got {names} to select jobs, expected either a job ID alone, or --queued alone, or "
            "--user or --task or both."
        )
    if job_id is None:
        _cancel_waiting(JobFilter(user, task), dry_run=dry_run, yes=yes, as_json=as_json)
        return
    if dry_run or yes:
        raise click.UsageError("--dry-run and --yes belong to --user, --task and --queued.")
    with connected(_CANNOT_READ, TO_CANCEL_JOBS) as (app, redis):
        known = JobStatusService(app.storage, app.backend).cancel(redis, job_id)
    _print_status(known, as_json=as_json)
    if known.state == "unknown":
        click.echo(
            "No job with this ID is known. The cancellation is kept: a job that is delivered under "
            "this ID does not start.",
            err=True,
        )
    if not known.cancel_requested and known.state != "cancelled":
        end(FAILED, one_line(_cannot_be_cancelled(known)))


def _cannot_be_cancelled(finished: JobStatus) -> str:
    succeeded = finished.state == "succeeded"
    remedy = ", and what it created can be deleted in the platform only" if succeeded else ""
    return (
        f"The job {finished.job_id} has {finished.state}, expected one that waits or runs; its "
        f"outcome stays{remedy}."
    )


def _cancel_waiting(wanted: JobFilter, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    with connected(_CANNOT_CANCEL, NEEDED) as (app, redis):
        jobs = WaitingJobs(app, redis, message_of)
        if dry_run:
            selected = _print_each(jobs.select(wanted), as_json=as_json)
            click.echo(f"{counted(selected, 'job')} would be cancelled.", err=True)
            return
        if not yes:
            number = sum(1 for _ in jobs.select(wanted))
            if number == 0:
                click.echo("No waiting job is selected.", err=True)
                return
            click.confirm(f"Cancel {counted(number, 'job')}?", abort=True, err=True)
        settled = _print_each(_noting_others(jobs.cancel(wanted)), as_json=as_json)
    click.echo(f"{counted(settled, 'job')} cancelled.", err=True)


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
    with connected(_CANNOT_CANCEL, NEEDED) as (app, redis):
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
    click.echo(f"{counted(purged, 'job')} purged.")
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
