"""A worker process's lease: what it holds, for how long it has spoken, and how it lets go.

One for the main process, whatever becomes of its connections: a job goes on while the worker
reconnects. Safety does not hang on any of it. A lease lost too early makes a job run twice, and the
ledger in PostgreSQL then gives both the same answer.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from uuid import uuid4

from billiard.process import active_children
from celery.utils.log import get_logger
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from worker.claims import Claim, Claims

logger = get_logger(__name__)

_BEATS = 8
"""In a lease: so many times it is renewed before it runs out."""

_DEAF_SECONDS = 120.0
"""A main loop that has not come round for so long is stuck: its lease is not renewed any more."""

_CLAIM_BYTES = 16 * 1024 * 1024
"""After so many bytes no more is claimed in one go: a message of 100,000 ids has 4 MB."""

_SMALL_BYTES = 16 * 1024
"""A message of up to so many may be done together with others: one of 250 ids, say. Others are
large, and all children but one may have one: the last child is for the small ones."""

_LOOK_ASIDE_SECONDS = 1.0  # between two looks, while a large message stands there and must wait

_RESTS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds; the last one again and again


class Lease:
    """What this process holds of the queue. Safe in threads."""

    def __init__(
        self,
        client: Redis,
        *,
        seconds: float,
        attempt_limit: int,
        grace: float,
        batch_size: int = 1,
    ) -> None:
        """Nothing is said to Redis before :meth:`open`.

        Args:
            client: Of the lease's own, without retries.
            seconds: For how long a worker has spoken when it renews its lease. A dead one's jobs
                are back on the queue after two such times and a little.
            attempt_limit: Tries of a message that kills its worker.
            grace: Seconds for which a worker that is asked to stop lets running jobs go on.
            batch_size: Small messages that one child may be given at once.
        """
        self.batch_size = batch_size
        self.attempt_limit = attempt_limit
        self._claims = Claims(client, lease=seconds)
        self._seconds = seconds
        self._grace = grace
        self._client = client
        self._incarnations: list[str] = []  # the last is ours; others, until they are handed over
        self._server: str | None = None
        self._next_number = 1
        self._held: dict[str, Claim] = {}
        self._running: set[str] = set()
        self._piece_of: dict[str, int] = {}
        self._pieces = itertools.count()
        self._mixed = False
        self._large_wait = False
        self._looked_aside = 0.0
        self._unsent: dict[str, Callable[[], object]] = {}
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._bell: SimpleQueue[None] = SimpleQueue()  # an Event deadlocks in nested handlers
        self._closed = False
        self._drained_by: float | None = None
        self._heard = time.monotonic()
        self._rest_until = 0.0
        self._troubles = 0
        self._suspects: dict[str, tuple[float, float]] = {}
        self._looked = 0.0

    @property
    def _incarnation(self) -> str:
        if len(self._incarnations) != 1:
            raise RedisConnectionError("no lease stands: the worker has not reconnected yet")
        return self._incarnations[0]

    # --- What the transport asks ------------------------------------------------------------

    def open(self) -> None:
        """Begin, or go on after a connection was lost, under a new incarnation.

        What a claim took whose reply was lost goes back, as do jobs that had not begun; a command
        that is still on its way on the old connection finds its incarnation gone.
        """
        self._open()
        self.heard()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
            self._thread.start()

    def _open(self) -> None:
        with self._lock:
            incarnation = uuid4().hex
            self._incarnations.append(incarnation)
            server = str(self._client.info("server")["run_id"])
            kept = set(self._claims.open(incarnation, self._incarnations[:-1], self._held))
            self._incarnations = [incarnation]
            lost = set(self._held) - kept
            for receipt in lost:
                claim = self._held[receipt]
                if self._server not in {None, server}:
                    # A server that came back without its last second, or another in its place, may
                    # have neither the claim nor the message. Once too often does no harm.
                    self._claims.put(claim.queue, claim.message)
                del self._held[receipt]
            self._running &= kept
            if lost:
                logger.warning("the lease was lost: %d messages are others' by now", len(lost))
            self._server = server
            self._let_go_of_the_waiting()

    def claim(self, queues: Sequence[str], asides: int, children: int) -> list[Claim] | None:
        """Take what one child can be given: a message, or some small ones; None: the lease is lost.

        Where messages came last time that one child cannot do together, one at most for each child.
        Raises what redis raises, and then more may have been claimed than is known: open again.

        Args:
            queues: See :meth:`worker.claims.Claims.claim`, as for ``asides``.
            asides: Likewise.
            children: How many there are, busy ones too.
        """
        with self._lock:
            room = children - self.in_hand
            if room <= 0 or not self.may_claim():
                return []
            if self._troubles:
                room = 1
            elif self.batch_size > 1 and not self._mixed:
                room = self.batch_size
            look_aside = self._is_time_to_look_aside(children)
            first, self._next_number = self._next_number, self._next_number + room
            claimed = self._claims.claim(
                self._incarnation,
                queues,
                receipt=first,
                room=room,
                size=_CLAIM_BYTES,
                alone_after=self.attempt_limit - 1,
                small=_SMALL_BYTES,
                large_room=self._large_room(children),
                asides=asides,
                look_aside=look_aside,
            )
            if claimed is None:
                return None
            self._large_wait = claimed.large_wait
            self._held.update((claim.receipt, claim) for claim in claimed.claims)
            return claimed.claims

    def _large_room(self, children: int) -> int:
        held = list(self._held.values())
        return max(children - 1, 1) - sum(map(_is_large, held))

    def _is_time_to_look_aside(self, children: int) -> bool:
        """Whether to look at the large messages that stand aside; not again and again in vain.

        To look at one of 5 MB takes the server as long as all else of a claim.
        """
        now = time.monotonic()
        in_vain = self._large_wait and self._large_room(children) <= 0
        if in_vain and now < self._looked_aside + _LOOK_ASIDE_SECONDS:
            return False
        self._looked_aside = now
        return True

    def may_claim_large(self, children: int) -> bool:
        """Whether a large message stands aside that one of so many children may be given now."""
        return self._large_wait and self._large_room(children) > 0 and self.may_claim()

    def may_claim(self) -> bool:
        """Whether this worker wants another message at all."""
        held = list(self._held.values())  # in one step: the lease's thread lets go of some
        alone = any(claim.tries >= self.attempt_limit - 1 for claim in held)
        probing = self._troubles > 0 and bool(held)
        return not (
            alone
            or probing
            or self._drained_by is not None
            or self._closed
            or time.monotonic() < self._rest_until
        )

    def divide(self, pieces: Sequence[Sequence[str]], children: int) -> None:
        """Say which of the messages that came together go to one child, by their receipts.

        Args:
            pieces: One for each child that is wanted.
            children: How many are free; where more are wanted, fewer messages are taken next time.
        """
        self._mixed = len(pieces) > children
        known = {
            receipt: piece for receipt, piece in self._piece_of.items() if receipt in self._held
        }
        for receipts in pieces:
            known.update(dict.fromkeys(receipts, next(self._pieces)))
        self._piece_of = known

    @property
    def in_hand(self) -> int:
        """How many children's work this worker holds, by whichever connection it came."""
        held = list(self._held)  # in one step: the lease's thread lets go of some
        return len({self._piece_of.get(receipt, receipt) for receipt in held})

    def heard(self) -> None:
        """The main loop has come round."""
        self._heard = time.monotonic()

    def claim_of(self, receipt: str) -> Claim:
        """What is known of a message; of one that is held no more, nothing."""
        return self._held.get(receipt, Claim(receipt, "", b"", 0, 0))

    def may_batch(self, receipt: str) -> bool:
        """Whether a message is small enough to be done with others, where any are."""
        return self.batch_size > 1 and not _is_large(self.claim_of(receipt))

    # --- What becomes of a message ----------------------------------------------------------

    def start(self, *receipts: str) -> frozenset[str]:
        """Count a try of each, and say whose jobs may begin: which messages are held still."""
        with self._lock:
            held = [receipt for receipt in receipts if receipt in self._held]
            if self._drained_by is not None or not held:
                return frozenset()
            try:
                mine = frozenset(self._claims.start(self._incarnation, *held))
            except RedisError as error:
                logger.warning("jobs are not begun, their tries could not be counted: %s", error)
                for receipt in held:
                    self.give_back(receipt)
                return frozenset()
            self._running |= mine
            for receipt in mine.symmetric_difference(held):
                del self._held[receipt]
            return mine

    def acknowledge(self, job_ids: Mapping[str, str]) -> None:
        """Done with for good: messages by their receipts, with the ids of their jobs."""
        self._write(
            job_ids,
            lambda receipts: self._claims.acknowledge(
                self._incarnation, *receipts, job_ids=job_ids
            ),
        )

    def give_back(self, receipt: str) -> None:
        """To its queue at once, uncounted."""
        self._write(
            [receipt], lambda receipts: self._claims.give_back(self._incarnation, *receipts)
        )

    def defer(self, receipt: str, seconds: float, *, in_order: bool = True) -> None:
        """To its queue in a while.

        Not ``in_order``, it asked for nothing: a try that began counts as one that ended its
        worker, and one that did not begin as none.
        """
        self._write(
            [receipt],
            lambda _: self._claims.defer(
                self._incarnation, receipt, seconds=seconds, in_order=in_order
            ),
        )

    def bury(self, receipt: str, reason: str, *, job_id: str = "", task: str = "") -> None:
        """To the dead letters."""
        # A lone surrogate, of which JSON allows the escape, has no bytes.
        texts = (reason, job_id, task)
        text = [value.encode(errors="backslashreplace").decode() for value in texts]
        self._write(
            [receipt],
            lambda _: self._claims.bury(
                self._incarnation, receipt, reason=text[0], job_id=text[1], task=text[2]
            ),
        )

    def _write(self, receipts: Iterable[str], write: Callable[[Sequence[str]], object]) -> None:
        """Say it to Redis; where it cannot be said, go on trying: each takes effect once."""
        with self._lock:
            self._running.difference_update(receipts)
            held = [one for one in receipts if one in self._held and one not in self._unsent]
            if not held:
                return
            try:
                write(held)
            except RedisError as error:
                logger.warning(
                    "Redis is told later what became of %d messages: %s", len(held), error
                )
                self._unsent.update({one: partial(write, [one]) for one in held})
            else:
                for receipt in held:
                    del self._held[receipt]

    # --- A server that is away ----------------------------------------------------------------

    def trouble(self, what: str) -> None:
        """No job would fare better: rest, then try one, before many are taken again."""
        if time.monotonic() >= self._rest_until:
            rest = _RESTS[min(self._troubles, len(_RESTS) - 1)]
            self._rest_until = time.monotonic() + rest
            self._troubles += 1
            logger.warning("%s: no job is taken for %.0f s", what, rest)

    def no_trouble(self) -> None:
        """A job was done."""
        self._troubles = 0

    # --- The end ----------------------------------------------------------------------------------

    def drain(self, *, at_once: bool = False) -> None:
        """Take no more; what has not begun goes back now, what runs may end within the grace.

        Asked a second time, or ``at_once``, it ends now. Callable from a signal's handler.
        """
        again = self._drained_by is not None
        self._drained_by = time.monotonic() + (0 if again or at_once else self._grace)
        self._bell.put(None)

    def close(self) -> None:
        """Give back all that is held still."""
        with self._lock:
            if self._closed or not self._incarnations:
                return
            self._closed = True
            self._bell.put(None)
            try:
                self._send_unsent()
                for name in self._incarnations:
                    self._claims.close(name)
            except RedisError as error:
                logger.warning("jobs go back when the lease has run out: %s", error)

    def _end(self) -> None:
        """The grace is over: nothing is lost by ending here, for all is held in Redis or done."""
        logger.warning("%d jobs did not end within the grace and go back", len(self._running))
        self.close()
        for child in active_children():
            try:
                os.kill(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os._exit(0)

    # --- The thread that keeps it -----------------------------------------------------------------

    def _keep(self) -> None:
        trouble = False
        while not self._closed:
            with suppress(Empty):
                self._bell.get(timeout=self._seconds / _BEATS)
            if self._drained_by is not None and time.monotonic() >= self._drained_by:
                self._end()
            try:
                self._beat()
            except Exception as error:  # whatever it is: without this thread every job runs twice
                # What was seen before it does not count: it may be Redis that stood still.
                self._suspects.clear()
                if not trouble:
                    known = isinstance(error, RedisError | OSError)
                    logger.warning("the lease cannot be renewed: %r", error, exc_info=not known)
                trouble = True
            else:
                trouble = False

    def _beat(self) -> None:
        with self._lock:
            if self._closed:
                return
            draining = self._drained_by is not None
            if not draining and time.monotonic() - self._heard > _DEAF_SECONDS:
                return
            renewal = [self._claims.renew(name) for name in self._incarnations][-1]
            if not renewal.alive:
                self._open()
            if draining:
                self._let_go_of_the_waiting()
            self._send_unsent()
        self._claims.wake()
        self._look_for_the_dead(renewal.expired)

    def _let_go_of_the_waiting(self) -> None:
        for receipt in [receipt for receipt in self._held if receipt not in self._running]:
            self.give_back(receipt)

    def _send_unsent(self) -> None:
        for receipt, write in list(self._unsent.items()):
            if receipt in self._held:
                write()
                del self._held[receipt]
            del self._unsent[receipt]

    def _look_for_the_dead(self, expired: dict[str, float]) -> None:
        """Give back what the dead held: those whose lease was over at two looks, a lease apart.

        After a stall of Redis, or of this machine, every lease looks over until its owner has had
        the time to renew it; so what was seen before a gap counts for nothing.
        """
        now = time.monotonic()
        if now - self._looked > self._seconds / 2:
            self._suspects.clear()
        self._looked = now
        self._suspects = {
            name: self._suspects[name]
            if name in self._suspects and self._suspects[name][0] == deadline
            else (deadline, now)
            for name, deadline in expired.items()
            if name not in self._incarnations
        }
        for name, (deadline, since) in self._suspects.items():
            if now - since < self._seconds:
                continue
            left = self._claims.sweep(name, deadline)
            while left > 0:
                left = self._claims.sweep(name, deadline)
            if left == 0:
                logger.warning("a worker is gone (%s): its jobs are back on the queue", name)


def _is_large(claim: Claim) -> bool:
    return len(claim.message) > _SMALL_BYTES
