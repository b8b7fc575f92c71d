"""The parts about small jobs: rates, times, neighbours, and how they are sent."""

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
# Of large jobs, by their size: enough jobs for a small one's time to meet all of their stages.
_STREAMS = {100_000: 20, 5_000: 200}
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
        judge.figure(OURS.name, BARE.name, Bar(6, at_least=True)),
        judge.figure(NOOP.name, BARE.name),
    ]


def outcomes(bench: Bench) -> list[Figure]:
    """Queued jobs of 20 ids: new ones, the same messages once more, and jobs with an unknown id."""
    jobs = bench.size(JOBS)
    new, repeated, failed = "new", "all repeated", "all failed"
    with bench.database(INTERVIEWS) as database, bench.crew(OURS, database) as crew:

        def twice() -> Mapping[str, float]:
            crew.reset()
            first, second = crew.drain_twice(jobs_on(database.interviews, jobs, IDS))
            crew.settle()
            return {new: jobs / first, repeated: jobs / second}

        def with_unknown() -> Mapping[str, float]:
            crew.reset()
            valid = jobs_on(database.interviews, jobs, IDS - 1)
            seconds = crew.drain(
                [GrantJob(one.user_id, [*one.interview_ids, str(uuid4())]) for one in valid],
                failed=True,
            )
            crew.settle()
            return {failed: jobs / seconds}

        judge = Judge(measure([twice, with_unknown], bench.runs), "jobs/s")
    bar = Bar(1, at_least=True)
    return [judge.figure(new), judge.figure(repeated, new, bar), judge.figure(failed, new, bar)]


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
    return [judge.figure(BARE.name), judge.figure(OURS.name, BARE.name, Bar(1.05))]


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
    most, alone = bench.size(_ONE_BY_ONE), "alone"
    streams = {bench.size(ids): count for ids, count in _STREAMS.items()}
    with bench.database(max(streams)) as database, bench.crew(OURS, database) as crew:

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

        def in_company(ids: int) -> Mapping[str, float]:
            crew.reset()
            stream = _Stream(crew, jobs_on(database.interviews, streams[ids], ids))
            figures = sample(_beside(ids), stream.accompany(times()))
            stream.end()
            crew.settle()
            return figures

        trials: list[Trial] = [by_itself, *(partial(in_company, ids) for ids in streams)]
        judge = Judge(measure(trials, bench.runs), "ms")
    return [judge.figure(alone), *(judge.figure(_beside(ids), alone, Bar(3)) for ids in streams)]


def _beside(ids: int) -> str:
    return f"beside jobs of {ids:,} ids"


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
    delay, loop, many = "Celery's .delay() in a loop", "enqueue in a loop", "enqueue_many"
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

        def enqueue_each(sent: Sequence[GrantJob]) -> None:
            for job in sent:
                client.enqueue(job.user_id, job.interview_ids, job_id=job.job_id)

        trials: list[Trial] = [
            lambda: rate(delay, delay_each),
            lambda: rate(loop, enqueue_each),
            lambda: rate(many, client.enqueue_many),
        ]
        judge = Judge(measure(trials, bench.runs), "jobs/s")
        client.close()
        app.close()
    return [
        judge.figure(delay),
        judge.figure(loop, delay, Bar(2, at_least=True)),
        judge.figure(many, delay, Bar(10, at_least=True)),
    ]


def _of(sample: Callable[[Crew], Mapping[str, float]], crew: Crew) -> Trial:
    return lambda: sample(crew)


def _milliseconds(seconds: float) -> float:
    return 1_000 * seconds
