"""Interviews, users and results of the jobs that a real worker executes."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

USER = "123e4567-e89b-12d3-a456-426614174000"
ONE, TWO = "89d96f4b-c19d-4e69-8eae-e818f3123b09", "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"
NO_UUID = "a1b2c3d4-e5f6-7g8h-9i0j-k1l2m3n4o5p6"
UNKNOWN = "00000000-0000-4000-8000-000000000000"
LIMIT = 25_000
CHUNK = 1_000
INVALID_REQUEST, INVALID_ID = "InvalidGrantRequestException", "InvalidInterviewIdException"


def many(count: int) -> list[str]:
    """Return the IDs of existing interviews, in order."""
    return [str(UUID(int=(0xA << 124) + number)) for number in range(count)]


def success(created: int) -> dict[str, Any]:
    """Return the result of a job that created so many grants."""
    return {"success": True, "created_access_count": created}


def a_user() -> str:
    """Return a user ID that no other test uses."""
    return str(uuid4())
