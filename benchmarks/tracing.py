"""The parts `tracing` and `metrics`: what OpenTelemetry, Sentry and metrics cost a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import psutil
from interview_access.contracts import GRANT_ACCESS, QUEUE

from benchmarks.bench import Bench
from benchmarks.contenders import Contender
from benchmarks.deployment import Deployment
from benchmarks.idle import cpu_seconds
from benchmarks.measuring import Comparison, Figure, measure
from benchmarks.small_jobs import INTERVIEWS, JOBS, drain_rate

_OFF = Contender("nothing attached", "worker", QUEUE, GRANT_ACCESS)
_ON = (
    Contender("OpenTelemetry", "benchmarks.traced.spans", QUEUE, GRANT_ACCESS),
    Contender("Sentry with all traces", "benchmarks.traced.transactions", QUEUE, GRANT_ACCESS),
)


_METRICS = (Contender("metrics", "benchmarks.traced.metrics", QUEUE, GRANT_ACCESS),)


def tracing(bench: Bench) -> list[Figure]:
    """A queue of jobs of 20 ids: the rate and the worker's CPU time with each library."""
    return _compared(bench, _ON)


def metrics(bench: Bench) -> list[Figure]:
    """A queue of jobs of 20 ids: the rate and the worker's CPU time with metrics."""
    return _compared(bench, _METRICS)


def _compared(bench: Bench, contenders: Sequence[Contender]) -> list[Figure]:
    jobs = bench.size(JOBS)
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(INTERVIEWS))

        def sample(deployment: Deployment) -> Mapping[str, float]:
            main = psutil.Process(deployment.service.pid)
            processes = [main, *main.children(recursive=True)]
            before = cpu_seconds(processes)
            rate, name = drain_rate(deployment, jobs), deployment.contender.name
            cpu = cpu_seconds(processes) - before
            return {name: rate, _cpu(name): 1_000 * cpu / jobs}

        deployments = [
            stack.enter_context(bench.deploy(one, database)) for one in (_OFF, *contenders)
        ]
        samples = measure([partial(sample, one) for one in deployments], bench.runs)
    rates, times = Comparison(samples, "jobs/s"), Comparison(samples, "ms/job")
    return [
        rates.figure(_OFF.name),
        *(rates.figure(one.name, _OFF.name) for one in contenders),
        times.figure(_cpu(_OFF.name)),
        *(times.figure(_cpu(one.name), _cpu(_OFF.name)) for one in contenders),
    ]


def _cpu(name: str) -> str:
    return f"CPU, {name}"
