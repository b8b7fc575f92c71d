"""The result backend: Celery's for Redis, with rules for which result replaces which."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from celery import states
from celery.app.task import Context
from celery.backends.redis import RedisBackend, SentinelBackend
from celery.exceptions import BackendStoreError, ChordError
from celery.utils.log import get_logger
from interview_access.contracts import CONTROL_QUEUE
from interview_access.errors import (
    InterviewAccessError,
    JobFailedError,
    StorageUnavailableException,
)
from interview_access.stored_errors import stored_type, to_result
from redis.exceptions import RedisError, ResponseError

from worker.broker.scripts import script

logger = get_logger(__name__)


_COMPARE_ATTEMPTS = 10
"""Attempts of a compare-and-set while others write the same key.

Only duplicate deliveries of a job and its started reporter write it concurrently. A key that
changes ten times in a row is overwritten by something else."""

_UNSETTLED, _NOT_DONE, _GIVEN_UP, _ANSWERED = range(4)
"""Ranks of results, from not final to final. No result replaces one of a higher rank."""

_OF_CHAIN = "is_of_chain"
"""Field of a failure that an earlier task of the chain caused."""

_RANKS = {StorageUnavailableException.__name__: _NOT_DONE, JobFailedError.__name__: _GIVEN_UP}


class JobResults(RedisBackend):  # type: ignore[misc] # Celery ships no types
    """Stores the results that pollers read."""

    _last_stored: tuple[str, bytes] = ("", b"")  # a job's ID and the state that was stored of it

    def _get_pool(self, **options: Any) -> Any:
        """Add connection options, for which Celery has no setting."""
        return super()._get_pool(**{**options, **self._transport_options.get("connection", {})})

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,  # noqa: ARG002 - Celery's signature
        request: Any = None,
        **_: Any,
    ) -> Any:
        """Store a state that Celery or a running job reports.

        The only final state stored here is the failure of a chord; :meth:`store_results` stores
        those of jobs.

        Raises:
            Exception: the result itself, if it is another final one.
        """
        if state not in states.READY_STATES:
            self.store_progress(task_id, state, result)
        elif isinstance(result, ChordError):
            self._store_result(task_id, self.encode_result(result, state), state, None, request)
        else:
            raise result
        return result

    def prepare_exception(self, exc: Exception, serializer: str | None = None) -> Any:
        """Encode an error as the value of a result."""
        if isinstance(exc, InterviewAccessError):
            return to_result(exc)
        return super().prepare_exception(exc, serializer)

    def store_progress(self, job_id: str, state: str, progress: object) -> bool:
        """Store a state of a running job, if Redis is reachable.

        Args:
            job_id: The job's ID.
            state: Celery's name of the state.
            progress: The result that pollers read with it.

        Returns:
            Whether it was stored.
        """
        try:
            self._store_result(job_id, self.encode_result(progress, state), state)
        except (BackendStoreError, RedisError, OSError) as error:
            logger.warning(
                "job state is not stored: job=%s state=%s error=%s", job_id, state, error
            )
            return False
        return True

    def mark_as_revoked(self, task_id: str, *_: Any, **__: Any) -> None:
        """Store nothing: the ledger settles a revoked job when it is delivered."""

    def store_results(
        self, results: Mapping[str, dict[str, Any] | InterviewAccessError]
    ) -> frozenset[str]:
        """Store the results of jobs. A final result is not replaced.

        Args:
            results: By job ID.

        Returns:
            IDs of the jobs whose results are stored. The others' might not be: Redis was
            unreachable.
        """
        fresh = {
            job_id: (
                states.FAILURE if isinstance(result, InterviewAccessError) else states.SUCCESS,
                result,
            )
            for job_id, result in results.items()
        }
        stored: set[str] = set()
        if not fresh:
            return frozenset()
        try:
            stored = self._store_where_nothing_is(fresh)
            stored |= self._final_among(fresh.keys() - stored)
            for job_id in fresh.keys() - stored:
                state, result = fresh[job_id]
                encoded = self.encode_result(result, state)
                self._store_result(job_id, encoded, state, request=Context())
                stored.add(job_id)
        except (BackendStoreError, RedisError, OSError) as error:
            logger.warning("results delayed: jobs=%d error=%s", len(results) - len(stored), error)
        return frozenset(stored)

    def store_chain_failure(self, task_id: str, error: InterviewAccessError) -> None:
        """Store a job's failure as that of a later task of its chain, which is not sent.

        A result of that task replaces it.

        Args:
            task_id: The later task's ID.
            error: The job's failure.

        Raises:
            BackendStoreError, redis.RedisError: if it cannot be stored.
        """
        encoded = {**self.encode_result(error, states.FAILURE), _OF_CHAIN: True}
        self._store_result(task_id, encoded, states.FAILURE, request=Context())

    def store_retries(self, failures: Mapping[str, Exception]) -> None:
        """Store that jobs are to be retried, if Redis is reachable.

        Args:
            failures: The error of each job, by job ID.
        """
        state = states.RETRY
        try:
            for job_id, error in failures.items():
                self._store_result(job_id, self.encode_result(error, state), state)
        except (BackendStoreError, RedisError, OSError) as error:
            logger.warning("retry state is not stored: jobs=%d error=%s", len(failures), error)

    def store_started(self, job_ids: Sequence[str], **where: object) -> None:
        """Store that jobs run, unless a state is stored, if Redis is reachable.

        Args:
            job_ids: The jobs' IDs.
            where: The process that executes them, for pollers.
        """
        try:
            self._store_where_nothing_is(dict.fromkeys(job_ids, (states.STARTED, where)))
        except (RedisError, OSError) as error:
            logger.warning("started state is not stored: jobs=%d error=%s", len(job_ids), error)

    def _store_where_nothing_is(self, fresh: Mapping[str, tuple[str, Any]]) -> set[str]:
        """Store states and results where none is stored. Returns the IDs of these jobs."""
        common: dict[str, dict[str, Any]] = {}  # fields that are equal for all jobs of a state
        arguments: list[Any] = []
        for job_id, (state, result) in fresh.items():
            if state not in common:
                common[state] = self._get_result_meta(None, state, None, request=Context())
            encoded = self.encode_result(result, state)
            value = self.encode({**common[state], "result": encoded, "task_id": job_id})
            arguments += value, self._seconds(state)
        replaced = self._compare_and_set(list(fresh), "", arguments)
        return {job_id for job_id, done in zip(fresh, replaced, strict=True) if done}

    def _compare_and_set(
        self, job_ids: Sequence[str], expected: bytes | str, arguments: Sequence[Any]
    ) -> Sequence[int]:
        keys = [self.get_key_for_task(job_id) for job_id in job_ids]
        replaced: Sequence[int] = self.client.register_script(script("compare_and_set_results"))(
            keys, [expected, *arguments]
        )
        return replaced

    def _final_among(self, job_ids: Collection[str]) -> set[str]:
        """Return the jobs that have a final result, as duplicate deliveries do."""
        if not job_ids:
            return set()
        keys = [self.get_key_for_task(job_id) for job_id in job_ids]
        stored = self.client.mget(keys)
        return {
            job_id
            for job_id, value in zip(job_ids, stored, strict=True)
            if value and self._rank_of(value) == _ANSWERED
        }

    def _seconds(self, state: str) -> int:
        """Return the seconds for which a result of this state can be polled."""
        return int(self.failure_expires if state == states.FAILURE else self.expires)

    def _store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **_: Any,
    ) -> Any:
        """Store a result by compare-and-set, unless the stored one has a higher rank.

        Celery's own method reads and then writes, so that a late failure replaces a success. Most
        often nothing is stored, or the state that this process stored last.
        """
        value = self._value(task_id, result, state, traceback, request)
        rank = _rank(state, result)
        key = self.get_key_for_task(task_id)
        expires = self._seconds(state)
        last, self._last_stored = self._last_stored, ("", b"")
        stored = last[1] if last[0] == task_id else b""
        for _attempt in range(_COMPARE_ATTEMPTS):
            if self._compare_and_set([task_id], stored, [value, expires])[0]:
                if rank == _UNSETTLED:
                    self._last_stored = (task_id, value)
                return result
            stored = self._stored(key)
            before = self._rank_of(stored)
            if rank < before or rank == before > _UNSETTLED:
                return result
        raise BackendStoreError(
            f"the key was overwritten by others {_COMPARE_ATTEMPTS} times",
            state=state,
            task_id=task_id,
        )

    def _stored(self, key: str) -> bytes:
        try:
            return bytes(self.client.get(key) or b"")
        except ResponseError:
            return b""  # the script replaces a key of another type

    def _rank_of(self, stored: bytes) -> int:
        """Return the rank of a stored result; one that cannot be read has the lowest."""
        try:
            meta = self.decode(stored)
            if meta.get("queue") == CONTROL_QUEUE:
                return _UNSETTLED  # the reply to a control request
            return _rank(meta["status"], meta["result"])
        except Exception:  # noqa: BLE001 - others may have written anything
            return _UNSETTLED

    def _value(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None
    ) -> Any:
        meta = self._get_result_meta(
            result=result, state=state, traceback=traceback, request=request
        )
        return self.encode({**meta, "task_id": task_id})


def _rank(state: str, result: Any) -> int:
    if state == states.SUCCESS:
        return _ANSWERED
    if state not in states.READY_STATES:
        return _UNSETTLED
    kind = stored_type(result)
    if kind is None or result.get(_OF_CHAIN):
        return _NOT_DONE  # Celery's own error, as of a chord whose part failed; or another task's
    return _RANKS.get(kind, _ANSWERED)


class SentinelJobResults(JobResults, SentinelBackend):  # type: ignore[misc] # Celery ships no types
    """Stores results in the primary that the Sentinels name."""
