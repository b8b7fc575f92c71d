"""The parts `sizes` and `load`: rows a second by job size, latency by load."""

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
from benchmarks.bench import Bench
from benchmarks.contenders import BARE, OURS
from benchmarks.deployment import Deployment
from benchmarks.large_jobs import COPY
from benchmarks.measuring import Bar, Comparison, Figure, measure, percentile_95
from benchmarks.small_jobs import IDS, INTERVIEWS, JOBS, drain_rate, jobs_on

_SIZES = (1, 10, 100, 250, 500, 1_000, 2_000, 5_000, 10_000, 100_000, 1_000_000)
_QUICK_SIZES = (250, 1_000, 5_000)  # with --quick
_ROWS = 200_000  # of all jobs of a sample
_QUICK_ROWS = 100_000  # the same with --quick
_MOST_JOBS = 10_000  # in a sample
_COPIED = 100  # smallest job size that is compared with COPY and the bare task
_MOST_BARE = 10_000  # largest job size of the bare task
_MOST_TOGETHER = 100_000  # largest job size of which several jobs are queued

_SHARES = (0.25, 0.5, 0.75, 0.9)  # of this worker's highest rate
_BARE_SHARES = (0.25, 0.5, 0.9)  # of the bare task's highest rate, which is far lower
_SECONDS = 4.0  # duration of one rate
_TICK = 0.002  # seconds; the jobs of a tick are sent together, at its beginning
_SOON = 0.05  # seconds before the first tick


def sizes(bench: Bench) -> list[Figure]:
    """Rows a second from enqueue to result, in jobs of 1 to 1,000,000 ids, with a higher limit.

    All jobs, 10,000 or 200,000 rows, are queued before two pool processes execute the first; the
    time of a single job includes its enqueuing. COPY has one connection and a transaction for
    each job. The quick form has three sizes and 100,000 rows.
    """
    rows = bench.size(_QUICK_ROWS if bench.quick else _ROWS)
    interviews = rows if bench.quick else bench.size(_SIZES[-1])
    measured = [ids for ids in (_QUICK_SIZES if bench.quick else _SIZES) if ids <= interviews]
    copied = [ids for ids in measured if ids >= _COPIED]
    bare = [ids for ids in copied if ids <= _MOST_BARE]
    with (
        bench.database(interviews) as database,
        bench.deploy(OURS, database, GRANT_MAX_INTERVIEW_IDS=interviews) as ours,
        bench.deploy(BARE, database) as task,
    ):

        def count(ids: int) -> int:
            return max(1, min(bench.size(_MOST_JOBS), rows // ids))

        def drain(deployment: Deployment, ids: int) -> Mapping[str, float]:
            deployment.reset()
            jobs = jobs_on(database.interviews, count(ids), ids)
            seconds = deployment.drain(jobs) if len(jobs) > 1 else deployment.time_one(jobs[0])
            deployment.settle()
            return {_sized(deployment.contender.name, ids): len(jobs) * ids / seconds}

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
        comparison = Comparison(measure(trials, bench.runs), "rows/s")
    return [
        *(comparison.figure(_sized(COPY, ids)) for ids in copied),
        *(comparison.figure(_sized(BARE.name, ids), _sized(COPY, ids)) for ids in bare),
        *(
            comparison.figure(_sized(OURS.name, ids), _sized(COPY, ids), Bar(0.9, at_least=True))
            if ids in copied
            else comparison.figure(_sized(OURS.name, ids))
            for ids in measured
        ),
        *(
            comparison.named(
                f"{_sized(OURS.name, ids)}, beside {fewer:,} ids",
                _sized(OURS.name, ids),
                _sized(OURS.name, fewer),
                Bar(0.9, at_least=True),
            )
            for fewer, ids in pairwise(measured)
            if _COPIED <= ids <= _MOST_TOGETHER
        ),
        *(_compared_with_bare(comparison, ids) for ids in bare),
    ]


def _compared_with_bare(comparison: Comparison, ids: int) -> Figure:
    """Compare with the bare task: the bar is twice its rate, unless COPY's rate is reached."""
    ours, bare = _sized(OURS.name, ids), _sized(BARE.name, ids)
    ratio = comparison.figure(ours, _sized(COPY, ids)).ratio
    is_at_limit = ratio is not None and ratio >= 1
    name = f"{ours}, {'at' if is_at_limit else 'below'} COPY's pace"
    return comparison.named(name, ours, bare, None if is_at_limit else Bar(2, at_least=True))


def load(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids sent at random times, at rising rates: latency from enqueue to result.

    The rates are shares of the highest rates, which are measured first; the bare task has only
    rates below its own. The load is open: producers do not wait for results. Messages are encoded
    beforehand and moved within Redis every 2 ms. A job's latency begins when it was due, also if
    it was sent late.

    The time at which a result was stored is read afterwards from its expiry, to a millisecond. A
    subscriber would take CPU time from the workers, and a result's `date_done` is earlier than
    its storing.
    """
    seconds = _SECONDS * bench.scale
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(INTERVIEWS))
        ours, bare = (stack.enter_context(bench.deploy(one, database)) for one in (OURS, BARE))
        limits = {
            deployment.contender.name: _limit(deployment, bench.size(JOBS))
            for deployment in (ours, bare)
        }

        def sample(deployment: Deployment, rate: int) -> Mapping[str, float]:
            deployment.reset()
            taken = _offer(deployment, max(1, round(rate * seconds)), seconds)
            deployment.settle()
            names = _loaded(deployment.contender.name, rate)
            return dict(zip(names, (statistics.median(taken), percentile_95(taken)), strict=True))

        low = [max(1, round(share * limits[BARE.name])) for share in _BARE_SHARES]
        high = [max(1, round(share * limits[OURS.name])) for share in _SHARES]
        high = [rate for rate in high if rate > low[-1]]
        trials = [
            *(partial(sample, deployment, rate) for rate in low for deployment in (bare, ours)),
            *(partial(sample, ours, rate) for rate in high),
        ]
        comparison = Comparison(measure(trials, bench.runs), "ms")
    figures = [
        Figure(f"{name}: above this its queue only grows", "jobs/s", (limit,))
        for name, limit in limits.items()
    ]
    for rate in low:
        for bare_name, ours_name in zip(
            _loaded(BARE.name, rate), _loaded(OURS.name, rate), strict=True
        ):
            figures += [
                comparison.figure(bare_name),
                comparison.figure(ours_name, bare_name, Bar(1.1)),
            ]
    figures += [comparison.figure(name) for rate in high for name in _loaded(OURS.name, rate)]
    return figures


def _limit(deployment: Deployment, jobs: int) -> float:
    """Return the highest rate, in jobs a second, of the second run; the first one warms up."""
    drain_rate(deployment, jobs)
    return drain_rate(deployment, jobs)


def _offer(deployment: Deployment, jobs: int, seconds: float) -> list[float]:
    """Send jobs at random times, as independent users do.

    Returns:
        The latency of each job in milliseconds, from the time at which it was due.
    """
    chance = random.Random(jobs)  # noqa: S311 - the same times for all contenders
    due = Counter(chance.randrange(max(1, round(seconds / _TICK))) for _ in range(jobs))
    prepared = jobs_on(deployment.database.interviews, jobs, IDS)
    deployment.stage(prepared)
    deployment.hold()
    began = time.time() + _SOON
    sent: list[float] = []
    for tick in sorted(due):
        at = began + tick * _TICK
        time.sleep(max(0.0, at - time.time()))
        deployment.release_next(due[tick])
        sent += [at] * due[tick]
    job_ids = [job.job_id for job in prepared]
    deployment.collect(job_ids)
    return [
        1_000 * (stored - at)
        for at, stored in zip(sent, deployment.stored_at(job_ids), strict=True)
    ]


def _sized(name: str, ids: int) -> str:
    return f"{name}, {ids:,} {'id' if ids == 1 else 'ids'}"


def _loaded(name: str, rate: int) -> tuple[str, str]:
    return f"{name} at {rate:,} jobs/s, median", f"{name} at {rate:,} jobs/s, 95th percentile"
