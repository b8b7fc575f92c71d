"""The two stored forms of an error."""

from __future__ import annotations

import json
from typing import Any

import pytest
from interview_access import errors
from interview_access.errors import InterviewAccessError, JobFailedError
from interview_access.stored_errors import (
    from_record,
    from_result,
    record_of_result,
    stored_type,
    to_record,
    to_result,
)

ERRORS = [
    errors.InvalidInterviewIdException.of(["no-uuid"], []),
    errors.StorageUnavailableException.of(17, "away"),
    errors.JobCancelledException.of("job"),
    JobFailedError("It failed."),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_both_forms_keep_the_error(error: InterviewAccessError) -> None:
    """An error that is encoded and decoded has its class, sentence and details."""
    for decoded in (
        from_result(json.loads(json.dumps(to_result(error)))),
        from_record(json.loads(json.dumps(to_record(error)))),
    ):
        assert type(decoded) is type(error)
        assert decoded.args == error.args
    assert record_of_result(to_result(error)) == to_record(error)


@pytest.mark.parametrize(
    "result",
    [
        {"exc_type": "WorkerLostError", "exc_module": "billiard", "exc_message": ["Exit 9"]},
        {"exc_type": "JobFailedError", "exc_module": "other", "exc_message": ["No.", {}]},
        {"exc_type": "LaterError", "exc_module": errors.__name__, "exc_message": ["No.", {}]},
        {"exc_type": "JobExpiredException", "exc_module": errors.__name__, "exc_message": "No."},
        {"exc_type": None},
        "text",
        None,
    ],
    ids=str,
)
def test_any_other_result_is_a_job_failed_error(result: Any) -> None:
    """A result that is not one of this package's errors is decoded as JobFailedError."""
    decoded = from_result(result)
    assert type(decoded) is JobFailedError
    assert decoded.sentence.startswith("The job failed: ")
    assert record_of_result(result)["sentence"]


def test_a_record_keeps_the_name_of_a_later_class() -> None:
    """The error of a later release keeps its name, sentence and details in a status."""
    later = {"exc_type": "LaterError", "exc_module": errors.__name__, "exc_message": ["No.", {}]}
    assert record_of_result(later) == {"type": "LaterError", "sentence": "No.", "details": {}}
    assert stored_type(later) == "LaterError"
