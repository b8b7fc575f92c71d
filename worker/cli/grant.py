"""interview-access grant."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import click
from interview_access.contracts import JobProgress
from interview_access.errors import (
    InterviewAccessError,
    NoAnswerInTimeError,
    QueueUnavailableError,
)
from interview_access.producer import InterviewAccessClient
from interview_access.redis_address import FORMS

from worker.cli.terminal import FAILED, UNAVAILABLE, end, one_line


@click.command()
@click.option("--user", "user_id", required=True, metavar="ID", help="Who is granted access.")
@click.option("--interview", "interview_ids", multiple=True, metavar="ID", help="An interview.")
@click.option(
    "--interviews-from",
    "file",
    type=click.File(encoding="utf-8", errors="surrogateescape"),
    metavar="FILE|-",
    help="A file of interviews, one ID in a line.",
)
@click.option("--job-id", metavar="ID", help="The job's ID; by default a random UUID.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait at most.",
)
def grant(
    *,
    user_id: str,
    interview_ids: tuple[str, ...],
    file: IO[str] | None,
    job_id: str | None,
    wait: bool,
    timeout: float,
) -> None:
    """Enqueue a job that grants a user access to interviews, and print its ID.

    With --wait, standard output gets the result as a line of JSON, and standard error the rest. The
    exit status is 0 on success, 1 if the job failed, 2 for a usage error, and 3 if there was no
    result in time or Redis is unavailable.
    """
    if bool(interview_ids) == bool(file):
        raise click.UsageError("Give the interviews either by --interview or by --interviews-from.")
    ids = [line.strip() for line in file if line.strip()] if file else list(interview_ids)
    if not os.environ.get("CELERY_BROKER_URL"):
        end(2, f"CELERY_BROKER_URL: not set, expected {FORMS['redis']}")
    try:
        client = InterviewAccessClient()
    except ValueError as error:
        end(2, str(error))
    try:
        job_id = client.enqueue(user_id, ids, job_id=job_id)
        if not wait:
            click.echo(job_id)
            return
        click.echo(f"job {job_id} is queued", err=True)
        with _progress_bar() as on_progress:
            result = client.wait(job_id, timeout=timeout, on_progress=on_progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (NoAnswerInTimeError, QueueUnavailableError) as error:
        end(UNAVAILABLE, one_line(error))
    except InterviewAccessError as error:
        end(FAILED, one_line(f"{type(error).__name__}: {error}"))
    click.echo(json.dumps(result))


@contextmanager
def _progress_bar() -> Iterator[Callable[[JobProgress], None] | None]:
    """Show a progress bar if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 - slow, and needed on a terminal only
    from rich.progress import (  # noqa: PLC0415 - likewise
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
    )

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("granting", total=None)
        yield lambda seen: progress.update(task, completed=seen.done, total=seen.total)
