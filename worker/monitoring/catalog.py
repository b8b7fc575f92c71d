"""The metrics of a worker: names, types, labels, buckets and help texts.

`make metrics-table` writes the table in docs/metrics.md from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""From one small job to the time limit of a job."""


class Metric(NamedTuple):
    """One metric.

    Attributes:
        name: Its name, that of a counter with ``_total``.
        type: Prometheus' type.
        help: What it measures.
        labels: Names of its labels.
        buckets: Upper bounds of a histogram's buckets.
    """

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Sequence[str] = ()
    buckets: Sequence[float] = ()


JOBS = Metric(
    "interview_access_jobs_total",
    "counter",
    "Jobs that ended. The outcome is succeeded, failed, cancelled, expired, or refused (the job ID "
    "belongs to another request); error is the class of the error, empty for succeeded.",
    ("task", "outcome", "error"),
)
REQUESTED = Metric(
    "interview_access_grants_requested_total",
    "counter",
    "Grants that succeeded jobs requested: repeated, already granted and created ones.",
    ("task",),
)
REPEATED = Metric(
    "interview_access_grants_repeated_total",
    "counter",
    "Grants that succeeded jobs requested more than once.",
    ("task",),
)
ALREADY_GRANTED = Metric(
    "interview_access_grants_already_granted_total",
    "counter",
    "Requested grants that existed.",
    ("task",),
)
CREATED = Metric(
    "interview_access_grants_created_total",
    "counter",
    "Grants that jobs created.",
    ("task",),
)
REPEATED_DELIVERIES = Metric(
    "interview_access_repeated_deliveries_total",
    "counter",
    "Deliveries of jobs that had ended before: duplicates, jobs that were cancelled while they "
    "waited, and jobs whose result or callbacks could not be sent at first.",
    ("task",),
)
RETRIES = Metric(
    "interview_access_job_retries_total",
    "counter",
    "Executions that will be retried, by class of PostgreSQL's error code (its first two "
    "characters), none without a reply of the server, or other.",
    ("task", "error_class"),
)
DEAD_LETTERED = Metric(
    "interview_access_dead_lettered_jobs_total",
    "counter",
    "Messages that this worker moved to the dead letters.",
    ("task",),
)
DEAD_DROPPED = Metric(
    "interview_access_dead_letters_dropped_total",
    "counter",
    "Dead letters that this worker dropped, the oldest first. The reason is age "
    "(GRANT_DEAD_LETTER_DAYS) or bytes (all of them took more than GRANT_DEAD_LETTER_BYTES).",
    ("reason",),
)
QUEUE_SECONDS = Metric(
    "interview_access_job_queue_seconds",
    "histogram",
    "Time from sending, or from the ETA, to the first execution, of messages with the header "
    "enqueued_at. It compares the clocks of producer and worker.",
    ("task",),
    (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3_600, 14_400),
)
BATCH_SECONDS = Metric(
    "interview_access_batch_execution_seconds",
    "histogram",
    "Time that a pool process takes for a batch of jobs.",
    buckets=_SECONDS,
)
TRANSACTION_SECONDS = Metric(
    "interview_access_batch_transaction_seconds",
    "histogram",
    "The part of this time in which PostgreSQL settles the jobs, one by one if the batch's "
    "transaction fails.",
    buckets=_SECONDS,
)
BATCH_JOBS = Metric(
    "interview_access_batch_jobs",
    "histogram",
    "Jobs of a batch.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000),
)
JOB_GRANTS = Metric(
    "interview_access_job_requested_grants",
    "histogram",
    "Grants that a succeeded job requested.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 1_000, 10_000, 100_000, 1_000_000),
)
POOL_LOSSES = Metric(
    "interview_access_pool_process_losses_total",
    "counter",
    "Pool processes that ended during a batch: crash (out of memory, say), time_limit, revoked (by "
    "an operator) or shutdown.",
    ("reason",),
)
POOL_PROCESSES = Metric(
    "interview_access_pool_processes", "gauge", "Pool processes, busy or idle.", ("state",)
)
WORKER_CLAIMED = Metric(
    "interview_access_worker_claimed_jobs", "gauge", "Messages that this worker has claimed."
)
WORKER_CLAIMED_AGE = Metric(
    "interview_access_worker_claimed_oldest_age_seconds",
    "gauge",
    "Time since this worker claimed the oldest of them; 0 without one.",
)
LEASE_LOSSES = Metric(
    "interview_access_lease_losses_total",
    "counter",
    "Times that this worker's lease expired, and others requeued its jobs.",
)
LEASE_TAKEOVERS = Metric(
    "interview_access_lease_takeovers_total",
    "counter",
    "Expired leases of other workers whose jobs this worker requeued.",
)
BREAKER = Metric(
    "interview_access_circuit_breaker_state",
    "gauge",
    "1 for the state of the circuit breaker: closed, open (no job is claimed) or probing (one is).",
    ("state",),
)
LIVE = Metric("interview_access_worker_live", "gauge", "1 if /healthz replies by 200.")
READY = Metric("interview_access_worker_ready", "gauge", "1 if /readyz replies by 200.")
MAIN_THREAD_AGE = Metric(
    "interview_access_worker_main_thread_age_seconds",
    "gauge",
    "Time since the main thread was in its event loop or tried to reconnect to Redis.",
)
SOURCE_UP = Metric(
    "interview_access_source_up",
    "gauge",
    "1 if the metrics below could be read from redis, postgresql; without them they are missing.",
    ("source",),
)
RETENTION = Metric(
    "interview_access_retention_seconds",
    "gauge",
    "GRANT_RETENTION_DAYS of this worker; missing if it is not set.",
)
DEAD_LIMIT = Metric(
    "interview_access_dead_letters_limit_bytes",
    "gauge",
    "GRANT_DEAD_LETTER_BYTES of this worker.",
)
LANE_JOBS = Metric(
    "interview_access_queue_jobs", "gauge", "Messages that wait in a lane of the queue.", ("lane",)
)
LANE_AGE = Metric(
    "interview_access_queue_oldest_age_seconds",
    "gauge",
    "Time since the next job of a lane was sent; 0 in an empty lane, missing if its producer did "
    "not announce it.",
    ("lane",),
)
DELAYED = Metric(
    "interview_access_delayed_jobs", "gauge", "Messages that wait for an ETA or a retry."
)
DELAYED_OVERDUE = Metric(
    "interview_access_delayed_overdue_seconds",
    "gauge",
    "Time since the first of them was due; 0 if none is.",
)
CLAIMED = Metric(
    "interview_access_claimed_jobs", "gauge", "Messages that all workers have claimed."
)
SESSIONS = Metric(
    "interview_access_worker_sessions",
    "gauge",
    "Workers with a lease. That of a dead worker counts until it expires.",
)
DEAD = Metric("interview_access_dead_letters", "gauge", "Dead letters.")
DEAD_BYTES = Metric(
    "interview_access_dead_letters_bytes",
    "gauge",
    "Memory of the dead letters, as Redis estimates it from the oldest ones; 0 if unknown.",
)
DEAD_AGE = Metric(
    "interview_access_dead_letters_oldest_age_seconds",
    "gauge",
    "Age of the oldest dead letter; 0 without one.",
)
PAUSED = Metric("interview_access_queue_paused", "gauge", "1 if an operator has paused the queue.")
PAUSE_INFO = Metric(
    "interview_access_queue_pause_info",
    "gauge",
    "1 while the queue is paused: who paused it, and why.",
    ("by", "reason"),
)
PAUSED_AT = Metric(
    "interview_access_queue_pause_timestamp_seconds",
    "gauge",
    "When the queue was paused; missing if it is not.",
)
OUTBOX = Metric(
    "interview_access_outbox_requests",
    "gauge",
    "Rows of the outbox: unsent, or sent and not known to be finished.",
    ("state",),
)
OUTBOX_AGE = Metric(
    "interview_access_outbox_oldest_age_seconds",
    "gauge",
    "Age of the oldest unsent request; 0 without one.",
)
LEDGER_ROWS = Metric(
    "interview_access_ledger_rows", "gauge", "Rows of the ledger, as PostgreSQL estimates them."
)
LEDGER_BYTES = Metric(
    "interview_access_ledger_bytes", "gauge", "Size of the ledger on disk, with its indexes."
)
LEDGER_AGE = Metric(
    "interview_access_ledger_oldest_age_seconds",
    "gauge",
    "Age of the oldest row of the ledger; 0 without one.",
)

OF_JOBS = (
    *(JOBS, REQUESTED, REPEATED, ALREADY_GRANTED, CREATED, REPEATED_DELIVERIES, RETRIES),
    *(DEAD_LETTERED, QUEUE_SECONDS, BATCH_SECONDS, TRANSACTION_SECONDS, BATCH_JOBS, JOB_GRANTS),
)
OF_WORKER = (
    *(POOL_LOSSES, POOL_PROCESSES, WORKER_CLAIMED, WORKER_CLAIMED_AGE, LEASE_LOSSES),
    *(LEASE_TAKEOVERS, DEAD_DROPPED, BREAKER, LIVE, READY, MAIN_THREAD_AGE, RETENTION, DEAD_LIMIT),
    SOURCE_UP,
)
OF_REDIS = (
    *(LANE_JOBS, LANE_AGE, DELAYED, DELAYED_OVERDUE, CLAIMED, SESSIONS, DEAD, DEAD_BYTES),
    *(DEAD_AGE, PAUSED, PAUSE_INFO, PAUSED_AT),
)
OF_POSTGRESQL = (OUTBOX, OUTBOX_AGE, LEDGER_ROWS, LEDGER_BYTES, LEDGER_AGE)

_GROUPS = {
    "Jobs of this worker": OF_JOBS,
    "This worker": OF_WORKER,
    "The queue in Redis, the same at every worker": OF_REDIS,
    "Outbox and ledger in PostgreSQL, the same at every worker": OF_POSTGRESQL,
}
_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_BEGIN = "<!-- generated by `make metrics-table` -->\n"


def with_table(page: str) -> str:
    """Replace what follows the marker on a page by the tables of all metrics.

    Args:
        page: The text of docs/metrics.md.
    """
    lines = [page.partition(_BEGIN)[0] + _BEGIN.rstrip()]
    for title, metrics in _GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| metric | type | labels | meaning |",
            "|---|---|---|---|",
        ]
        for one in metrics:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            bounds = ", ".join(f"{bound:,}" for bound in one.buckets)
            text = f"{one.help} Buckets: {bounds}." if bounds else one.help
            lines.append(f"| `{one.name}` | {one.type} | {labels} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    _PAGE.write_text(with_table(_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
