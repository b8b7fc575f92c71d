"""The errors of jobs and of the clients.

Workers store errors of these classes as results, which producers in any language read; see
:mod:`interview_access.stored_errors`. Their arguments are plain JSON values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from interview_access.text import shortened as shortened  # noqa: PLC0414 - worker/ imports it from here

Details = dict[str, Any]
"""A JSON object for programs; its keys depend on the error's class."""

MAX_LISTED_PROBLEMS = 20
"""Offending values that an error lists; the ``total`` in its details counts all of them."""

_SENTENCE = 30_000  # characters: more than that many offending values take


class InterviewAccessError(Exception):
    """Base class of the errors of this package.

    Attributes:
        sentence: The error for people: one line without control characters.
        details: The error for programs: a JSON object.
        state: The state of a job that ended with this error.
    """

    state: ClassVar[Literal["failed", "cancelled", "expired"]] = "failed"

    def __init__(self, sentence: str, details: Details | None = None) -> None:
        self.sentence = shortened(sentence, quoted=False, at_most=_SENTENCE)
        self.details = details or {}
        super().__init__(self.sentence, self.details)

    def __str__(self) -> str:
        return self.sentence

    def with_sent_jobs(self, job_ids: Sequence[str], *, sent: int, perhaps_sent: int = 0) -> Self:
        """Copy an error of a call for many jobs, and add which of the jobs were sent.

        Args:
            job_ids: The IDs of all jobs, in the order of sending.
            sent: Number of jobs that are on the queue.
            perhaps_sent: Number of jobs after these for which the reply was lost.

        Returns:
            The error, with the job IDs under ``sent``, ``perhaps_sent`` and ``not_sent`` in its
            details.
        """
        attempted = sent + perhaps_sent
        return type(self)(
            f"{self.sentence} Of {len(job_ids):,} jobs {sent:,} were sent, {perhaps_sent:,} might "
            f"have been sent, and {len(job_ids) - attempted:,} were not; the details list them. "
            "A job that is sent again under its ID takes effect once.",
            {
                **self.details,
                "sent": [*job_ids[:sent]],
                "perhaps_sent": [*job_ids[sent:attempted]],
                "not_sent": [*job_ids[attempted:]],
            },
        )


class InvalidGrantRequestException(InterviewAccessError):  # noqa: N818 - the contract's name
    """An argument is missing, unknown, or has a wrong type or size. Permanent."""

    @classmethod
    def of(cls, problems: Sequence[tuple[str, str, str]], total: int | None = None) -> Self:
        """Create the error that lists what is wrong with a request.

        Args:
            problems: For each problem the argument (an element as ``interview_ids[3]``), what was
                expected, and what was received.
            total: Number of all problems; by default that of `problems`.
        """
        total = len(problems) if total is None else total
        named = problems[:MAX_LISTED_PROBLEMS]
        listed = "; ".join(f"{where}: expected {wanted}, got {got}" for where, wanted, got in named)
        return cls(
            f"The request is invalid: {listed}{_and_more(total, len(named))}.",
            {
                "total": total,
                "problems": [
                    {"argument": where, "expected": wanted, "got": got}
                    for where, wanted, got in named
                ],
            },
        )


class InvalidInterviewIdException(InterviewAccessError):  # noqa: N818 - the contract's name
    """Interview IDs are malformed (not a UUID) or unknown (no interview has them). Permanent.

    The whole job failed, and nothing was granted.
    """

    @classmethod
    def of(cls, malformed: Sequence[str], unknown: Sequence[str]) -> Self:
        """Create the error that lists the offending IDs, malformed ones first.

        Args:
            malformed: Strings that are not UUIDs, as given.
            unknown: Canonical IDs that no interview has.
        """
        total = len(malformed) + len(unknown)
        named = [(value, "malformed") for value in malformed[:MAX_LISTED_PROBLEMS]]
        named += [(value, "unknown") for value in unknown[: MAX_LISTED_PROBLEMS - len(named)]]
        words = {"malformed": "is not a UUID", "unknown": "is not the ID of an interview"}
        listed = "; ".join(f"{shortened(value)} {words[reason]}" for value, reason in named)
        return cls(
            f"{total} interview ID{'s' * (total != 1)} cannot be granted: "
            f"{listed}{_and_more(total, len(named))}. Nothing was granted.",
            {
                "total": total,
                "malformed_total": len(malformed),
                "unknown_total": len(unknown),
                "interview_ids": [
                    {"value": shortened(value, quoted=False), "reason": reason}
                    for value, reason in named
                ],
            },
        )


class JobIdReusedException(InterviewAccessError):  # noqa: N818 - the contract's name
    """A job ID was used for another request. Permanent: the first request keeps its result."""

    @classmethod
    def of(cls, job_id: str, first_digest: str, digest: str, others: Sequence[str] = ()) -> Self:
        """Create the error for a second request under one job ID.

        Args:
            job_id: The job ID.
            first_digest: The digest of the request that has the ID.
            digest: The digest of the refused request.
            others: IDs of other jobs of the same call that are refused for the same reason.
        """
        likewise = f" Other job IDs of this call in use: {len(others):,}." if others else ""
        return cls(
            f"Send this request under a job ID of its own: {shortened(job_id)} belongs to another "
            f"request, whose result stays.{likewise}",
            {
                "total": 1 + len(others),
                "job_id": job_id,
                "first_digest": shortened(first_digest, quoted=False),
                "digest": shortened(digest, quoted=False),
                **({"others": [*others]} if others else {}),
            },
        )


class StorageUnavailableException(InterviewAccessError):  # noqa: N818 - the contract's name
    """The database was unavailable.

    As a job's result it is not final: the job might have taken effect, and can be sent again under
    the same ID. As the reply to a control request it leaves the state of the job open.
    """

    @classmethod
    def of(cls, tries: int, reason: str) -> Self:
        """Create the error of a job that has no attempts left.

        Args:
            tries: Number of attempts.
            reason: The error of the last attempt.
        """
        return cls(
            f"The database was unavailable in all {tries} attempts; the last error: {reason}. "
            "The job might have taken effect; send it again under the same ID: "
            "it takes effect once.",
            {"total": 1, "tries": tries, "reason": reason},
        )

    @classmethod
    def of_ledger(cls, reason: str) -> Self:
        """Create the error of a control request.

        Args:
            reason: The error of the database.
        """
        return cls(
            f"The ledger cannot be read now: {reason}. The job's state is unknown. "
            "Send the request again.",
            {"total": 1, "reason": reason},
        )


class JobFailedError(InterviewAccessError):
    """The job failed for a reason that has no class of its own, such as a poison message."""

    @classmethod
    def of_pruned(cls, job_id: str, error_type: str) -> Self:
        """Create the error of a failed job of which the worker keeps no details any more.

        Args:
            job_id: The job's ID.
            error_type: Name of the class of its error.
        """
        return cls(
            f"Job {shortened(job_id)} failed before, with {error_type}; its details were deleted "
            "at the end of their retention. If it is still needed, send the request under a new "
            "job ID.",
            {"total": 1, "job_id": job_id, "exc_type": error_type},
        )


class JobCancelledException(InterviewAccessError):  # noqa: N818 - beside the contract's names
    """The job was cancelled before it finished. Permanent: nothing was granted."""

    state = "cancelled"

    @classmethod
    def of(cls, job_id: str) -> Self:
        """Create the error of a cancelled job.

        Args:
            job_id: The job's ID.
        """
        return cls(
            f"Job {shortened(job_id)} was cancelled before it finished; nothing was granted. "
            "If it is still needed, send the request under a new job ID.",
            {"total": 1, "job_id": job_id},
        )


class JobExpiredException(InterviewAccessError):  # noqa: N818 - beside the contract's names
    """The job's expiry passed before the job started. Permanent: nothing was granted."""

    state = "expired"

    @classmethod
    def of(cls, job_id: str, expires_at: str) -> Self:
        """Create the error of an expired job.

        Args:
            job_id: The job's ID.
            expires_at: Its expiry, in ISO 8601.
        """
        return cls(
            f"Job {shortened(job_id)} expired at {expires_at}, before a worker started it; nothing "
            "was granted. If it is still needed, send the request under a new job ID.",
            {"total": 1, "job_id": job_id, "expires_at": expires_at},
        )


class QueueUnavailableError(InterviewAccessError):
    """Redis did not accept the command or did not reply in time.

    The job might have been queued. Sending it again under the same job ID is safe: it takes effect
    once.
    """


class NoAnswerInTimeError(InterviewAccessError):
    """No result or reply was received by the caller's deadline.

    The job might still run, or no worker is running.
    """


def error_class(name: object) -> type[InterviewAccessError]:
    """Find the class of an error by its name.

    Args:
        name: Any value, as read from a stored result.

    Returns:
        The class of this module with the name; JobFailedError if there is none.
    """
    found = globals().get(name) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, InterviewAccessError):
        return found
    return JobFailedError


def _and_more(total: int, named: int) -> str:
    return f"; and {total - named} more" if total > named else ""
