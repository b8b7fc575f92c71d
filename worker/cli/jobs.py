"""interview-access status and cancel."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click
from celery.exceptions import CeleryError
from interview_access.contracts import JOB_ID_RULE, JobStatus, describe, is_job_id
from kombu.exceptions import OperationalError
from redis import Redis
from redis.exceptions import NoPermissionError, RedisError

from storage.errors import StorageError
from storage.schema import TO_CANCEL_JOBS, TO_READ_JOBS, Needed, explain_denial
from worker.app import create_app
from worker.cli.environment import read_settings
from worker.cli.terminal import FAILED, PERMIT, UNAVAILABLE, end, one_line
from worker.services.job_status import JobStatusService
from worker.settings import Settings

_CHECK_SERVERS = "check that Redis and PostgreSQL can be reached, and run the command again"


def _job_id(_: object, __: object, job_id: str) -> str:
    if not is_job_id(job_id):
        raise click.BadParameter(f"got {describe(job_id)}, expected {JOB_ID_RULE}.")
    return job_id


@click.command()
@click.argument("job_id", callback=_job_id)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(job_id: str, *, as_json: bool) -> None:
    """Report a job's state and result, from the ledger, the results and its announcement.

    The exit status is 0 in every state, and 3 if Redis or PostgreSQL is unavailable.
    """
    with _job_status(TO_READ_JOBS) as (jobs, redis):
        known = jobs.status(redis, job_id)
    _print_status(known, as_json=as_json)


@click.command()
@click.argument("job_id", callback=_job_id)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def cancel(job_id: str, *, as_json: bool) -> None:
    """Cancel a job: it does not start, or stops after its current chunk. Report its state.

    An ID that is not known yet can be cancelled: a job that is sent under it later does not start.

    The exit status is 0 if the job is cancelled or its cancellation is requested, 1 if it had
    finished, and 3 if Redis or PostgreSQL is unavailable: cancel it again then.
    """
    with _job_status(TO_CANCEL_JOBS) as (jobs, redis):
        known = jobs.cancel(redis, job_id)
    _print_status(known, as_json=as_json)
    if known.state == "unknown":
        click.echo(
            "No job with this ID is known. The cancellation is kept: a job that is delivered under "
            "this ID does not start.",
            err=True,
        )
    sys.exit(0 if known.cancel_requested or known.state == "cancelled" else FAILED)


@contextmanager
def _job_status(needed: Needed) -> Iterator[tuple[JobStatusService, Redis]]:
    settings = read_settings(Settings)
    app = create_app(settings)
    try:
        with app.connection_for_write() as connection:
            yield JobStatusService(app.storage, app.backend), connection.default_channel.client
    except StorageError as error:
        denial = explain_denial(error, settings.database_url, needed)
        _end_unavailable(denial or error, "" if denial else _CHECK_SERVERS)
    except (CeleryError, OperationalError, RedisError, OSError) as error:
        cause = error.__cause__ or error
        is_denied = isinstance(cause, NoPermissionError)
        _end_unavailable(cause, PERMIT if is_denied else _CHECK_SERVERS)


def _end_unavailable(reason: object, remedy: str) -> NoReturn:
    what = str(reason).rstrip(".").replace(". ", ": ")  # redis-py's are two sentences
    sentence = "; ".join(filter(None, [f"The job's state cannot be read: {what}", remedy]))
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
    for name, value in fields.items():
        click.echo(f"{name:<24} {one_line(_in_words(value))}")


def _in_words(value: object) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list():
            return f"{len(value):,} (--json names them)"
        case dict():
            return ", ".join(f"{name}: {_in_words(one)}" for name, one in value.items())
        case _:
            return str(value)
