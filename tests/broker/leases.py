"""Claim, dispatch and settle with a stepped lease."""

from __future__ import annotations

from redis import Redis

from tests.support.sessions import KEYS, SteppedLease, sessions
from worker.broker.claims import Action, Claims, Disposition
from worker.broker.delivery import Delivery
from worker.broker.lease import Lease

ACKNOWLEDGE = Disposition(Action.ACKNOWLEDGE)
REQUEUE = Disposition(Action.REQUEUE)
PROCESSES = 4


def claim(lease: Lease, queues: tuple[str, ...] = KEYS) -> list[Delivery]:
    """Claim for one pool process, with a valid lease."""
    deliveries = lease.claim(queues, 1, PROCESSES)
    assert deliveries is not None
    return deliveries


class Batch:
    """A batch, with the attributes that the lease reads."""

    def __init__(self, *deliveries: Delivery, is_abandoned: bool = False) -> None:
        self.is_abandoned = is_abandoned
        for delivery in deliveries:
            delivery.dispatch(self)


def dispatched(lease: Lease) -> list[Delivery]:
    """Claim, and dispatch the deliveries to a pool process."""
    deliveries = claim(lease)
    Batch(*deliveries)
    return deliveries


def settle(lease: Lease, disposition: Disposition, *deliveries: Delivery) -> None:
    """Settle deliveries in the same way."""
    lease.settle({one.claim.tag: disposition for one in deliveries})


def lose(redis: Redis, lease: SteppedLease) -> None:
    """Take the session over, as another worker does after it has expired."""
    session = lease.session
    while Claims(redis).take_over(session, sessions(redis)[session]) > 0:
        pass
