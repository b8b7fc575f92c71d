"""The private attributes of Celery, kombu, billiard and redis-py on which the worker relies.

Their next release may rename any of them. The check at start-up names what is missing, so that an
upgrade fails at once and not at the first job that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

from worker.startup import StartupError


class Seam(NamedTuple):
    """One private attribute.

    Attributes:
        package: The distribution that has it.
        owner: Its module, or module and class separated by a colon; parentheses after the class
            denote an instance.
        name: Its name.
        reason: Why no public interface serves.
    """

    package: str
    owner: str
    name: str
    reason: str


SEAMS: Sequence[Seam] = (
    Seam(
        "celery",
        "celery._state",
        "_task_stack",
        "Log formatters read the current task from it; only Task.__call__ and the tracer push to"
        " it, and both execute a single job.",
    ),
    *(
        Seam(
            "celery",
            "celery.app.trace",
            name,
            "The tracer's log lines, which log processors parse; the tracer executes a single job.",
        )
        for name in ("info", "log_policy_expected", "LOG_RECEIVED", "LOG_SUCCESS")
    ),
    Seam(
        "celery",
        "celery.apps.worker",
        "safe_say",
        "The signal handlers print through it; with LOG_FORMAT=json every line must be JSON.",
    ),
    Seam(
        "celery",
        "celery.backends.redis:RedisBackend",
        "_get_pool",
        "No setting passes TCP keepalive and TLS options to the result backend's connections.",
    ),
    Seam(
        "celery",
        "celery.backends.redis:RedisBackend",
        "_get_result_meta",
        "The fields of a stored result; the public store_result writes one result at a time and"
        " replaces final ones.",
    ),
    Seam(
        "celery",
        "celery.backends.redis:RedisBackend",
        "_store_result",
        "Celery's own canvas stores through it; it must not replace a final result.",
    ),
    *(
        Seam(
            "celery",
            "celery.worker.consumer:Consumer",
            name,
            "Called on a lost connection, a cold shutdown or a buffered event; no bootstep replaces"
            " what Celery does there to running jobs.",
        )
        for name in (
            *("on_connection_error_after_connected", "ensure_connected"),
            *("cancel_active_requests", "on_send_event_buffered"),
        )
    ),
    Seam(
        "kombu",
        "kombu:Connection",
        "_info",
        "Connection.as_uri reads the password from info(), which the worker masks.",
    ),
    *(
        Seam(
            "kombu",
            "kombu.transport.redis:Channel",
            name,
            "The virtual transport's hooks for publishing and declaring; a full Redis must not end"
            " the worker, nor a callback reach a reserved queue.",
        )
        for name in ("_put", "_put_fanout", "_queue_bind", "_size")
    ),
    Seam(
        "kombu",
        "kombu.transport.redis:QoS",
        "restore_visible",
        "Restores unacknowledged messages of other workers on the same Redis.",
    ),
    *(
        Seam(
            "billiard",
            "billiard.pool:ApplyResult",
            name,
            "The pool process to which a batch was written and that has not accepted it.",
        )
        for name in ("_write_to", "_scheduled_for")
    ),
    Seam(
        "redis",
        "redis.connection:Connection()",
        "_sock",
        "The event loop polls a connection's socket.",
    ),
)


def check_seams(seams: Sequence[Seam] = SEAMS) -> None:
    """Verify that the installed packages have the private attributes.

    Args:
        seams: The attributes.

    Raises:
        StartupError: if one is missing.
    """
    for seam in seams:
        module, _, name = seam.owner.partition(":")
        try:
            owner: Any = import_module(module)
            if name:
                owner = getattr(owner, name.removesuffix("()"))
            if name.endswith("()"):
                owner = owner()
            getattr(owner, seam.name)
        except (ImportError, AttributeError):
            raise StartupError(
                f"got {seam.package} {version(seam.package)} without {seam.owner}.{seam.name}, "
                "expected a version that requirements.lock pins."
            ) from None
