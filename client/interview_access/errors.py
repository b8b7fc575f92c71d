"""What can go wrong with a job, as producers of every language read it.

Each class here that a worker stores is read from a result as ``exc_type`` (the class's name),
``exc_module`` (this module's) and ``exc_message`` (``[sentence, details]``). Its arguments are
therefore plain JSON values, and nothing else may ever be put into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

Details = dict[str, Any]
"""A JSON object for programs: at least ``total``, the number of offending values."""

NAMED_AT_MOST = 20
"""Offending values that an error names; ``total`` counts the rest."""

_SENTENCE = 30_000  # characters: more than that many offending values take


class InterviewAccessError(Exception):
    """Base of every error of this package.

    Attributes:
        sentence: One sentence for people, on one line and without control characters, whatever
            values it names.
        details: The same as a JSON object for programs.
        state: The state of a job that ended with it.
    """

    state: ClassVar[Literal["failed", "cancelled", "expired"]] = "failed"

    def __init__(self, sentence: str, details: Details | None = None) -> None:
        self.sentence = shortened(sentence, quoted=False, at_most=_SENTENCE)
        self.details = details or {}
        super().__init__(self.sentence, self.details)

    def __str__(self) -> str:
        return self.sentence

    def with_account(self, job_ids: Sequence[str], *, sent: int, perhaps_sent: int = 0) -> Self:
        """The same error, met while many jobs were sent, with what became of each of them.

        Args:
            job_ids: All of them, in the order in which they are sent.
            sent: How many are on the queue.
            perhaps_sent: How many after those may be, because no answer came.
        """
        asked = sent + perhaps_sent
        return type(self)(
            f"{self.sentence} Of {len(job_ids):,} jobs {sent:,} were sent, {perhaps_sent:,} may "
            f"have been, and {len(job_ids) - asked:,} were not; the details name them. "
            "A job that is sent again under its id counts once.",
            {
                **self.details,
                "sent": [*job_ids[:sent]],
                "perhaps_sent": [*job_ids[sent:asked]],
                "not_sent": [*job_ids[asked:]],
            },
        )


class InvalidGrantRequestException(InterviewAccessError):  # noqa: N818 - the contract's name
    """An argument is missing, unknown or of the wrong type or size. Permanent."""

    @classmethod
    def of(cls, problems: Sequence[tuple[str, str, str]], total: int | None = None) -> Self:
        """The error that names what is wrong with a request.

        Args:
            problems: For each: the argument (an element as ``interview_ids[3]``), what was
                expected, what came.
            total: How many there are, where not all were collected.
        """
        total = len(problems) if total is None else total
        named = problems[:NAMED_AT_MOST]
        listed = "; ".join(f"{where}: expected {wanted}, got {got}" for where, wanted, got in named)
        return cls(
            f"The request cannot be read: {listed}{_and_more(total, len(named))}.",
            {
                "total": total,
                "problems": [
                    {"argument": where, "expected": wanted, "got": got}
                    for where, wanted, got in named
                ],
            },
        )


class InvalidInterviewIdException(InterviewAccessError):  # noqa: N818 - the contract's name
    """Interview ids are malformed (no UUID) or unknown (no interview has them). Permanent.

    The whole job failed with it, and nothing was granted.
    """

    @classmethod
    def of(cls, malformed: Sequence[str], unknown: Sequence[str]) -> Self:
        """The error that names the offending ids, malformed ones first, each with its reason.

        Args:
            malformed: Strings that are no UUID, as given.
            unknown: Canonical ids that no interview has.
        """
        total = len(malformed) + len(unknown)
        named = [(value, "malformed") for value in malformed[:NAMED_AT_MOST]]
        named += [(value, "unknown") for value in unknown[: NAMED_AT_MOST - len(named)]]
        words = {"malformed": "is not a UUID", "unknown": "is no interview's id"}
        listed = "; ".join(f"{shortened(value)} {words[reason]}" for value, reason in named)
        return cls(
            f"{total} interview id{'s' * (total != 1)} cannot be granted: "
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
    """A job id came again with another request. Permanent: the first answer stays."""

    @classmethod
    def of(cls, job_id: str, first_digest: str, digest: str, others: Sequence[str] = ()) -> Self:
        """The refusal of a second request under one job id, both named by their digests.

        Args:
            job_id: The id.
            first_digest: Of the request that has it.
            digest: Of the request that was to have it.
            others: Job ids sent with this one that are refused likewise.
        """
        likewise = f" So were {len(others):,} more ids that came with it." if others else ""
        return cls(
            f"Job id {shortened(job_id)} was used before for another request: expected the request "
            f"with digest {shortened(first_digest, quoted=False)}, got one with digest "
            f"{shortened(digest, quoted=False)}.{likewise} "
            "Send the new request under a job id of its own.",
            {
                "total": 1 + len(others),
                "job_id": job_id,
                "first_digest": shortened(first_digest, quoted=False),
                "digest": shortened(digest, quoted=False),
                **({"others": [*others]} if others else {}),
            },
        )


class StorageUnavailableException(InterviewAccessError):  # noqa: N818 - the contract's name
    """The database could not do the job within all of its tries.

    Not final: nothing was granted, and the same job can be sent again under its id.
    """

    @classmethod
    def of(cls, tries: int, reason: str) -> Self:
        """The error of a job whose tries are used up.

        Args:
            tries: How often it was tried.
            reason: What the database said the last time.
        """
        return cls(
            f"The database could not do the job in {tries} tries; the last said: {reason}. "
            "Nothing was granted; send the job again under the same id.",
            {"total": 1, "tries": tries, "reason": reason},
        )


class JobFailedError(InterviewAccessError):
    """The job failed for a cause that is none of the contract's, such as a lost worker."""


class JobCancelledException(InterviewAccessError):  # noqa: N818 - beside the contract's names
    """The job was cancelled before it was done. Permanent: nothing was granted."""

    state = "cancelled"

    @classmethod
    def of(cls, job_id: str) -> Self:
        """The error of a job that somebody had cancelled."""
        return cls(
            f"Job {shortened(job_id)} was cancelled before it was done; nothing was granted. "
            "To have it done after all, send the request under a new job id.",
            {"total": 1, "job_id": job_id},
        )


class JobExpiredException(InterviewAccessError):  # noqa: N818 - beside the contract's names
    """The job's own expiry passed before it began. Permanent: nothing was granted."""

    state = "expired"

    @classmethod
    def of(cls, job_id: str, expires_at: str) -> Self:
        """The error of a job that no worker was free for in time.

        Args:
            job_id: The job's id.
            expires_at: Its expiry, in ISO 8601.
        """
        return cls(
            f"Job {shortened(job_id)} expired at {expires_at}, before a worker began it; nothing "
            "was granted. To have it done after all, send the request under a new job id.",
            {"total": 1, "job_id": job_id, "expires_at": expires_at},
        )


class QueueUnavailableError(InterviewAccessError):
    """Redis did not take the job, or did not answer, in time. It may have been queued all the same.

    Sending it again under the same job id is safe: it takes effect once.
    """


class NoAnswerInTimeError(InterviewAccessError):
    """No answer came by the caller's deadline: the job may still run, or no worker is there."""


def error_class(name: object) -> type[InterviewAccessError]:
    """Find an error's class by any name; JobFailedError where no class here has it."""
    found = globals().get(name) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, InterviewAccessError):
        return found
    return JobFailedError


def shortened(text: str, *, quoted: bool = True, at_most: int = 80) -> str:
    """Cut a text to ``at_most`` characters, and escape those that do not print.

    The result is one line, safe in logs, on terminals and in every JSON reader: line breaks,
    terminal control sequences, NUL and lone surrogates come as escapes.
    """
    shown = text if len(text) <= at_most else text[:at_most] + "…"
    if quoted:
        return repr(shown)
    if shown.isprintable():
        return shown
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown
    )


def _and_more(total: int, named: int) -> str:
    return f"; and {total - named} more" if total > named else ""
