"""The parts about small jobs: rates, times, neighbours, and how they are sent."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from threading import Event, Thread
from uuid import uuid4

from celery import Celery
from interview_access.contracts import QUEUE, GrantJob
from interview_access.producer import InterviewAccessClient

from benchmarks.measuring import Bar, Figure, Judge, Trial, measure, percentile_95
from benchmarks.site import BARE, NOOP, OURS, Bench, BenchmarkError, Crew

IDS = 20
"""In a small job."""
INTERVIEWS = 1_000
"""That small jobs go through in turn."""
JOBS = 3_000
"""That stand in the queue at once."""

_ONE_BY_ONE = 200
_AT_ONCE = 16
_HOT_INTERVIEWS = 1_000
_LARGE_JOB = 100_000
_LARGE_JOBS = 20  # of a stream: enough for a small job's time to meet all of their stages
_OUTSTANDING = 4  # large jobs that stand in queue or run: two for each child
_PAUSE = 0.02  # seconds between small jobs beside the stream
_SENT = 20_000


def jobs_on(interviews: Sequence[str], count: int, ids: int) -> list[GrantJob]:
    """Jobs of a user each, which go through the interviews in turn."""
    places = len(interviews)
    return [
        GrantJob(
            uuid4().hex, [interviews[(job * ids + at) % places] for at in range(min(ids, places))]
        )
        for job in range(count)
    ]


def drain_rate(crew: Crew, jobs: int) -> float:
    """Jobs of 20 ids a second, all of which stand in the queue, until the last result is there."""
    crew.reset()
    seconds = crew.drain(jobs_on(crew.database.interviews, jobs, IDS))
    crew.settle()
    return jobs / seconds


def small(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids that all stand in the queue: jobs a second until the last result is there."""
    jobs = bench.size(JOBS)
    with ExitStack() as open_crews:
        database = open_crews.enter_context(bench.database(INTERVIEWS))

        def rate(crew: Crew) -> Mapping[str, float]:
            return {crew.contender.name: drain_rate(crew, jobs)}

        crews = [open_crews.enter_context(bench.crew(one, database)) for one in (OURS, BARE, NOOP)]
        judge = Judge(measure([_of(rate, crew) for crew in crews], bench.runs), "jobs/s")
    return [
        judge.figure(BARE.name),
        judge.figure(OURS.name, BARE.name, Bar(5, at_least=True)),
        judge.figure(NOOP.name, BARE.name),
    ]


def latency(bench: Bench) -> list[Figure]:
    """One job of 20 ids at a time on an idle worker: the median from enqueue to result."""
    jobs = bench.size(_ONE_BY_ONE)
    with ExitStack() as open_crews:
        database = open_crews.enter_context(bench.database(INTERVIEWS))

        def median(crew: Crew) -> Mapping[str, float]:
            crew.reset()
            times = [crew.time_one(job) for job in jobs_on(database.interviews, jobs, IDS)]
            crew.settle()
            return {crew.contender.name: _milliseconds(statistics.median(times))}

        crews = [open_crews.enter_context(bench.crew(one, database)) for one in (OURS, BARE)]
        judge = Judge(measure([_of(median, crew) for crew in crews], bench.runs), "ms")
    return [judge.figure(BARE.name), judge.figure(OURS.name, BARE.name, Bar(1.25))]


def hot(bench: Bench) -> list[Figure]:
    """16 jobs at once: on the same interviews, and on interviews of their own."""
    ids = bench.size(_HOT_INTERVIEWS)
    with (
        bench.database(_AT_ONCE * ids) as database,
        bench.crew(OURS, database, children=_AT_ONCE + 1) as crew,  # one is left to small jobs
    ):

        def rate(variant: str, interviews: Sequence[str]) -> Mapping[str, float]:
            crew.reset()
            seconds = crew.drain(jobs_on(interviews, _AT_ONCE, ids))
            crew.settle()
            return {variant: _AT_ONCE * ids / seconds}

        own, same = "interviews of their own", "the same interviews"
        trials: list[Trial] = [
            lambda: rate(own, database.interviews),
            lambda: rate(same, database.interviews[:ids]),
        ]
        for trial in trials:  # some children have had no job yet, and would be slow at theirs
            trial()
        judge = Judge(measure(trials, bench.runs), "rows/s")
    return [judge.figure(own), judge.figure(same, own, Bar(0.8, at_least=True))]


def mixed(bench: Bench) -> list[Figure]:
    """A job of 20 ids beside a stream of large ones: the 95th percentile from enqueue to result."""
    large, most = bench.size(_LARGE_JOB), bench.size(_ONE_BY_ONE)
    alone, beside = "alone", f"beside jobs of {large:,} ids"
    with bench.database(large) as database, bench.crew(OURS, database) as crew:

        def sample(variant: str, times: Iterator[float]) -> Mapping[str, float]:
            taken = [seconds for _, seconds in zip(range(most), times, strict=False)]
            return {variant: _milliseconds(percentile_95(taken))}

        def times() -> Iterator[float]:
            while True:
                (job,) = jobs_on(database.interviews, 1, IDS)
                yield crew.time_one(job)

        def by_itself() -> Mapping[str, float]:
            crew.reset()
            figures = sample(alone, times())
            crew.settle()
            return figures

        def in_company() -> Mapping[str, float]:
            crew.reset()
            stream = _Stream(crew, jobs_on(database.interviews, _LARGE_JOBS, large))
            figures = sample(beside, stream.accompany(times()))
            stream.end()
            crew.settle()
            return figures

        judge = Judge(measure([by_itself, in_company], bench.runs), "ms")
    return [judge.figure(alone), judge.figure(beside, alone, Bar(3))]


class _Stream:
    """Large jobs, of which a few stand in the queue or run until all are done.

    Their messages are made beforehand and moved within Redis: to make one takes a core for longer
    than a small job does.
    """

    def __init__(self, crew: Crew, jobs: Sequence[GrantJob]) -> None:
        self._crew = crew
        self._jobs = [job.job_id for job in jobs]
        self._ended = Event()
        self._trouble: BaseException | None = None
        crew.put_by(jobs)
        crew.hold_back()
        self._thread = Thread(target=self._feed, daemon=True)

    def accompany(self, times: Iterator[float]) -> Iterator[float]:
        """Take times while the stream goes on, one at least."""
        self._thread.start()
        for seconds in times:
            yield seconds
            if self._ended.wait(_PAUSE):
                break

    def end(self) -> None:
        """Wait for the last of the large jobs."""
        self._thread.join()
        if self._trouble is not None:
            raise BenchmarkError("the stream of large jobs broke off") from self._trouble

    def _feed(self) -> None:
        try:
            for _ in range(_OUTSTANDING):
                self._crew.release_first()
            for job_id in self._jobs:
                self._crew.collect([job_id])
                self._crew.release_first()
        except Exception as error:  # noqa: BLE001 - raised again by whoever waits for the end
            self._trouble = error
        finally:
            self._ended.set()


def producer(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids sent by one process, no worker: jobs a second."""
    jobs = bench.size(_SENT)
    interviews = [str(uuid4()) for _ in range(INTERVIEWS)]
    loop, many = "Celery's .delay() in a loop", "enqueue_many"
    with bench.queue() as (number, _), bench.redis(number) as redis:
        client = InterviewAccessClient(bench.broker(number))
        app = Celery(broker=bench.broker(number), backend=bench.broker(number))
        app.conf.task_default_queue = QUEUE

        @app.task(name="grant")  # type: ignore[untyped-decorator] # Celery ships no types
        def grant(user_id: str, interview_ids: list[str]) -> None:
            """Only sent."""

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

        trials: list[Trial] = [
            lambda: rate(loop, delay_each),
            lambda: rate(many, client.enqueue_many),
        ]
        judge = Judge(measure(trials, bench.runs), "jobs/s")
        client.close()
        app.close()
    return [judge.figure(loop), judge.figure(many, loop, Bar(5, at_least=True))]


def _of(sample: Callable[[Crew], Mapping[str, float]], crew: Crew) -> Trial:
    return lambda: sample(crew)


def _milliseconds(seconds: float) -> float:
    return 1_000 * seconds
