"""Redis and the workers, as far as the clients see them, in memory.

The exchanges of :mod:`interview_access.protocol` run unchanged, so that a test's client validates,
refuses and reports as the real one does.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from threading import RLock
from types import EllipsisType
from typing import Any
from uuid import UUID

from redis.exceptions import ConnectionError as NoConnectionError
from redis.exceptions import WatchError

from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    DEFAULT_MAX_INTERVIEW_IDS,
    LIMITS_KEY,
    QUEUE,
    Announcement,
    JobStatus,
    WorkerLimits,
    announcement_key,
    result_key,
)
from interview_access.errors import InterviewAccessError
from interview_access.protocol.commands import Commands
from interview_access.stored_errors import from_record, to_result
from interview_access.testing.jobs import EnqueuedJob, Expected

_RESULTS = result_key("")
_LIMITS = WorkerLimits(max_interview_ids=DEFAULT_MAX_INTERVIEW_IDS).model_dump_json().encode()


class InMemoryQueue(ABC):
    """The jobs that a test's clients enqueued, and assertions about them.

    Safe for threads.

    Attributes:
        is_available: Whether Redis can be reached. Set it to False to test what a service does if
            a call raises QueueUnavailableError.
    """

    def __init__(self) -> None:
        self.is_available = True
        self._lock = RLock()
        self._keys: dict[str, bytes] = {}
        self._jobs: dict[str, EnqueuedJob] = {}

    @property
    def jobs(self) -> list[EnqueuedJob]:
        """The jobs that were enqueued, in order. One that was sent again is listed once."""
        return [*self._jobs.values()]

    def clear(self) -> None:
        """Forget the jobs that were enqueued, and their IDs."""
        with self._lock:
            self._keys.clear()
            self._jobs.clear()

    def assert_enqueued(
        self,
        *,
        task: str | EllipsisType = ...,
        job_id: str | EllipsisType = ...,
        user_id: str | UUID | EllipsisType = ...,
        user_ids: Iterable[str | UUID] | EllipsisType = ...,
        interview_ids: Iterable[str | UUID] | EllipsisType = ...,
        count: int | None = None,
    ) -> list[EnqueuedJob]:
        """Assert that jobs were enqueued. An argument that is not given accepts any value.

        Args:
            task: Name of the task, as ``interview_access.contracts.GRANT_ACCESS``.
            job_id: The job's ID.
            user_id: The only user of the job.
            user_ids: All users of the job, in any order; duplicates do not count.
            interview_ids: All interviews of the job, likewise and in any spelling; of an attempt
                its one interview.
            count: Number of jobs that are expected; by default at least one.

        Returns:
            The jobs that are as expected, in order.

        Raises:
            AssertionError: if their number differs; it lists what was enqueued.
            TypeError: if an ID is neither a string nor a UUID, or `user_ids` or `interview_ids`
                is not an iterable.
            ValueError: if `task` is not the name of a task.
        """
        __tracebackhide__ = True
        expected = Expected(
            task=task,
            job_id=job_id,
            user_id=user_id,
            user_ids=user_ids,
            interview_ids=interview_ids,
        )
        return expected.assert_among(self.jobs, count=count, listed_as="Enqueued")

    def assert_nothing_enqueued(self) -> None:
        """Assert that no job was enqueued.

        Raises:
            AssertionError: if a job was; it lists what was enqueued.
        """
        __tracebackhide__ = True
        self.assert_enqueued(count=0)

    def execute(self, step: Commands) -> list[Any]:
        """Execute Redis commands of a client.

        Args:
            step: The commands.

        Returns:
            The replies.

        Raises:
            redis.exceptions.RedisError: as from Redis.
        """
        with self._lock:
            if not self.is_available:
                raise NoConnectionError("the test has set is_available to False")
            if any(self._value(key) != value for key, value in step.expected.items()):
                raise WatchError("a watched key has another value than expected")
            return [self._reply(command) for command in step.commands]

    def _reply(self, command: tuple[Any, ...]) -> Any:
        match command:
            case "SET", key, value, "NX", "EX", _:
                return self._keys.setdefault(key, value) is value
            case "LPUSH", list_key, *messages:
                for message in messages:
                    self._push(list_key, json.loads(message))
                return len(messages)
            case "GET", key:
                return self._value(key)
            case "MGET", *keys:
                return [self._value(key) for key in keys]
            case "EXISTS", key:
                return int(self._value(key) is not None)
            case "DEL", key:
                self._forget_result(key.removeprefix(_RESULTS))
                return 1
        raise NotImplementedError(f"{command[0]}: the test kit does not execute this command")

    def _push(self, list_key: str, message: Mapping[str, Any]) -> None:
        headers, (_, arguments, _) = message["headers"], json.loads(message["body"])
        if list_key == CONTROL_QUEUE:
            reply = self._control_reply(headers["task"], arguments["job_id"])
            self._keys[message["properties"]["reply_to"]] = json.dumps(reply).encode()
            return
        if list_key != QUEUE:
            raise NotImplementedError(f"{list_key}: the test kit has no such list")
        announced = Announcement.model_validate_json(self._keys[announcement_key(headers["id"])])
        job = EnqueuedJob.of_arguments(
            headers["id"],
            headers["task"],
            arguments,
            sent_at=announced.sent_at,
            eta=announced.eta,
            expires_at=announced.expires_at,
            actor=announced.actor,
            reason=announced.reason,
        )
        self._jobs.setdefault(job.job_id, job)
        self._deliver(job, arguments)

    def _control_reply(self, task: str, job_id: str) -> dict[str, Any]:
        try:
            if task == CANCEL_JOB:
                self._cancel(job_id)
            status = self._status(job_id)
        except InterviewAccessError as error:
            return {"status": "FAILURE", "result": to_result(error)}
        return {"status": "SUCCESS", "result": status.model_dump(mode="json", exclude_none=True)}

    def _value(self, key: str) -> bytes | None:
        if key == LIMITS_KEY:
            return _LIMITS
        if not key.startswith(_RESULTS):
            return self._keys.get(key)
        status = self._status(key.removeprefix(_RESULTS))
        if not status.final:
            return None
        if status.error:
            error = from_record(status.error.model_dump())
            return json.dumps({"status": "FAILURE", "result": to_result(error)}).encode()
        return json.dumps({"status": "SUCCESS", "result": status.result}).encode()

    def _announcement(self, job_id: str) -> Announcement | None:
        text = self._keys.get(announcement_key(job_id))
        return Announcement.model_validate_json(text) if text else None

    def _unfinished(self, job_id: str, *, cancel_requested: bool) -> JobStatus:
        """Build the status of a job that has no outcome."""
        announcement = self._announcement(job_id)
        known = announcement.model_dump(exclude={"digest"}) if announcement else {}
        return JobStatus(
            job_id=job_id,
            state="queued" if announcement else "unknown",
            cancel_requested=True if cancel_requested else None,
            **known,
        )

    @abstractmethod
    def _deliver(self, job: EnqueuedJob, arguments: Mapping[str, Any]) -> None:
        """Do what a worker does with a job that was enqueued, perhaps once more."""

    @abstractmethod
    def _status(self, job_id: str) -> JobStatus:
        """Report a job as a worker does."""

    @abstractmethod
    def _cancel(self, job_id: str) -> None:
        """Cancel a job unless it has finished."""

    @abstractmethod
    def _forget_result(self, job_id: str) -> None:
        """Delete a result that is not final, because the job is sent again."""
