"""The limits that the workers state in Redis, which a client checks before it sends a job."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pydantic import ValidationError
from redis.exceptions import ResponseError

from interview_access.contracts import LIMITS_KEY, Job, WorkerLimits
from interview_access.errors import InvalidGrantRequestException
from interview_access.protocol.commands import Commands, Exchange
from interview_access.protocol.messages import at_position
from interview_access.protocol.retrying import replies_to

_KEPT_SECONDS = 60.0


class LimitsReader:
    """The workers' limits, read at most once a minute; unknown until a worker has stated them.

    It is safe for threads: the worst that a race costs is another read.
    """

    def __init__(self) -> None:
        self._known: WorkerLimits | None = None
        self._read_at = float("-inf")

    def check(self, jobs: Sequence[Job], *, by: float, is_many: bool = False) -> Exchange[None]:
        """Check the number of grants that jobs request.

        Args:
            jobs: Jobs whose arguments are valid.
            by: Monotonic time in seconds after which a lost connection is not retried.
            is_many: Whether an error names the job's position.

        Raises:
            InvalidGrantRequestException: if a job requests more than the workers allow.
            RedisError, OSError: if the limits cannot be read.
        """
        largest = max(job.requested for job in jobs)
        age = time.monotonic() - self._read_at
        if age > _KEPT_SECONDS or (self._known and largest > self._known.max_interview_ids):
            yield from self._read(by)
        if self._known is None or largest <= self._known.max_interview_ids:
            return
        for position, job in enumerate(jobs):
            try:
                job.check(max_interview_ids=self._known.max_interview_ids)
            except InvalidGrantRequestException as error:
                raise (at_position(position, error) if is_many else error) from None

    def _read(self, by: float) -> Exchange[None]:
        try:
            (stated,) = yield from replies_to(Commands((("GET", LIMITS_KEY),)), by=by)
            self._known = WorkerLimits.model_validate_json(stated) if stated else None
        except (ResponseError, ValidationError):
            # The Redis user of an earlier release has no permission, for example.
            self._known = None
        self._read_at = time.monotonic()
