"""Digests of requests: whether two messages request the same.

SHA-256, in 64 hex digits, of a JSON array in ASCII without white space: the task's name, the user
ID (of a cohort: the sorted distinct user IDs), and the sorted distinct interview IDs, canonical if
they are UUIDs. Order, duplicates and spelling do not change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import eq
from typing import Self
from uuid import UUID

from interview_access.contracts.identifiers import (
    InterviewId,
    canonical_interview_id,
    canonical_interview_ids,
    is_interview_id,
    slices,
    strings_of,
)
from interview_access.contracts.names import GRANT_COHORT_ACCESS
from interview_access.contracts.requests import GrantAccessRequest, GrantCohortAccessRequest

_GRANT_PARAMETERS = GrantAccessRequest.parameters()
_COHORT_PARAMETERS = GrantCohortAccessRequest.parameters()

# Types that JSON lacks, such as dates, reach a worker through Celery's own JSON.
_json = json.JSONEncoder(default=repr, sort_keys=True, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class RequestedInterviews:
    """The interview IDs of a request, partitioned into valid and malformed ones.

    Attributes:
        wanted: Distinct canonical IDs, sorted.
        malformed: Distinct strings that are not UUIDs, in the order of their first appearance.
        given: All strings as given.
    """

    wanted: tuple[InterviewId, ...]
    malformed: tuple[str, ...]
    given: tuple[str, ...]

    @classmethod
    def among(cls, texts: Sequence[str]) -> Self:
        """Partition interview IDs as given."""
        canonical = canonical_interview_ids(texts)
        malformed: dict[str, None] = {}
        if len(canonical) < len(texts):
            malformed = dict.fromkeys(text for text in texts if not is_interview_id(text))
        wanted = sorted(canonical)
        if any(map(eq, wanted, islice(wanted, 1, None))):  # a set of a million takes 50 MB
            wanted = sorted(set(wanted))
        return cls(tuple(wanted), tuple(malformed), tuple(texts))

    @property
    def repeated(self) -> int:
        """Number of duplicates, in whatever spelling."""
        return len(self.given) - len(self.wanted) - len(self.malformed)

    def digest(self, task: str, users: str | Collection[str]) -> str:
        """Compute the request's digest.

        Args:
            task: The task's name.
            users: The user ID, or those of a cohort.
        """
        whose = users if isinstance(users, str) else sorted(set(users))
        content = hashlib.sha256(f"[{_json(task)},{_json(whose)},".encode("ascii"))
        if self.wanted and not self.malformed:
            # UUIDs need no escapes, for which a JSON encoder examines each character.
            separator = '["'
            for some in slices(self.wanted):
                content.update((separator + '","'.join(some)).encode("ascii"))
                separator = '","'
            content.update(b'"]')
        else:
            content.update(_json(sorted([*self.wanted, *self.malformed])).encode("ascii"))
        content.update(b"]")
        return content.hexdigest()

    def given_json(self) -> str:
        """Encode the IDs as given as a JSON array."""
        if self.given and not self.malformed:  # UUIDs need no escapes, in any spelling
            return '["' + '", "'.join(self.given) + '"]'
        return json.dumps(self.given)

    def spelled(self, interview_ids: Collection[str]) -> dict[str, InterviewId]:
        """Map each spelling as given to its canonical ID, in order, for these canonical IDs."""
        spellings = {text: canonical_interview_id(text) for text in self.given}
        return {text: one for text, one in spellings.items() if one and one in interview_ids}


def request_digest(task: str, users: str | Collection[str], interview_ids: Sequence[str]) -> str:
    """Compute the digest of a request.

    Args:
        task: The task's name.
        users: The user ID, or those of a cohort.
        interview_ids: Strings as given, also malformed ones.
    """
    return RequestedInterviews.among(interview_ids).digest(task, users)


def unreadable_request_digest(
    task: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> str:
    """Compute the digest of a message's arguments, which need not be valid.

    If they have the types of a grant request (more IDs than allowed, say), it is the digest of that
    request. Otherwise it is the digest of the arguments as given.

    Args:
        task: The task's name.
        args: Positional arguments.
        kwargs: Named arguments.

    Raises:
        TypeError, ValueError, RecursionError: if the arguments cannot be encoded as JSON.
    """
    is_cohort = task == GRANT_COHORT_ACCESS
    parameters = _COHORT_PARAMETERS if is_cohort else _GRANT_PARAMETERS
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    interview_ids = _strings_in(given.get("interview_ids"))
    if len(given) == len(parameters) and interview_ids is not None:
        user_id, user_ids = given.get("user_id"), given.get("user_ids")
        users = _strings_in(user_ids) if is_cohort else _string_in(user_id)
        if users is not None:
            return request_digest(task, users, interview_ids)
    return hashlib.sha256(_json([task, list(args), dict(kwargs)]).encode("ascii")).hexdigest()


def _string_in(value: object) -> str | None:
    return str(value) if isinstance(value, str | UUID) else None


def _strings_in(value: object) -> tuple[str, ...] | None:
    return strings_of(value) if isinstance(value, list | tuple) else None
