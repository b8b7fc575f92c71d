"""Errors in their two stored forms: the only place that encodes and decodes them.

- A *result* in Redis, as Celery stores an exception: ``exc_type`` (the class's name),
  ``exc_module`` (:mod:`interview_access.errors`) and ``exc_message`` (``[sentence, details]``).
- A *record* in the ledger and in a job's status: ``type``, ``sentence`` and ``details``.

Producers can write results, so that decoding accepts any JSON value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interview_access import errors
from interview_access.errors import InterviewAccessError, JobFailedError, error_class, shortened

_FOREIGN = 500  # characters that are kept of an error that is not in the contract's form


def to_result(error: InterviewAccessError) -> dict[str, Any]:
    """Encode an error as a result in Redis."""
    return {
        "exc_type": type(error).__name__,
        "exc_message": [error.sentence, error.details],
        "exc_module": errors.__name__,
    }


def to_record(error: InterviewAccessError) -> dict[str, Any]:
    """Encode an error as a record of the ledger."""
    return {
        "type": type(error).__name__,
        "sentence": error.sentence,
        "details": error.details,
    }


def from_record(record: Mapping[str, Any]) -> InterviewAccessError:
    """Decode a record of the ledger, as JobFailedError if its class is unknown.

    Raises:
        KeyError: if the record has no ``type``, ``sentence`` or ``details``.
    """
    return error_class(record["type"])(record["sentence"], record["details"])


def from_result(result: object) -> InterviewAccessError:
    """Decode a result in Redis.

    Returns:
        The error in its own class, or a JobFailedError if the class is not of this package, as for
        the exceptions of Celery.
    """
    name = stored_type(result)
    match _field(result, "exc_message"):
        case [str(sentence), dict(details)] if name and error_class(name).__name__ == name:
            return error_class(name)(sentence, details)
    kind = shortened(str(_field(result, "exc_type")), quoted=False)
    return JobFailedError(_foreign(result), {"exc_type": kind})


def record_of_result(result: object) -> dict[str, Any]:
    """Convert a result in Redis to a record, which keeps the name of an unknown class."""
    name = str(_field(result, "exc_type"))
    match _field(result, "exc_message"):
        case [str(sentence), dict(details)]:
            return {"type": name, "sentence": sentence, "details": details}
    return {"type": name, "sentence": _foreign(result), "details": {}}


def stored_type(result: object) -> str | None:
    """Read the name of the error's class in a result.

    Returns:
        The name, also of a class that only a later release has; None if it is not of this package.
    """
    name = _field(result, "exc_type")
    is_ours = _field(result, "exc_module") == errors.__name__
    return name if is_ours and isinstance(name, str) else None


def _field(result: object, name: str) -> object:
    return result.get(name) if isinstance(result, Mapping) else None


def _foreign(result: object) -> str:
    message = _field(result, "exc_message")
    reason = message[0] if isinstance(message, list) and message else message
    text = f"{_field(result, 'exc_type')}: {reason}"
    return f"The job failed: {shortened(text, quoted=False, at_most=_FOREIGN)}"
