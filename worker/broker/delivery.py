"""One claimed message in the worker's main process, and who owns it."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from interview_access.errors import shortened

from worker.broker.claims import Claim, Disposition


class State(Enum):
    """Where a delivery is; it has one owner in each state."""

    CLAIMED = "claimed"
    """By this session; the dispatcher owns it."""
    DISPATCHED = "dispatched"
    """To a pool process; its batch owns it."""
    SETTLED = "settled"
    """Its disposition is known; the lease owns it until Redis has applied it."""


class Owner(Protocol):
    """A batch of deliveries that a pool process executes."""

    @property
    def is_abandoned(self) -> bool:
        """Whether it will never settle its deliveries."""


class Delivery:
    """A claimed message and where it is.

    Attributes:
        claim: The message as it was claimed.
        claimed_at: When, in seconds of the lease's clock.
        state: Changed by its owner only.
        batch: The batch with which it was dispatched.
        disposition: How it is settled.
        job_id: ID of its job, once the message is read; empty if none can be read.
        task: Name of its task; empty likewise.
    """

    def __init__(self, claim: Claim, claimed_at: float = 0.0) -> None:
        self.claim = claim
        self.claimed_at = claimed_at
        self.state = State.CLAIMED
        self.batch: Owner | None = None
        self.disposition: Disposition | None = None
        self.job_id = ""
        self.task = ""

    def __repr__(self) -> str:
        job = f"job={shortened(self.job_id)} task={shortened(self.task)}"
        label = job if self.job_id or self.task else f"tag={self.claim.tag}"
        return f"{label} state={self.state.value} attempts={self.claim.attempts}"

    def dispatch(self, batch: Owner) -> None:
        """Make a batch its owner."""
        self.state, self.batch = State.DISPATCHED, batch

    def settle(self, disposition: Disposition) -> None:
        """Decide how it is settled, unless that is decided."""
        if self.state is not State.SETTLED:
            self.state, self.disposition = State.SETTLED, disposition

    @property
    def has_owner(self) -> bool:
        """Whether its owner will settle it. A claimed one is soon dispatched, or was lost."""
        match self.state:
            case State.CLAIMED:
                return False
            case State.DISPATCHED:
                return self.batch is not None and not self.batch.is_abandoned
            case State.SETTLED:
                return True
