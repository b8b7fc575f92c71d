"""The control service: executes control requests, which have a queue of their own.

It runs in a thread of the main process and replies while every pool process is busy. A control
request may be lost: a client without a reply in time sends it again. It also states the worker's
limits, which clients check before they send.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from celery import Celery, states
from celery.utils.log import get_logger
from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    JOB_ID_RULE,
    JOB_STATUS,
    LIMITS_KEY,
    REPLY_BYTES,
    JobStatus,
    WorkerLimits,
    describe,
    is_job_id,
    reply_key,
    result_key,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    StorageUnavailableException,
    shortened,
)
from interview_access.stored_errors import to_result
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from storage.errors import StorageError
from storage.interface import JobStorage
from worker.broker.claims import PREFIX
from worker.broker.queue_wait import QueueWait, QueueWaitRefusedError
from worker.broker.scripts import script
from worker.services.background import BackgroundService
from worker.services.job_status import JobStatusService

logger = get_logger(__name__)

_WAIT_SECONDS = 10.0  # for a request, in one command
_LOST_SECONDS = _WAIT_SECONDS + 3.0  # without a reply to a wait: the connection is lost
_POLL_SECONDS = 0.5  # between two polls of the queue while Redis refuses the wait
_REQUEST_BYTES = 65_536
_LIMITS_SECONDS = 600  # retention of the stated limits, which are stated twice as often
_REPLY_SECONDS = 60
_OUTSTANDING_BYTES = 8 * 1024 * 1024  # of all replies in Redis
_REPLIES = f"{PREFIX}replies"
_CUT_FIELDS = ("unknown_interview_ids", "malformed_interview_ids", "created_by_user")


class ControlService(BackgroundService):
    """Executes control requests, one at a time.

    Attributes:
        on_cancelled: Called with the task of each job whose outcome a cancellation records.
    """

    def __init__(
        self, app: Celery, storage: Callable[[], JobStorage], limits: WorkerLimits
    ) -> None:
        """Connect to nothing before :meth:`start`.

        Args:
            app: Connects to the queue.
            storage: Returns the storage with the ledger.
            limits: The limits to state.
        """
        super().__init__(app)
        self._wait: QueueWait | None = None
        self._may_have_request = True
        self._is_refused = False
        self._state_limits_at = 0.0
        self.on_cancelled: Callable[[str], object] = lambda _: None
        self._jobs = JobStatusService(
            storage,
            app.backend,
            on_cancelled=lambda task: self.on_cancelled(task),  # noqa: PLW0108 - the metrics set it later
        )
        self._limits = limits.model_dump_json()
        self._operations: dict[str, Callable[[Redis, str], JobStatus]] = {
            JOB_STATUS: self._jobs.status,
            CANCEL_JOB: self._jobs.cancel,
        }

    def run_once(self, redis: Redis) -> None:
        """Execute the next request, or wait for one."""
        if not self._may_have_request:
            self._may_have_request = self._wait_for_request(redis)
            return
        message: Any = redis.register_script(script("take_control_request"))(
            [CONTROL_QUEUE], [_REQUEST_BYTES]
        )
        if message is None:  # another worker may have taken it
            self._may_have_request = False
            return
        try:
            request = _Request.read(message)
        except Exception as error:  # noqa: BLE001 - the queue may contain any bytes
            logger.warning("control request cannot be read: error=%s", _brief(error))
            return
        if request.expires_at and request.expires_at <= datetime.now(UTC):
            return
        try:
            self._answer(redis, request)
        except (RedisError, OSError):
            raise
        except StorageError as error:
            logger.warning(
                "control request not answered: request_id=%s error=%s", request.id, _brief(error)
            )
        except Exception:
            logger.exception("control request failed: request_id=%s", request.id)

    def _wait_for_request(self, redis: Redis) -> bool:
        """Wait for a request. Returns whether the queue may have one.

        Raises:
            RedisConnectionError: if the connection is lost.
        """
        if time.monotonic() >= self._state_limits_at:
            self._state_limits_at = time.monotonic() + _LIMITS_SECONDS / 2
            with suppress(ResponseError):  # of a full Redis, say: clients need no limits
                redis.set(LIMITS_KEY, self._limits, ex=_LIMITS_SECONDS)
        if self._wait is None:
            self._wait = QueueWait(redis.connection_pool, is_refused=self._is_refused)
        reply = self._wait.start(CONTROL_QUEUE, _WAIT_SECONDS)
        while self.pause(_LOST_SECONDS, reply):
            try:
                has_request = self._wait.read()
            except QueueWaitRefusedError as error:
                if not self._is_refused:
                    logger.warning(
                        "Redis refuses to wait for control requests, polling: error=%s", error
                    )
                self._is_refused = True
                self.pause(_POLL_SECONDS)
                return True
            if self._is_refused and not self._wait.is_refused:
                logger.info("Redis permits waiting for control requests again")
                self._is_refused = False
            if has_request is not None:
                return has_request
        if self._stopping:
            return False
        raise RedisConnectionError("no reply from Redis")

    def disconnect(self) -> None:
        """Disconnect, which ends the wait."""
        self._state_limits_at = 0.0  # the next Redis may be empty
        wait, self._wait = self._wait, None
        if wait:
            wait.close()
        super().disconnect()

    def _answer(self, redis: Redis, request: _Request) -> None:
        if request.has_reply_key:
            server, key = redis, reply_key(request.id)
        else:
            server, key = self._app.backend.client, result_key(request.id)
        try:
            with _ledger_errors():
                if not request.has_reply_key and self._jobs.is_job(redis, request.id):
                    logger.warning(
                        "control request refused: request_id=%s reason=%s",
                        *(request.id, "its ID is a job's"),
                    )
                    return
                reply = _reply(request, states.SUCCESS, _cut(self._execute(redis, request)))
        except InterviewAccessError as error:
            reply = _reply(request, states.FAILURE, to_result(error))
        arguments = (reply, _REPLY_SECONDS, _OUTSTANDING_BYTES)
        if not server.register_script(script("reply_to_control_request"))(
            [key, _REPLIES], arguments
        ):
            logger.warning(
                "control request not answered: request_id=%s error=%s",
                *(request.id, "its reply key exists"),
            )

    def _execute(self, redis: Redis, request: _Request) -> JobStatus:
        job_id = request.arguments.get("job_id")
        if request.task not in self._operations:
            known = " or ".join(self._operations)
            raise InvalidGrantRequestException.of([("task", known, describe(request.task))])
        if not isinstance(job_id, str) or not is_job_id(job_id) or len(request.arguments) > 1:
            raise InvalidGrantRequestException.of(
                [("job_id", f"{JOB_ID_RULE}, and nothing else", describe(job_id))]
            )
        return self._operations[request.task](redis, job_id)


@contextmanager
def _ledger_errors() -> Iterator[None]:
    """Raise an error of the storage as one that a reply can contain."""
    try:
        yield
    except StorageError as error:
        raise StorageUnavailableException.of_ledger(_brief(error)) from error


@dataclass(frozen=True, slots=True)
class _Request:
    """A control request.

    Attributes:
        has_reply_key: Whether the client reads the reply key of the request's ID. Others, by
            earlier releases or with Celery alone, read the result key.
        expires_at: When the client stops waiting.
    """

    id: str
    task: str
    arguments: dict[str, Any]
    has_reply_key: bool
    expires_at: datetime | None

    @classmethod
    def read(cls, message: bytes | int) -> Self:
        """Read a request of any bytes, or refuse it by its size.

        Raises:
            Exception: if it is not a request.
        """
        if isinstance(message, int):
            raise ValueError(f"expected at most {_REQUEST_BYTES:,} bytes, got {message:,}")  # noqa: TRY004
        envelope = json.loads(message.decode())
        headers, properties, body = (envelope[part] for part in ("headers", "properties", "body"))
        if properties.get("body_encoding") == "base64":
            body = base64.b64decode(body)
        args, kwargs, _ = json.loads(body)
        request_id, expires = headers["id"], headers.get("expires")
        if not is_job_id(request_id):
            raise ValueError(f"its ID: expected {JOB_ID_RULE}, got {describe(request_id)}")
        until = datetime.fromisoformat(expires) if expires else None
        if until and not until.tzinfo:
            until = until.replace(tzinfo=UTC)
        positional = {"job_id" if at == 0 else str(at): value for at, value in enumerate(args)}
        return cls(
            id=request_id,
            task=str(headers["task"]),
            arguments={**positional, **kwargs},
            has_reply_key=properties.get("reply_to") == reply_key(request_id),
            expires_at=until,
        )


def _reply(request: _Request, status: str, result: dict[str, Any]) -> bytes:
    """Encode a reply the way Celery stores a result, so that any Celery client can read it."""
    reply: dict[str, Any] = {
        "status": status,
        "result": result,
        "traceback": None,
        "children": [],
        "date_done": datetime.now(UTC).isoformat(),
        "queue": CONTROL_QUEUE,
        "task_id": request.id,
    }
    return json.dumps(reply).encode()


def _cut(status: JobStatus) -> dict[str, Any]:
    """Encode a status in about :data:`REPLY_BYTES`, with the number of entries it omits."""
    whole = status.model_dump(mode="json", exclude_none=True)
    room = REPLY_BYTES - len(json.dumps({**whole, **dict.fromkeys(_CUT_FIELDS)}))
    omitted = {}
    for field in _CUT_FIELDS:
        entries = whole.get(field, [])
        kept = 0
        pairs = entries.items() if isinstance(entries, dict) else entries
        for entry in pairs:
            room -= len(json.dumps(entry)) + len(", ")
            if room < 0:
                break
            kept += 1
        if kept < len(entries):
            omitted[field] = len(entries) - kept
            first = list(pairs)[:kept]
            whole[field] = dict(first) if isinstance(entries, dict) else first
    return {**whole, "omitted": omitted} if omitted else whole


def _brief(error: Exception) -> str:
    text = shortened(str(error), quoted=False, at_most=500)
    return text if isinstance(error, StorageError) else f"{type(error).__name__}: {text}"
