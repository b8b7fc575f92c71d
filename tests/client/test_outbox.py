"""The arguments of the outbox helpers, which are checked before anything is inserted."""

from __future__ import annotations

from typing import Any, cast
from uuid import UUID

import pytest
from interview_access.outbox import enqueue_in_sqlalchemy
from sqlalchemy import Connection


@pytest.mark.parametrize(
    "job_id", [UUID(int=1), 7, b"job", ["job"], "", "x" * 256, "Zo\xeb"], ids=str
)
def test_an_invalid_job_id_raises_a_value_error(job_id: Any) -> None:
    """A job ID of another type, length or alphabet is refused with a ValueError."""
    unused = cast("Connection", None)
    with pytest.raises(ValueError, match="expected 1 to 255 printable ASCII characters, got "):
        enqueue_in_sqlalchemy(unused, "ann", [], job_id=job_id)
