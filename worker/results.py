"""Where results go: Celery's Redis backend, by which only the ledger says how a job ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from celery.exceptions import BackendStoreError, Reject
from celery.utils.log import get_logger
from interview_access.errors import (
    InterviewAccessError,
    JobFailedError,
    StorageUnavailableException,
)
from redis.exceptions import NoScriptError, RedisError

from storage.interface import StorageError

logger = get_logger(__name__)

_COMPARE_AND_SET = """#!lua flags=allow-oom
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SETEX', KEYS[1], ARGV[3], ARGV[2])
redis.call('PUBLISH', KEYS[1], ARGV[2])
return 1
"""

_LOOKS = 10
"""At what is stored, each time after another has stored something meanwhile."""

_UNSETTLED, _NOT_DONE, _GIVEN_UP, _ANSWERED = range(4)
"""How final a result is. A less final one never takes a more final one's place."""

_NOT_ANSWERS = {StorageUnavailableException.__name__: _NOT_DONE, JobFailedError.__name__: _GIVEN_UP}


class JobResults(RedisBackend):  # type: ignore[misc] # Celery ships no types
    """Stores what a job's poller reads."""

    _told: tuple[str, bytes] = ("", b"")  # a job's id, and where it is, as last stored by this one

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        """Store a state, or an answer for good.

        Where a job is, is a courtesy: it is stored if that can be done. An answer must be stored
        before its message is acknowledged.

        Raises:
            Reject: an answer cannot be stored now; the message is to go back to its queue.
            Exception: a failure that is none of the contract's; it is no verdict, whatever it is.
        """
        if isinstance(result, InterviewAccessError | StorageError):
            traceback = None  # its sentence says what was wrong; the log has the rest
        if state not in states.READY_STATES:
            try:
                self._store_result(
                    task_id, self.encode_result(result, state), state, traceback, request
                )
            except RedisError as error:
                logger.warning("job %s: its state %s is not told: %s", task_id, state, error)
            return result
        if state != states.SUCCESS and not isinstance(result, InterviewAccessError):
            raise result
        try:
            # Celery's own tries again within 60 ms, and logs a trace of 45 lines each time.
            stored = self.encode_result(result, state)
            arguments = (task_id, stored, state, traceback, request)
            self.ensure(self._store_result, arguments, max_retries=self.max_retries)
        except (BackendStoreError, RedisError) as error:
            raise Reject(f"its result cannot be stored: {error}", requeue=True) from error
        return result

    def store_answers(
        self, answers: Mapping[str, dict[str, Any] | InterviewAccessError]
    ) -> frozenset[str]:
        """Store the answers of several jobs, and name those that stand now.

        The others are not known to: Redis was away.
        """
        fresh = {
            job_id: (
                states.FAILURE if isinstance(answer, InterviewAccessError) else states.SUCCESS,
                answer,
            )
            for job_id, answer in answers.items()
        }
        stored: set[str] = set()
        try:
            stored = self._store_where_nothing_stands(fresh)
            for job_id in fresh.keys() - stored:
                state, answer = fresh[job_id]
                result = self.encode_result(answer, state)
                self._store_result(job_id, result, state, request=Context())
                stored.add(job_id)
        except (BackendStoreError, RedisError) as error:
            logger.warning(
                "the results of %d jobs cannot be stored: %s", len(answers) - len(stored), error
            )
        return frozenset(stored)

    def store_started(self, job_ids: Sequence[str], **where: object) -> None:
        """Say that jobs run, unless more is known of them: a courtesy."""
        try:
            self._store_where_nothing_stands(dict.fromkeys(job_ids, (states.STARTED, where)))
        except RedisError as error:
            logger.warning("that %d jobs run is not told: %s", len(job_ids), error)

    def _store_where_nothing_stands(self, fresh: Mapping[str, tuple[str, Any]]) -> set[str]:
        """Store states and their results by job, in one round trip, and name those that were."""
        told: dict[str, dict[str, Any]] = {}  # what all of a state have in common
        script = self.client.register_script(_COMPARE_AND_SET).sha
        with self.client.pipeline(transaction=False) as pipeline:
            for job_id, (state, result) in fresh.items():
                if state not in told:
                    told[state] = self._get_result_meta(None, state, None, request=Context())
                encoded = self.encode_result(result, state)
                value = self.encode({**told[state], "result": encoded, "task_id": job_id})
                key = self.get_key_for_task(job_id)
                pipeline.evalsha(script, 1, key, "", value, self._seconds(state))
            commands = pipeline.command_stack
            stored = pipeline.execute(raise_on_error=False)
            if any(isinstance(one, NoScriptError) for one in stored):
                self.client.script_load(_COMPARE_AND_SET)  # the server has been started anew
                pipeline.command_stack = commands
                stored = pipeline.execute(raise_on_error=False)
        return {job_id for job_id, done in zip(fresh, stored, strict=True) if done == 1}

    def _seconds(self, state: str) -> int:
        """For how long a result of this state can be polled."""
        return int(self.failure_expires if state == states.FAILURE else self.expires)

    def store_failure(self, job_id: str, error: InterviewAccessError) -> None:
        """Store a failure from the main process, which must not wait for long: one try.

        Without its request: its callbacks may be what is wrong.

        Raises:
            Reject: it cannot be stored now; the message is to come again.
        """
        try:
            self._store_result(
                job_id, self.encode_result(error, states.FAILURE), states.FAILURE, None, None
            )
        except (BackendStoreError, RedisError, OSError) as failed:
            raise Reject(f"its result cannot be stored: {failed}", requeue=True) from failed

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        """Compare and set. Celery reads, then writes: a zombie's failure replaces a success.

        What stands is nothing, most often, or where this process said that the job is.
        """
        value = self._value(task_id, result, state, traceback, request)
        rank = _rank(state, result)
        key = self.get_key_for_task(task_id)
        expires = self._seconds(state)
        store = self.client.register_script(_COMPARE_AND_SET)
        told, self._told = self._told, ("", b"")
        stored = told[1] if told[0] == task_id else b""
        for _look in range(_LOOKS):
            if store([key], [stored, value, expires]):
                if rank == _UNSETTLED:
                    self._told = (task_id, value)
                return result
            stored = self.client.get(key) or b""
            if stored:
                before = self.decode(stored)
                before_rank = _rank(before["status"], before["result"])
                if rank < before_rank or rank == before_rank > _UNSETTLED:
                    return result
        raise BackendStoreError("others store other states of it", state=state, task_id=task_id)

    def _value(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None
    ) -> Any:
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        return self.encode({**meta, "task_id": task_id})


def _rank(state: str, result: Any) -> int:
    if state not in states.READY_STATES:
        return _UNSETTLED
    kind = result.get("exc_type") if isinstance(result, dict) else None
    return _NOT_ANSWERS.get(str(kind), _ANSWERED)
