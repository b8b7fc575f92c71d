"""interview-access queue, pause and resume."""

from __future__ import annotations

import getpass
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

import click
from interview_access.connections import CLIENT_NAME, connect
from redis.exceptions import RedisError

from storage.dtos import OutboxTotalsDTO
from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import TO_COUNT_REQUESTS
from worker.cli.environment import opened_queue, read_settings, redis_failure, storage_failure
from worker.cli.terminal import FAILED, UNAVAILABLE, counted, end, one_line
from worker.operations.inspection import QueueSnapshot, inspect
from worker.operations.pause import MAX_CHARACTERS, Pause, PauseSwitch
from worker.settings import Settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def queue(*, as_json: bool) -> None:
    """Show the queue: waiting jobs by lane, delayed and claimed ones, dead letters, the outbox.

    The exit status is 3 if Redis or PostgreSQL is unavailable or denies a permission. What the
    other one knows is printed, and standard error names what is missing.
    """
    settings = read_settings(Settings)
    problems = []
    snapshot, outbox = None, None
    try:
        with connect(settings.broker, client_name=CLIENT_NAME) as redis:
            snapshot = inspect(redis)
    except (RedisError, OSError) as error:
        problems.append(redis_failure("The queue is missing", error, settings))
    try:
        with closing(PostgresStorage(settings.database_url)) as storage:
            outbox = storage.count_requests()
    except StorageError as error:
        failure = "The outbox is missing"
        problems.append(storage_failure(failure, error, settings, TO_COUNT_REQUESTS))
    if as_json:
        fields = _as_json(snapshot) | {"outbox": outbox and asdict(outbox)}
        click.echo(json.dumps(fields, default=datetime.isoformat))
    else:
        for line in [*_lines(snapshot), *_outbox_lines(outbox)]:
            click.echo(one_line(line))
    for problem in problems:
        click.echo(problem, err=True)
    sys.exit(UNAVAILABLE if problems else 0)


def _as_json(snapshot: QueueSnapshot | None) -> dict[str, object]:
    if snapshot is None:
        return {}
    totals = {"waiting": snapshot.waiting, "claimed": snapshot.claimed}
    return {**asdict(snapshot), **totals}


def _lines(snapshot: QueueSnapshot | None) -> Iterator[str]:
    if snapshot is None:
        return
    now = snapshot.at
    if snapshot.pause:
        yield f"PAUSED {_in_words(snapshot.pause)}"
    yield f"waiting        {snapshot.waiting:,}"
    for lane in snapshot.lanes:
        if lane.oldest:
            job = lane.oldest
            age = f"sent {_ago(job.sent_at, now)}" if job.sent_at else "age unknown"
            named = f"{job.job_id or 'unreadable'}  {job.task or '-'}"
            yield f"  {lane.name:<12} {lane.waiting:,}, next: {named}  {age}"
    due = snapshot.next_due_at
    yield f"delayed        {snapshot.delayed:,}" + (f", next due {due:%F %T}Z" if due else "")
    yield f"claimed        {snapshot.claimed:,} by {counted(snapshot.workers, 'worker session')}"
    for one in snapshot.sessions:
        heartbeats, node = counted(one.heartbeats, "heartbeat"), one.node and f", {one.node}"
        yield f"  {one.name[:12]} {one.claimed:,} after {heartbeats}{node}"
    dead = snapshot.dead_letters
    oldest = f", {dead.size:,} B, oldest {_ago(dead.oldest_at, now)}" if dead.oldest_at else ""
    yield f"dead letters   {dead.count:,}{oldest}"


def _outbox_lines(outbox: OutboxTotalsDTO | None) -> Iterator[str]:
    if outbox:
        since = outbox.oldest_unsent_at
        oldest = f", oldest {_ago(since, datetime.now(UTC))}" if since else ""
        yield f"outbox         {outbox.unsent:,} unsent{oldest}; {outbox.sent:,} sent, unfinished"


def _ago(moment: datetime, now: datetime) -> str:
    seconds = max((now - moment).total_seconds(), 0.0)
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _text(_: object, __: object, given: str | None) -> str | None:
    if given is not None and len(given) > MAX_CHARACTERS:
        raise click.BadParameter(
            f"got {len(given):,} characters, expected at most {MAX_CHARACTERS}."
        )
    return given


@click.command()
@click.option("--reason", default="", callback=_text, metavar="TEXT", help="Why, for others.")
@click.option(
    "--by", callback=_text, metavar="NAME", help="Who pauses it.  [default: this user at this host]"
)
def pause(*, reason: str, by: str | None) -> None:
    """Pause the queue: no worker claims a job from now on, also after restarts.

    Running jobs finish. Producers and the outbox continue to enqueue, and `status` and `cancel` are
    answered. A paused queue stays as it is, and the exit status is 1.
    """
    with _switch() as switch:
        existing = switch.pause(by if by is not None else _operator(), reason)
    if existing:
        end(FAILED, one_line(f"The queue is paused already, {_in_words(existing)}"))
    click.echo("The queue is paused. `interview-access resume` ends the pause.")


@click.command()
def resume() -> None:
    """Resume a paused queue: workers claim again within a second.

    The exit status is 1 if the queue is not paused.
    """
    with _switch() as switch:
        ended = switch.resume()
    if not ended:
        end(FAILED, "The queue is not paused.")
    click.echo(one_line(f"The queue is resumed. It was paused {_in_words(ended)}"))


def _in_words(pause: Pause) -> str:
    since = f" at {pause.at:%F %T}Z" if pause.at else ""
    return f"by {pause.by or 'an unknown user'}{since}: {pause.reason or 'no reason given'}"


def _operator() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"[:MAX_CHARACTERS]


@contextmanager
def _switch() -> Iterator[PauseSwitch]:
    with opened_queue("Nothing is known to be changed") as redis:
        yield PauseSwitch(redis)
