"""The part `tracing`: what OpenTelemetry and Sentry cost a worker."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from interview_access.contracts import GRANT_ACCESS, QUEUE

from benchmarks.bench import Bench
from benchmarks.contenders import Contender
from benchmarks.deployment import Deployment
from benchmarks.measuring import Comparison, Figure, measure
from benchmarks.small_jobs import INTERVIEWS, JOBS, drain_rate

_OFF = Contender("nothing attached", "worker", QUEUE, GRANT_ACCESS)
_ON = (
    Contender("OpenTelemetry", "benchmarks.traced.spans", QUEUE, GRANT_ACCESS),
    Contender("Sentry with all traces", "benchmarks.traced.transactions", QUEUE, GRANT_ACCESS),
)


def tracing(bench: Bench) -> list[Figure]:
    """A queue of jobs of 20 ids: jobs a second with each library, without a collector."""
    jobs = bench.size(JOBS)
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(INTERVIEWS))

        def rate(deployment: Deployment) -> Mapping[str, float]:
            return {deployment.contender.name: drain_rate(deployment, jobs)}

        deployments = [stack.enter_context(bench.deploy(one, database)) for one in (_OFF, *_ON)]
        comparison = Comparison(
            measure([partial(rate, one) for one in deployments], bench.runs), "jobs/s"
        )
    return [
        comparison.figure(_OFF.name),
        *(comparison.figure(one.name, _OFF.name) for one in _ON),
    ]
