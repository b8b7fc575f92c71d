"""Options of the command line and settings of Celery that the guarantees exclude."""

from __future__ import annotations

from typing import Any

from celery.concurrency.prefork import TaskPool

from worker.startup import StartupError

_REQUIRED = {
    "task_acks_late": True,
    "worker_consumer": "worker.execution.consumer:JobConsumer",
    "result_serializer": "json",
}
"""Celery's settings with their only allowed values."""


def check_options(worker: Any) -> None:
    """Refuse options of the command line and settings of Celery that break the guarantees.

    Args:
        worker: Celery's, before its pool exists.

    Raises:
        StartupError: if there is one.
    """
    conf = worker.app.conf
    if not issubclass(worker.pool_cls, TaskPool):
        pool = worker.pool_cls.__module__.rpartition(".")[2]
        raise StartupError(f"got the pool {pool} (-P, --pool), expected prefork.")
    for name, expected in _REQUIRED.items():
        if conf[name] != expected:
            raise StartupError(f"got {name} = {conf[name]!r}, expected {expected!r}.")
    for name, value, option, alternative in (
        ("soft time limit", worker.soft_time_limit, "--soft-time-limit", "only --time-limit"),
        ("autoscale", worker.autoscale, "--autoscale", "a number of processes (-c)"),
    ):
        if value:
            raise StartupError(f"got the {name} {value} ({option}), expected {alternative}.")
    if not worker.app.limits.seconds:
        raise StartupError("got no time limit, expected task_time_limit in seconds.")
    known = {queue.name for queue in conf.task_queues}
    consumed = set(worker.app.amqp.queues.consume_from)
    if not consumed or not consumed <= known:
        got = ", ".join(sorted(consumed - known)) or "no queue"
        raise StartupError(f"got {got} (-Q, --queues), expected {', '.join(sorted(known))}.")
