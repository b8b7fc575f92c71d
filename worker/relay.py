"""The relay: from the table of requests to the queue, in a thread of the main process.

Any number of workers' relays share the requests: each takes what no other has in hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from celery import Celery
from celery.utils.log import get_logger
from interview_access.protocol import GrantMessage, announcement_key
from redis import Redis
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError

from storage.dtos import AccessRequestDTO
from storage.interface import InterviewStorageInterface
from tasks.relay import PAGE, relay
from worker.claims import PREFIX
from worker.rounds import Rounds

logger = get_logger(__name__)

_PAUSE_SECONDS = 0.5
_SEEN = f"{PREFIX}relay"  # where it is missing, Redis was emptied, or is another


class Relay(Rounds):
    """Puts on the queue what services ask for in the database."""

    def __init__(self, app: Celery, storage: Callable[[], InterviewStorageInterface]) -> None:
        """Nothing is connected before it starts."""
        super().__init__(app)
        self._storage = storage

    def round(self, redis: Redis) -> None:
        """Put one page of requests on the queue."""
        storage = self._storage()
        if not redis.exists(_SEEN):
            storage.make_requests_due()
            redis.set(_SEEN, 1)

        def announced(job_ids: Sequence[str]) -> Collection[str]:
            stand = [redis.exists(announcement_key(job_id)) for job_id in job_ids]
            return [job_id for job_id, stands in zip(job_ids, stand, strict=True) if stands]

        def send(request: AccessRequestDTO) -> bool:
            try:
                with redis.pipeline(transaction=True) as pipeline:
                    for command in message_of(request).commands:
                        pipeline.execute_command(*command)  # type: ignore[no-untyped-call] # redis-py's
                    pipeline.execute()
            except (OutOfMemoryError, ReadOnlyError):
                raise  # no other would fare better
            except RedisError as error:
                redis.ping()  # or none is there
                logger.warning("job %s: its request cannot be sent: %s", request.job_id, error)
                return False
            return True

        if relay(storage, announced, send) < PAGE:
            self.pause(_PAUSE_SECONDS)


def message_of(request: AccessRequestDTO) -> GrantMessage:
    """The message that the request's job is sent by."""
    return GrantMessage.of(request.user_id, request.interview_ids, job_id=request.job_id)
