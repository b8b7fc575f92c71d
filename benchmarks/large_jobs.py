"""The parts about large jobs: against COPY and the plan, repeated, largest, on full tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any
from uuid import uuid4

import psutil
from interview_access.contracts import (
    GRANT_ACCESS,
    GrantJob,
    RequestedInterviews,
    request_digest,
)
from interview_access.protocol.messages import JobMessage

from benchmarks.baselines.copy import copy_grants
from benchmarks.bench import Bench
from benchmarks.contenders import OURS, PLAN
from benchmarks.deployment import Deployment
from benchmarks.measuring import Bar, BenchmarkError, Comparison, Figure, Trial, measure
from storage.dtos import JobDTO
from storage.postgres import PostgresStorage
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob

_LARGE = 100_000
_LARGEST = 1_000_000
_EXISTING = (0, 1_000_000, 5_000_000, 10_000_000)
_POLL_SECONDS = 0.01  # between two samples of memory; a chunk of a job takes ten times as long
_MEGABYTE = 1_000_000

COPY = "COPY"
COPY_IN_ORDER = "COPY, of ids sorted before"
DATABASE_PART = "ours, its database part alone"


def large(bench: Bench) -> list[Figure]:
    """100,000 new ids: COPY, the database part of a job, and jobs from enqueue to result."""
    ids = bench.size(_LARGE)
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(ids))
        storage = PostgresStorage(database.url)
        stack.callback(storage.close)

        def copy(variant: str, interviews: Sequence[str]) -> Mapping[str, float]:
            database.reset()
            seconds = copy_grants(database.url, _users(1), interviews)
            database.expect(ids)
            return {variant: seconds}

        def database_part() -> Mapping[str, float]:
            database.reset()
            seconds = _grant_in_process(storage, database.interviews)
            database.expect(ids)
            return {DATABASE_PART: seconds}

        def whole(deployment: Deployment) -> Mapping[str, float]:
            deployment.reset()
            seconds = deployment.time_one(GrantJob(uuid4().hex, database.interviews))
            deployment.settle()
            return {deployment.contender.name: seconds}

        contenders = [OURS] if bench.quick else [OURS, PLAN]
        deployments = [stack.enter_context(bench.deploy(one, database)) for one in contenders]
        trials: list[Trial] = [
            lambda: copy(COPY, database.interviews),
            lambda: copy(COPY_IN_ORDER, sorted(database.interviews)),
            database_part,
            *(partial(whole, deployment) for deployment in deployments),
        ]
        comparison = Comparison(measure(trials, bench.runs), "s")
    figures = [
        comparison.figure(COPY),
        comparison.figure(DATABASE_PART, COPY, Bar(1.05)),
        comparison.figure(OURS.name, COPY, Bar(1.05)),
        comparison.figure(COPY_IN_ORDER, COPY),
        comparison.named("its database part, the same", DATABASE_PART, COPY_IN_ORDER, Bar(1.25)),
        comparison.named("ours, the same", OURS.name, COPY_IN_ORDER, Bar(1.25)),
    ]
    if bench.quick:
        return figures
    faster = 4
    return [
        *figures,
        comparison.figure(PLAN.name, COPY),
        comparison.named("ours, against the plan", OURS.name, PLAN.name, Bar(1 / faster)),
    ]


def again(bench: Bench) -> list[Figure]:
    """100,000 ids from enqueue to result: new, all granted already, half of them granted."""
    ids = bench.size(_LARGE)
    first, second, half = "all new", "all granted already", "half granted already"
    proportion = "half of each of the two"
    with bench.database(ids) as database, bench.deploy(OURS, database) as deployment:

        def grant(user_id: str, interview_ids: Sequence[str]) -> float:
            return deployment.time_one(GrantJob(user_id, interview_ids))

        def both() -> Mapping[str, float]:
            deployment.reset()
            user_id = uuid4().hex
            new = grant(user_id, database.interviews)
            repeated = grant(user_id, database.interviews)
            deployment.settle()
            return {first: new, second: repeated, proportion: (new + repeated) / 2}

        def one_half() -> Mapping[str, float]:
            deployment.reset()
            user_id = uuid4().hex
            grant(user_id, database.interviews[::2])
            seconds = grant(user_id, database.interviews)
            deployment.settle()
            return {half: seconds}

        comparison = Comparison(measure([both, one_half], bench.runs), "s")
    return [
        comparison.figure(first),
        comparison.figure(second, first, Bar(0.25)),
        comparison.figure(proportion, first),
        comparison.figure(half, proportion, Bar(1)),
    ]


def cohort(bench: Bench) -> list[Figure]:
    """1,000 users and 100 interviews: one job from enqueue to result, against COPY of its rows."""
    interviews, ours = 100, "ours, a cohort"
    users = bench.size(_LARGE) // interviews
    with bench.database(interviews) as database, bench.deploy(OURS, database) as deployment:

        def copy() -> Mapping[str, float]:
            database.reset()
            seconds = copy_grants(database.url, _users(users), database.interviews)
            database.expect(users * interviews)
            return {COPY: seconds}

        def job() -> Mapping[str, float]:
            deployment.reset()
            seconds = deployment.time_cohort(_users(users), database.interviews)
            deployment.settle()
            return {ours: seconds}

        comparison = Comparison(measure([copy, job], bench.runs), "s")
    return [comparison.figure(COPY), comparison.figure(ours, COPY, Bar(1.3))]


def _users(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


def million(bench: Bench) -> list[Figure]:
    """1,000,000 ids, with a higher limit: time against 100,000, memory of worker and Redis."""
    ids, most = bench.size(_LARGE), bench.size(_LARGEST)
    one, ten = f"{ids:,} ids", f"{most:,} ids"
    child, redis, message = "the child's peak", "Redis's peak above before", "the message"
    with (
        bench.database(most) as database,
        bench.deploy(OURS, database, GRANT_MAX_INTERVIEW_IDS=most) as deployment,
    ):

        def usual() -> Mapping[str, float]:
            deployment.reset()
            seconds = deployment.time_one(GrantJob(uuid4().hex, database.interviews[:ids]))
            deployment.settle()
            return {one: seconds}

        def largest() -> Mapping[str, float]:
            deployment.reset()
            job = GrantJob(uuid4().hex, database.interviews)
            size = len(JobMessage.of(job).envelope)
            with measured_peaks(deployment) as peaks:
                seconds = deployment.time_one(job)
            deployment.settle()
            return {
                ten: seconds,
                child: peaks.child / _MEGABYTE,
                redis: peaks.redis / _MEGABYTE,
                message: size / _MEGABYTE,
            }

        samples = measure([usual, largest], bench.runs)
    seconds, memory = Comparison(samples, "s"), Comparison(samples, "MB")
    return [
        seconds.figure(one),
        seconds.figure(ten, one, Bar(12)),
        memory.figure(child, bar=Bar(300)),
        memory.figure(message),
        memory.figure(redis, message, Bar(3)),
    ]


def growth(bench: Bench) -> list[Figure]:
    """100,000 new ids from enqueue to result while the table has 0, 1, 5 and 10 million rows.

    The sizes are measured one after another, because the table only grows.
    """
    ids = bench.size(_LARGE)
    sizes = [round(bench.scale * rows) for rows in _EXISTING]
    names = [f"on {rows:,} rows" for rows in sizes]
    samples: dict[str, tuple[float, ...]] = {}
    with bench.database(ids) as database, bench.deploy(OURS, database) as deployment:

        def sample(name: str, filled: int) -> Mapping[str, float]:
            if not filled:
                deployment.reset()
            seconds = deployment.time_one(GrantJob(uuid4().hex, database.interviews))
            deployment.settle(existing=filled)
            return {name: 1_000_000 * seconds / ids}

        deployment.reset()
        filled = 0
        for name, rows in zip(names, sizes, strict=True):
            filled += database.fill(rows - filled)
            samples |= measure([partial(sample, name, filled)], bench.runs)
    comparison = Comparison(samples, "µs/row")
    empty, *others = names
    return [
        comparison.figure(empty),
        *(comparison.figure(name, empty, Bar(1.5)) for name in others),
    ]


def _grant_in_process(storage: PostgresStorage, interviews: Sequence[str]) -> float:
    """Measure the use case in this process, with a parsed request and an open connection."""
    user_id, job_id = uuid4().hex, str(uuid4())
    digest = request_digest(GRANT_ACCESS, user_id, interviews)
    entry = JobDTO(job_id, GRANT_ACCESS, user_id, digest)
    job = GrantAccessJob(entry, (user_id,), RequestedInterviews.among(interviews))
    with storage.transaction():
        pass
    started = time.perf_counter()
    (outcome,) = GrantAccessInteractor(storage).grant_access([job])
    seconds = time.perf_counter() - started
    if outcome.error is not None:
        raise BenchmarkError("the database part was not done") from outcome.error
    return seconds


@dataclass
class Peaks:
    """Peaks of memory, in bytes.

    Attributes:
        child: Resident memory of the largest pool process.
        redis: Memory of Redis above its use at the beginning.
    """

    child: int = 0
    redis: int = 0


@contextmanager
def measured_peaks(deployment: Deployment) -> Iterator[Peaks]:
    """The memory peaks within the block: pool processes are sampled, Redis reports its own peak."""
    peaks, over = Peaks(), Event()
    children = psutil.Process(deployment.service.pid).children()
    deployment.redis.config_resetstat()  # resets the peak
    before = _memory(deployment, "used_memory")
    errors: list[Exception] = []

    def sample() -> None:
        try:
            while not over.wait(_POLL_SECONDS):
                peaks.child = max(peaks.child, *(child.memory_info().rss for child in children))
        except psutil.Error as error:
            errors.append(error)

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
    if errors:
        raise BenchmarkError("a sampled pool process has ended") from errors[0]
    peaks.redis = _memory(deployment, "used_memory_peak") - before


def _memory(deployment: Deployment, figure: str) -> int:
    info: Any = deployment.redis.info("memory")
    return int(info[figure])
