"""Who requested a job, and why: the optional headers ``actor`` and ``reason`` of a message.

They are kept with the job's outcome, and do not belong to the request: its digest ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from interview_access.contracts.identifiers import as_text
from interview_access.text import describe, shortened

ORIGIN_LENGTHS: Mapping[str, int] = {"actor": 255, "reason": 1_000}
"""Largest number of characters of each header. They must be printable."""


def origin_headers(actor: str | UUID | None, reason: str | None) -> dict[str, str]:
    """Validate an actor and a reason, and return the headers of those that are given.

    Args:
        actor: Who requests the job, 1 to 255 printable characters.
        reason: Why, 1 to 1,000 printable characters.

    Raises:
        ValueError: if one of them is invalid.
    """
    headers: dict[str, str] = {}
    for name, value in (("actor", as_text(actor)), ("reason", reason)):
        if value is None:
            continue
        if not isinstance(value, str) or value != readable_origin(name, value):
            rule = f"1 to {ORIGIN_LENGTHS[name]:,} printable characters"
            raise ValueError(f"{name}: expected {rule}, got {describe(value)}")
        headers[name] = value
    return headers


def readable_origin(name: str, value: object) -> str | None:
    """Return what a worker keeps of a header, whatever its producer sent.

    Characters that do not print are escaped, and a text that is too long is cut.

    Args:
        name: ``actor`` or ``reason``.
        value: The header's value.

    Returns:
        The text; None if the value is not a string, or empty.
    """
    if not isinstance(value, str):
        return None
    limit = ORIGIN_LENGTHS[name]
    return shortened(value, quoted=False, at_most=limit)[:limit] or None
