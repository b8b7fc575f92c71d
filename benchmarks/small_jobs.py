"""The parts about small jobs: rates, latency, other jobs at the same time, and producers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Event, Thread
from uuid import uuid4

from celery import Celery
from interview_access.contracts import QUEUE, GrantJob
from interview_access.producer import InterviewAccessClient

from benchmarks.bench import Bench
from benchmarks.contenders import BARE, NOOP, OURS
from benchmarks.deployment import Deployment
from benchmarks.measuring import (
    Bar,
    BenchmarkError,
    Comparison,
    Figure,
    Trial,
    measure,
    percentile_95,
)

IDS = 20
"""IDs in a small job."""
INTERVIEWS = 1_000
"""Interviews that small jobs request in turn."""
JOBS = 3_000
"""Small jobs in a queue."""

_ONE_BY_ONE = 200
_AT_ONCE = 16
_HOT_INTERVIEWS = 1_000
# Number of large jobs by size: enough for small jobs to meet all of their stages.
_STREAMS = {100_000: 20, 5_000: 200}
_OUTSTANDING = 4  # large jobs that are queued or run: two for each pool process
_PAUSE = 0.02  # seconds between small jobs during the stream
_SENT = 20_000


def jobs_on(interviews: Sequence[str], count: int, ids: int) -> list[GrantJob]:
    """Return jobs of a new user each, which request the interviews in turn."""
    places = len(interviews)
    return [
        GrantJob(
            uuid4().hex, [interviews[(job * ids + at) % places] for at in range(min(ids, places))]
        )
        for job in range(count)
    ]


def drain_rate(deployment: Deployment, jobs: int) -> float:
    """Measure a queue of jobs of 20 ids until the last result, in jobs a second."""
    deployment.reset()
    seconds = deployment.drain(jobs_on(deployment.database.interviews, jobs, IDS))
    deployment.settle()
    return jobs / seconds


def small(bench: Bench) -> list[Figure]:
    """A queue of jobs of 20 ids: jobs a second until the last result."""
    jobs = bench.size(JOBS)
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(INTERVIEWS))

        def rate(deployment: Deployment) -> Mapping[str, float]:
            return {deployment.contender.name: drain_rate(deployment, jobs)}

        deployments = [
            stack.enter_context(bench.deploy(one, database)) for one in (OURS, BARE, NOOP)
        ]
        comparison = Comparison(
            measure([_of(rate, deployment) for deployment in deployments], bench.runs), "jobs/s"
        )
    return [
        comparison.figure(BARE.name),
        comparison.figure(OURS.name, BARE.name, Bar(6, at_least=True)),
        comparison.figure(NOOP.name, BARE.name),
    ]


def outcomes(bench: Bench) -> list[Figure]:
    """Queued jobs of 20 ids: new ones, duplicates of them, and jobs with an unknown id."""
    jobs = bench.size(JOBS)
    new, repeated, failed = "new", "all repeated", "all failed"
    with bench.database(INTERVIEWS) as database, bench.deploy(OURS, database) as deployment:

        def twice() -> Mapping[str, float]:
            deployment.reset()
            first, second = deployment.drain_twice(jobs_on(database.interviews, jobs, IDS))
            deployment.settle()
            return {new: jobs / first, repeated: jobs / second}

        def with_unknown() -> Mapping[str, float]:
            deployment.reset()
            valid = jobs_on(database.interviews, jobs, IDS - 1)
            seconds = deployment.drain(
                [GrantJob(one.user_id, [*one.interview_ids, str(uuid4())]) for one in valid],
                failed=True,
            )
            deployment.settle()
            return {failed: jobs / seconds}

        comparison = Comparison(measure([twice, with_unknown], bench.runs), "jobs/s")
    bar = Bar(1, at_least=True)
    return [
        comparison.figure(new),
        comparison.figure(repeated, new, bar),
        comparison.figure(failed, new, bar),
    ]


def latency(bench: Bench) -> list[Figure]:
    """One job of 20 ids at a time on an idle worker: the median from enqueue to result."""
    jobs = bench.size(_ONE_BY_ONE)
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(INTERVIEWS))

        def median(deployment: Deployment) -> Mapping[str, float]:
            deployment.reset()
            times = [deployment.time_one(job) for job in jobs_on(database.interviews, jobs, IDS)]
            deployment.settle()
            return {deployment.contender.name: _milliseconds(statistics.median(times))}

        deployments = [stack.enter_context(bench.deploy(one, database)) for one in (OURS, BARE)]
        comparison = Comparison(
            measure([_of(median, deployment) for deployment in deployments], bench.runs), "ms"
        )
    return [comparison.figure(BARE.name), comparison.figure(OURS.name, BARE.name, Bar(1.05))]


def hot(bench: Bench) -> list[Figure]:
    """16 simultaneous jobs: on the same interviews, and on separate interviews."""
    ids = bench.size(_HOT_INTERVIEWS)
    with (
        bench.database(_AT_ONCE * ids) as database,
        bench.deploy(
            OURS, database, processes=_AT_ONCE + 1
        ) as deployment,  # one is reserved for small jobs
    ):

        def rate(variant: str, interviews: Sequence[str]) -> Mapping[str, float]:
            deployment.reset()
            seconds = deployment.drain(jobs_on(interviews, _AT_ONCE, ids))
            deployment.settle()
            return {variant: _AT_ONCE * ids / seconds}

        own, same = "interviews of their own", "the same interviews"
        trials: list[Trial] = [
            lambda: rate(own, database.interviews),
            lambda: rate(same, database.interviews[:ids]),
        ]
        for trial in trials:  # warms up the pool processes that have executed no job yet
            trial()
        comparison = Comparison(measure(trials, bench.runs), "rows/s")
    return [comparison.figure(own), comparison.figure(same, own, Bar(0.8, at_least=True))]


def mixed(bench: Bench) -> list[Figure]:
    """A job of 20 ids during a stream of large ones: 95th percentile from enqueue to result."""
    most, alone = bench.size(_ONE_BY_ONE), "alone"
    streams = {bench.size(ids): count for ids, count in _STREAMS.items()}
    with bench.database(max(streams)) as database, bench.deploy(OURS, database) as deployment:

        def sample(variant: str, times: Iterator[float]) -> Mapping[str, float]:
            taken = [seconds for _, seconds in zip(range(most), times, strict=False)]
            return {variant: _milliseconds(percentile_95(taken))}

        def times() -> Iterator[float]:
            while True:
                (job,) = jobs_on(database.interviews, 1, IDS)
                yield deployment.time_one(job)

        def by_itself() -> Mapping[str, float]:
            deployment.reset()
            figures = sample(alone, times())
            deployment.settle()
            return figures

        def in_company(ids: int) -> Mapping[str, float]:
            deployment.reset()
            stream = _Stream(deployment, jobs_on(database.interviews, streams[ids], ids))
            figures = sample(_beside(ids), stream.accompany(times()))
            stream.end()
            deployment.settle()
            return figures

        trials: list[Trial] = [by_itself, *(partial(in_company, ids) for ids in streams)]
        comparison = Comparison(measure(trials, bench.runs), "ms")
    return [
        comparison.figure(alone),
        *(comparison.figure(_beside(ids), alone, Bar(3)) for ids in streams),
    ]


def _beside(ids: int) -> str:
    return f"beside jobs of {ids:,} ids"


class _Stream:
    """A stream of large jobs, of which a few are queued or run until all have finished.

    Their messages are encoded beforehand and moved within Redis, because encoding one takes longer
    than executing a small job.
    """

    def __init__(self, deployment: Deployment, jobs: Sequence[GrantJob]) -> None:
        self._crew = deployment
        self._jobs = [job.job_id for job in jobs]
        self._ended = Event()
        self._error: BaseException | None = None
        deployment.stage(jobs)
        deployment.hold()
        self._thread = Thread(target=self._feed, daemon=True)

    def accompany(self, times: Iterator[float]) -> Iterator[float]:
        """Take times until the stream ends, at least one."""
        self._thread.start()
        for seconds in times:
            yield seconds
            if self._ended.wait(_PAUSE):
                break

    def end(self) -> None:
        """Wait for the last large job."""
        self._thread.join()
        if self._error is not None:
            raise BenchmarkError("the stream of large jobs was interrupted") from self._error

    def _feed(self) -> None:
        try:
            for _ in range(_OUTSTANDING):
                self._crew.release_next()
            for job_id in self._jobs:
                self._crew.collect([job_id])
                self._crew.release_next()
        except Exception as error:  # noqa: BLE001 - end() raises it again
            self._error = error
        finally:
            self._ended.set()


def producer(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids sent by one process, without a worker: jobs a second."""
    jobs = bench.size(_SENT)
    interviews = [str(uuid4()) for _ in range(INTERVIEWS)]
    delay, loop, many = "Celery's .delay() in a loop", "enqueue in a loop", "enqueue_many"
    with bench.queue() as (number, _), bench.redis(number) as redis:
        client = InterviewAccessClient(bench.broker(number))
        app = Celery(broker=bench.broker(number), backend=bench.broker(number))
        app.conf.task_default_queue = QUEUE

        @app.task(name="grant")  # type: ignore[untyped-decorator] # Celery ships no types
        def grant(user_id: str, interview_ids: list[str]) -> None:
            """Is sent and never executed."""

        def rate(variant: str, enqueue: Callable[[Sequence[GrantJob]], object]) -> dict[str, float]:
            redis.flushdb()
            sent = jobs_on(interviews, jobs, IDS)
            started = time.perf_counter()
            enqueue(sent)
            seconds = time.perf_counter() - started
            queued = redis.llen(QUEUE)
            if queued != jobs:
                raise BenchmarkError(f"{variant}: expected {jobs:,} messages, got {queued}")
            return {variant: jobs / seconds}

        def delay_each(sent: Sequence[GrantJob]) -> None:
            for job in sent:
                grant.delay(job.user_id, job.interview_ids)

        def enqueue_each(sent: Sequence[GrantJob]) -> None:
            for job in sent:
                client.enqueue(job.user_id, job.interview_ids, job_id=job.job_id)

        trials: list[Trial] = [
            lambda: rate(delay, delay_each),
            lambda: rate(loop, enqueue_each),
            lambda: rate(many, client.enqueue_many),
        ]
        comparison = Comparison(measure(trials, bench.runs), "jobs/s")
        client.close()
        app.close()
    return [
        comparison.figure(delay),
        comparison.figure(loop, delay, Bar(2, at_least=True)),
        comparison.figure(many, delay, Bar(10, at_least=True)),
    ]


def _of(sample: Callable[[Deployment], Mapping[str, float]], deployment: Deployment) -> Trial:
    return lambda: sample(deployment)


def _milliseconds(seconds: float) -> float:
    return 1_000 * seconds
