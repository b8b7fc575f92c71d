"""The parts about large jobs: beside COPY and the plan, again, the largest, on full tables."""

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
from interview_access.protocol.messages import GrantMessage

from benchmarks.baselines.copy import copy_grants
from benchmarks.measuring import Bar, Figure, Judge, Trial, measure
from benchmarks.site import OURS, PLAN, Bench, BenchmarkError, Crew
from storage.dtos import JobDTO
from storage.postgres import PostgresStorage
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob

_LARGE = 100_000
_LARGEST = 1_000_000
_STANDING = (0, 1_000_000, 5_000_000, 10_000_000)
_LOOK_EVERY = 0.01  # seconds between two looks at memory: a chunk of a job takes ten times that
_MEGABYTE = 1_000_000

COPY = "COPY"
COPY_IN_ORDER = "COPY, of ids sorted before"
DATABASE_PART = "ours, its database part alone"


def large(bench: Bench) -> list[Figure]:
    """100,000 new ids: COPY, our database part, and whole jobs from enqueue to result."""
    ids = bench.size(_LARGE)
    with ExitStack() as open_crews:
        database = open_crews.enter_context(bench.database(ids))
        storage = PostgresStorage(database.url)
        open_crews.callback(storage.close)

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

        def whole(crew: Crew) -> Mapping[str, float]:
            crew.reset()
            seconds = crew.time_one(GrantJob(uuid4().hex, database.interviews))
            crew.settle()
            return {crew.contender.name: seconds}

        contenders = [OURS] if bench.quick else [OURS, PLAN]
        crews = [open_crews.enter_context(bench.crew(one, database)) for one in contenders]
        trials: list[Trial] = [
            lambda: copy(COPY, database.interviews),
            lambda: copy(COPY_IN_ORDER, sorted(database.interviews)),
            database_part,
            *(partial(whole, crew) for crew in crews),
        ]
        judge = Judge(measure(trials, bench.runs), "s")
    figures = [
        judge.figure(COPY),
        judge.figure(DATABASE_PART, COPY, Bar(1.05)),
        judge.figure(OURS.name, COPY, Bar(1.05)),
        judge.figure(COPY_IN_ORDER, COPY),
        judge.named("its database part, the same", DATABASE_PART, COPY_IN_ORDER, Bar(1.25)),
        judge.named("ours, the same", OURS.name, COPY_IN_ORDER, Bar(1.25)),
    ]
    if bench.quick:
        return figures
    faster = 4
    return [
        *figures,
        judge.figure(PLAN.name, COPY),
        judge.named("ours, against the plan", OURS.name, PLAN.name, Bar(1 / faster)),
    ]


def again(bench: Bench) -> list[Figure]:
    """100,000 ids from enqueue to result: new, all granted already, half of them granted."""
    ids = bench.size(_LARGE)
    first, second, half = "all new", "all granted already", "half granted already"
    proportion = "half of each of the two"
    with bench.database(ids) as database, bench.crew(OURS, database) as crew:

        def grant(user_id: str, interview_ids: Sequence[str]) -> float:
            return crew.time_one(GrantJob(user_id, interview_ids))

        def both() -> Mapping[str, float]:
            crew.reset()
            user_id = uuid4().hex
            new = grant(user_id, database.interviews)
            repeated = grant(user_id, database.interviews)
            crew.settle()
            return {first: new, second: repeated, proportion: (new + repeated) / 2}

        def one_half() -> Mapping[str, float]:
            crew.reset()
            user_id = uuid4().hex
            grant(user_id, database.interviews[::2])
            seconds = grant(user_id, database.interviews)
            crew.settle()
            return {half: seconds}

        judge = Judge(measure([both, one_half], bench.runs), "s")
    return [
        judge.figure(first),
        judge.figure(second, first, Bar(0.25)),
        judge.figure(proportion, first),
        judge.figure(half, proportion, Bar(1)),
    ]


def cohort(bench: Bench) -> list[Figure]:
    """1,000 users and 100 interviews, one job from enqueue to result, beside COPY of its rows."""
    interviews, ours = 100, "ours, a cohort"
    users = bench.size(_LARGE) // interviews
    with bench.database(interviews) as database, bench.crew(OURS, database) as crew:

        def copy() -> Mapping[str, float]:
            database.reset()
            seconds = copy_grants(database.url, _users(users), database.interviews)
            database.expect(users * interviews)
            return {COPY: seconds}

        def job() -> Mapping[str, float]:
            crew.reset()
            seconds = crew.time_cohort(_users(users), database.interviews)
            crew.settle()
            return {ours: seconds}

        judge = Judge(measure([copy, job], bench.runs), "s")
    return [judge.figure(COPY), judge.figure(ours, COPY, Bar(1.3))]


def _users(count: int) -> list[str]:
    return [uuid4().hex for _ in range(count)]


def million(bench: Bench) -> list[Figure]:
    """1,000,000 ids, the limit raised: time against one of 100,000, memory of child and Redis."""
    ids, most = bench.size(_LARGE), bench.size(_LARGEST)
    one, ten = f"{ids:,} ids", f"{most:,} ids"
    child, redis, message = "the child's peak", "Redis's peak above before", "the message"
    with (
        bench.database(most) as database,
        bench.crew(OURS, database, GRANT_MAX_INTERVIEW_IDS=most) as crew,
    ):

        def usual() -> Mapping[str, float]:
            crew.reset()
            seconds = crew.time_one(GrantJob(uuid4().hex, database.interviews[:ids]))
            crew.settle()
            return {one: seconds}

        def largest() -> Mapping[str, float]:
            crew.reset()
            job = GrantJob(uuid4().hex, database.interviews)
            size = len(GrantMessage.of(job.user_id, job.interview_ids).envelope)
            with watched(crew) as peaks:
                seconds = crew.time_one(job)
            crew.settle()
            return {
                ten: seconds,
                child: peaks.child / _MEGABYTE,
                redis: peaks.redis / _MEGABYTE,
                message: size / _MEGABYTE,
            }

        samples = measure([usual, largest], bench.runs)
    seconds, memory = Judge(samples, "s"), Judge(samples, "MB")
    return [
        seconds.figure(one),
        seconds.figure(ten, one, Bar(12)),
        memory.figure(child, bar=Bar(300)),
        memory.figure(message),
        memory.figure(redis, message, Bar(3)),
    ]


def growth(bench: Bench) -> list[Figure]:
    """100,000 new ids from enqueue to result while the table has 0, 1, 5 and 10 million rows.

    The sizes are taken one after another, for a table only grows.
    """
    ids = bench.size(_LARGE)
    sizes = [round(bench.scale * rows) for rows in _STANDING]
    names = [f"on {rows:,} rows" for rows in sizes]
    samples: dict[str, tuple[float, ...]] = {}
    with bench.database(ids) as database, bench.crew(OURS, database) as crew:

        def sample(name: str, filled: int) -> Mapping[str, float]:
            if not filled:
                crew.reset()
            seconds = crew.time_one(GrantJob(uuid4().hex, database.interviews))
            crew.settle(standing=filled)
            return {name: 1_000_000 * seconds / ids}

        crew.reset()
        filled = 0
        for name, rows in zip(names, sizes, strict=True):
            filled += database.fill(rows - filled)
            samples |= measure([partial(sample, name, filled)], bench.runs)
    judge = Judge(samples, "µs/row")
    empty, *others = names
    return [judge.figure(empty), *(judge.figure(name, empty, Bar(1.5)) for name in others)]


def _grant_in_process(storage: PostgresStorage, interviews: Sequence[str]) -> float:
    """Seconds of the interactor alone: the request is read before, the connection stands."""
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
    """The most memory that was seen, in bytes.

    Attributes:
        child: Resident, of one child of the worker.
        redis: Used, above what was used at the beginning.
    """

    child: int = 0
    redis: int = 0


@contextmanager
def watched(crew: Crew) -> Iterator[Peaks]:
    """Look at the memory of a worker's children until the block is left; Redis knows its own."""
    peaks, over = Peaks(), Event()
    children = psutil.Process(crew.service.pid).children()
    crew.redis.config_resetstat()  # of its peak
    before = _memory(crew, "used_memory")
    trouble: list[Exception] = []

    def look() -> None:
        try:
            while not over.wait(_LOOK_EVERY):
                peaks.child = max(peaks.child, *(child.memory_info().rss for child in children))
        except psutil.Error as error:
            trouble.append(error)

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
    if trouble:
        raise BenchmarkError("a child has ended, which was looked at") from trouble[0]
    peaks.redis = _memory(crew, "used_memory_peak") - before


def _memory(crew: Crew, figure: str) -> int:
    info: Any = crew.redis.info("memory")
    return int(info[figure])
