"""The parts that are curves: rows a second against job size, time in queue against load."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

from benchmarks.baselines.copy import copy_grants
from benchmarks.large_jobs import COPY
from benchmarks.measuring import Bar, Figure, Judge, measure, percentile_95
from benchmarks.site import BARE, OURS, Bench, Crew
from benchmarks.small_jobs import IDS, INTERVIEWS, JOBS, drain_rate, jobs_on

_SIZES = (1, 10, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 100_000, 1_000_000)
_QUICK_SIZES = (250, 1_000, 5_000)  # of the quick form
_ROWS = 200_000  # of a sample, in as many jobs as that takes
_QUICK_ROWS = 100_000  # likewise, of the quick form
_MOST_JOBS = 10_000  # of a sample
_COPIED = 100  # IDs of the smallest jobs that are compared with COPY and the bare task
_MOST_BARE = 10_000  # IDs of the largest jobs of the bare task
_MOST_TOGETHER = 100_000  # IDs of the largest jobs of which several are queued

_SHARES = (0.25, 0.5, 0.75, 0.9)  # of the rate at which ours empties a queue
_BARE_SHARES = (0.25, 0.5, 0.9)  # of the bare task's, which is less than a quarter of ours
_SECONDS = 4.0  # of sending at one rate
_TICK = 0.002  # seconds: what falls due in one is sent together, at its beginning
_SOON = 0.05  # seconds from all being prepared to the first tick


def sizes(bench: Bench) -> list[Figure]:
    """Rows a second from enqueue to result, in jobs of 1 to 1,000,000 ids, the limit raised.

    All jobs are queued before the first is executed, 10,000 of them or 200,000 rows, by two pool
    processes; one job of 1,000,000 IDs includes its enqueuing. COPY has one connection and a
    transaction for each job. The quick form has three sizes between, and 100,000 rows.
    """
    rows = bench.size(_QUICK_ROWS if bench.quick else _ROWS)
    interviews = rows if bench.quick else bench.size(_SIZES[-1])
    measured = [ids for ids in (_QUICK_SIZES if bench.quick else _SIZES) if ids <= interviews]
    copied = [ids for ids in measured if ids >= _COPIED]
    bare = [ids for ids in copied if ids <= _MOST_BARE]
    with (
        bench.database(interviews) as database,
        bench.crew(OURS, database, GRANT_MAX_INTERVIEW_IDS=interviews) as ours,
        bench.crew(BARE, database) as task,
    ):

        def count(ids: int) -> int:
            return max(1, min(bench.size(_MOST_JOBS), rows // ids))

        def drain(crew: Crew, ids: int) -> Mapping[str, float]:
            crew.reset()
            jobs = jobs_on(database.interviews, count(ids), ids)
            seconds = crew.drain(jobs) if len(jobs) > 1 else crew.time_one(jobs[0])
            crew.settle()
            return {_sized(crew.contender.name, ids): len(jobs) * ids / seconds}

        def copy(ids: int) -> Mapping[str, float]:
            database.reset()
            jobs = jobs_on(database.interviews, count(ids), ids)
            seconds = sum(
                copy_grants(database.url, [job.user_id], list(job.interview_ids)) for job in jobs
            )
            database.expect(len(jobs) * ids)
            return {_sized(COPY, ids): len(jobs) * ids / seconds}

        trials = [
            *(partial(drain, ours, ids) for ids in measured),
            *(partial(copy, ids) for ids in copied),
            *(partial(drain, task, ids) for ids in bare),
        ]
        judge = Judge(measure(trials, bench.runs), "rows/s")
    return [
        *(judge.figure(_sized(COPY, ids)) for ids in copied),
        *(judge.figure(_sized(BARE.name, ids), _sized(COPY, ids)) for ids in bare),
        *(
            judge.figure(_sized(OURS.name, ids), _sized(COPY, ids), Bar(0.9, at_least=True))
            if ids in copied
            else judge.figure(_sized(OURS.name, ids))
            for ids in measured
        ),
        *(
            judge.named(
                f"{_sized(OURS.name, ids)}, beside {fewer:,} ids",
                _sized(OURS.name, ids),
                _sized(OURS.name, fewer),
                Bar(0.9, at_least=True),
            )
            for fewer, ids in pairwise(measured)
            if _COPIED <= ids <= _MOST_TOGETHER
        ),
        *(_beside_bare(judge, ids) for ids in bare),
    ]


def _beside_bare(judge: Judge, ids: int) -> Figure:
    """Twice the bare task's pace is required until COPY's is reached, which is the limit."""
    ours, bare = _sized(OURS.name, ids), _sized(BARE.name, ids)
    ratio = judge.figure(ours, _sized(COPY, ids)).ratio
    is_at_limit = ratio is not None and ratio >= 1
    name = f"{ours}, {'at' if is_at_limit else 'below'} COPY's pace"
    return judge.named(name, ours, bare, None if is_at_limit else Bar(2, at_least=True))


def load(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids sent at random moments, at rising rates: from enqueue to result.

    The rates are shares of those at which a queue is emptied, measured first; the bare task has
    only rates below its own. Nothing waits for an answer before it sends: what a worker is slow at
    piles up. To disturb least, messages are made beforehand and moved within Redis, a bundle every
    2 ms, and a job's time is from the moment that it was due, sent late or not.

    When a result was stored is read afterwards from the moment at which Redis will forget it: to a
    millisecond, and nothing happens for it meanwhile. A listener to the results' channels would
    take time from the workers, and a result's `date_done` is from before it was stored, in a batch
    from before any of them was.
    """
    seconds = _SECONDS * bench.scale
    with ExitStack() as open_crews:
        database = open_crews.enter_context(bench.database(INTERVIEWS))
        ours, bare = (open_crews.enter_context(bench.crew(one, database)) for one in (OURS, BARE))
        limits = {crew.contender.name: _limit(crew, bench.size(JOBS)) for crew in (ours, bare)}

        def sample(crew: Crew, rate: int) -> Mapping[str, float]:
            crew.reset()
            taken = _offer(crew, max(1, round(rate * seconds)), seconds)
            crew.settle()
            names = _loaded(crew.contender.name, rate)
            return dict(zip(names, (statistics.median(taken), percentile_95(taken)), strict=True))

        low = [max(1, round(share * limits[BARE.name])) for share in _BARE_SHARES]
        high = [max(1, round(share * limits[OURS.name])) for share in _SHARES]
        high = [rate for rate in high if rate > low[-1]]
        trials = [
            *(partial(sample, crew, rate) for rate in low for crew in (bare, ours)),
            *(partial(sample, ours, rate) for rate in high),
        ]
        judge = Judge(measure(trials, bench.runs), "ms")
    figures = [
        Figure(f"{name}: above this its queue only grows", "jobs/s", (limit,))
        for name, limit in limits.items()
    ]
    for rate in low:
        for bare_name, ours_name in zip(
            _loaded(BARE.name, rate), _loaded(OURS.name, rate), strict=True
        ):
            figures += [judge.figure(bare_name), judge.figure(ours_name, bare_name, Bar(1.1))]
    figures += [judge.figure(name) for rate in high for name in _loaded(OURS.name, rate)]
    return figures


def _limit(crew: Crew, jobs: int) -> float:
    """Jobs a second when all stand in the queue; the first time is for warming up."""
    drain_rate(crew, jobs)
    return drain_rate(crew, jobs)


def _offer(crew: Crew, jobs: int, seconds: float) -> list[float]:
    """Send jobs at random moments, as users do who know nothing of each other.

    Returns:
        Milliseconds from when each was due to its result.
    """
    chance = random.Random(jobs)  # noqa: S311 - the same moments for all contenders
    due = Counter(chance.randrange(max(1, round(seconds / _TICK))) for _ in range(jobs))
    prepared = jobs_on(crew.database.interviews, jobs, IDS)
    crew.put_by(prepared)
    crew.hold_back()
    began = time.time() + _SOON
    sent: list[float] = []
    for tick in sorted(due):
        at = began + tick * _TICK
        time.sleep(max(0.0, at - time.time()))
        crew.release_first(due[tick])
        sent += [at] * due[tick]
    job_ids = [job.job_id for job in prepared]
    crew.collect(job_ids)
    return [1_000 * (stored - at) for at, stored in zip(sent, crew.stored_at(job_ids), strict=True)]


def _sized(name: str, ids: int) -> str:
    return f"{name}, {ids:,} {'id' if ids == 1 else 'ids'}"


def _loaded(name: str, rate: int) -> tuple[str, str]:
    return f"{name} at {rate:,} jobs/s, median", f"{name} at {rate:,} jobs/s, 95th percentile"
