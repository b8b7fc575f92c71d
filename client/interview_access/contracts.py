"""The contract between producers and workers, version 1: names, requests, results, digests.

Knows nothing of Celery, of Redis or of a database. What a request may hold is decided here and
nowhere else, by one strict rule for each argument.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from operator import eq
from typing import Annotated, Any, Literal, LiteralString, NewType, Self
from uuid import UUID, uuid4

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from interview_access.errors import NAMED_AT_MOST, InvalidGrantRequestException, shortened

QUEUE = "interview-access"
GRANT_ACCESS = "interview_access.grant_access"
GRANT_COHORT_ACCESS = "interview_access.grant_cohort_access"
CREATE_INTERVIEW_ATTEMPT = "interview_access.create_interview_attempt"

CONTROL_QUEUE = "interview-access-control"
JOB_STATUS = "interview_access.job_status"
CANCEL_JOB = "interview_access.cancel_job"
"""Control requests about a job, by its ID: workers answer them at once, however busy they are, with
a :class:`JobStatus`."""

REPLY_BYTES = 256 * 1024
"""Size of the reply to a control request, about, beyond which it omits entries of a status."""

PROGRESS = "PROGRESS"
"""State of a job of several chunks while it runs; its result is then a :class:`JobProgress`."""

DEFAULT_MAX_INTERVIEW_IDS = 100_000
"""Grants that one job may ask for, ids as given, where a worker is not told otherwise."""

InterviewId = NewType("InterviewId", str)
"""An interview's id in canonical form: lower case, 8-4-4-4-12."""

_UUID = re.compile("[0-9A-Fa-f]{32}|[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_SHAPE = bytes(
    ord("h") if one in b"0123456789abcdef" else one if one in b"-\n" else ord("?")
    for one in range(256)
)
_TOGETHER = 10_000  # ids of which something is made at once
_USER_ID_LENGTH = 36
_USER_ID_RULE: LiteralString = "a string of 1 to 36 characters without NUL or lone surrogates"
_JOB_ID_LENGTH = 255

JOB_ID_RULE = f"1 to {_JOB_ID_LENGTH} printable characters"
"""What :func:`is_job_id` asks for, in words."""


def canonical_interview_id(text: str) -> InterviewId | None:
    """The canonical form of a UUID's spelling, or None where the text is no UUID.

    A UUID is exactly 32 ASCII hex digits, or 8-4-4-4-12 of them, in any case. (``uuid.UUID`` takes
    far more, and names other ids by it.)
    """
    canonical = _canonical([text])
    return canonical[0] if canonical else None


def _canonical(texts: Iterable[str]) -> list[InterviewId]:
    """The canonical forms of those texts that are UUIDs, in order; made for 100,000 at once."""
    texts = list(texts)
    if _all_canonical(texts):
        return texts  # type: ignore[return-value] # InterviewId() costs as much as the rest
    matching = map(str.lower, filter(_UUID.fullmatch, texts))
    return [text if text[8] == "-" else _hyphenated(text) for text in matching]  # type: ignore[misc] # see above


def _all_canonical(texts: Sequence[str]) -> bool:
    """Whether each is a UUID in canonical form; 100,000 are looked at in a few milliseconds."""
    return all(map(_are_canonical, _slices(texts)))


def _are_canonical(texts: Sequence[str]) -> bool:
    lines = "\n".join([*texts, ""]).encode(errors="replace")
    return lines.translate(_SHAPE) == b"hhhhhhhh-hhhh-hhhh-hhhh-hhhhhhhhhhhh\n" * len(texts)


def _slices(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Ten thousand at a time: what is made of a million of them at once takes hundreds of MB."""
    return (texts[at : at + _TOGETHER] for at in range(0, len(texts), _TOGETHER))


def _hyphenated(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def as_text(value: object) -> object:
    """A UUID object as its string; what is none is for the worker to name."""
    return str(value) if isinstance(value, UUID) else value


def as_texts(values: object) -> object:
    """Whatever can be gone through, as a list, its UUID objects as strings; likewise."""
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        return values
    listed = list(values)
    return listed if _are_strings(listed) else [as_text(one) for one in listed]


def _are_strings(values: Sequence[object]) -> bool:
    """Whether each is just a string; 100,000 are looked at in a few milliseconds."""
    return set(map(type, values)) <= {str}


def is_job_id(value: object) -> bool:
    """Whether the value can be a job's id: 1 to 255 printable characters."""
    return isinstance(value, str) and 1 <= len(value) <= _JOB_ID_LENGTH and value.isprintable()


def describe(value: object) -> str:
    """What a value is, in a few words and in JSON's terms, for the sentence of an error."""
    match value:
        case None:
            words = "null"
        case bool():
            words = str(value).lower()
        case int() | float():
            words = f"the number {shortened(repr(value), quoted=False)}"
        case str() if len(value) > _USER_ID_LENGTH:
            words = f"a string of {len(value):,} characters, {shortened(value)}"
        case str():
            words = f"the string {shortened(value)}"
        case list() | tuple():
            words = f"a list of {len(value):,}"
        case Mapping():
            words = f"an object of {len(value):,}"
        case _:
            words = f"a {type(value).__name__}"
    return words


def _is_user_id(text: object) -> bool:
    return (
        isinstance(text, str)
        and 1 <= len(text) <= _USER_ID_LENGTH
        and "\0" not in text
        and not any("\ud800" <= character <= "\udfff" for character in text)
    )


def _user_id(value: object) -> object:
    text = as_text(value)
    if not _is_user_id(text):
        raise PydanticCustomError("user_id", _USER_ID_RULE)
    return text


def _user_ids(value: object, info: ValidationInfo) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("user_ids", "a list of user ids")
    texts = tuple(map(as_text, value))
    wrong = [(at, text) for at, text in enumerate(texts) if not _is_user_id(text)]
    if wrong:
        raise _wrong_elements(_USER_ID_RULE, wrong)
    _check_count(len(texts), info)
    return texts


def _interview_id(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str):
        raise PydanticCustomError("interview_id", "a UUID as a string")
    return value


def _interview_ids(value: object, info: ValidationInfo) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("interview_ids", "a list of UUIDs as strings")
    texts = _texts(value)
    if texts is None:
        wrong = [(at, item) for at, item in enumerate(value) if not isinstance(item, str | UUID)]
        raise _wrong_elements("a UUID as a string", wrong)
    _check_count(len(texts), info)
    return texts


def _wrong_elements(
    expected: LiteralString, wrong: Sequence[tuple[int, object]]
) -> PydanticCustomError:
    named = {"elements": wrong[:NAMED_AT_MOST], "total": len(wrong)}
    return PydanticCustomError("elements", expected, named)


def _check_count(ids: int, info: ValidationInfo) -> None:
    """Raise where a job would ask for too many grants, that of a user for an interview each."""
    limit: int = (info.context or {}).get("max_interview_ids", DEFAULT_MAX_INTERVIEW_IDS)
    users = len(info.data.get("user_ids", ())) or 1
    if ids * users > limit:
        expected: LiteralString = "at most {limit} ids (GRANT_MAX_INTERVIEW_IDS)"
        if users > 1:
            expected = "at most {each} ids for {users} users (GRANT_MAX_INTERVIEW_IDS is {limit})"
        values = {"limit": f"{limit:,}", "each": f"{limit // users:,}", "users": f"{users:,}"}
        raise PydanticCustomError("ids", expected, values)


def _texts(values: Sequence[object]) -> tuple[str, ...] | None:
    """The elements as strings, or None where one is neither a string nor a UUID object."""
    if _are_strings(values):
        return tuple(values)  # type: ignore[arg-type] # they are strings
    texts = tuple(str(value) if isinstance(value, UUID) else value for value in values)
    return texts if all(isinstance(text, str) for text in texts) else None  # type: ignore[return-value] # all() is no type guard


_INTERVIEW_ID_SCHEMA = {
    "type": "string",
    "pattern": f"^(?:{_UUID.pattern})$",
    "description": "A UUID: 32 ASCII hex digits, or 8-4-4-4-12 of them, in any case.",
}

_USER_ID_SCHEMA = {
    "type": "string",
    "minLength": 1,
    "maxLength": _USER_ID_LENGTH,
    "pattern": "^[^\\u0000]*$",
    "description": "Taken to the letter; no NUL, no lone surrogate.",
}

UserId = Annotated[str, PlainValidator(_user_id), WithJsonSchema(_USER_ID_SCHEMA)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def read(
        cls,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        max_interview_ids: int = DEFAULT_MAX_INTERVIEW_IDS,
    ) -> Self:
        """The request that a message's arguments make.

        Args:
            args: Positional arguments, in the order of the contract.
            kwargs: Named arguments.
            max_interview_ids: Ids as given that one job may hold.

        Raises:
            InvalidGrantRequestException: naming each argument that is missing, unknown, given
                twice, or not what was expected.
        """
        names = list(cls.model_fields)
        if len(args) > len(names):
            expected = f"at most {len(names)} in order ({', '.join(names)})"
            raise InvalidGrantRequestException.of([("arguments", expected, f"{len(args)}")])
        given = dict(zip(names, args, strict=False))
        twice = [(name, "one value", "two") for name in given if name in kwargs]
        if twice:
            raise InvalidGrantRequestException.of(twice)
        try:
            return cls.model_validate(
                {**given, **kwargs}, context={"max_interview_ids": max_interview_ids}
            )
        except ValidationError as error:
            raise _invalid(error, names) from None


def _invalid(error: ValidationError, names: Sequence[str]) -> InvalidGrantRequestException:
    problems: list[tuple[str, str, str]] = []
    total = 0
    known = f"only {' and '.join(names)}"
    for problem in error.errors(include_url=False):
        total += 1
        if not problem["loc"]:  # a name with a lone surrogate: pydantic reads no further than that
            name = shortened(str(problem["input"]), quoted=False)
            problems.append((name, known, "this one too"))
            continue
        argument = shortened(str(problem["loc"][0]), quoted=False)
        if problem["type"] == "missing":
            problems.append((argument, "a value", "nothing"))
        elif problem["type"] == "extra_forbidden":
            problems.append((argument, known, f"this one too, {describe(problem['input'])}"))
        elif problem["type"] == "elements":
            total += problem["ctx"]["total"] - 1
            for at, item in problem["ctx"]["elements"]:
                problems.append((f"{argument}[{at}]", problem["msg"], describe(item)))
        else:
            problems.append((argument, problem["msg"], describe(problem["input"])))
    return InvalidGrantRequestException.of(problems, total)


InterviewIds = Annotated[
    tuple[str, ...],
    PlainValidator(_interview_ids),
    WithJsonSchema(
        {
            "type": "array",
            "items": _INTERVIEW_ID_SCHEMA,
            "maxItems": DEFAULT_MAX_INTERVIEW_IDS,
            "description": "In any order; a repeated id counts once. The limit is the "
            "worker's GRANT_MAX_INTERVIEW_IDS.",
        }
    ),
]


class GrantAccessRequest(_Request):
    """What ``interview_access.grant_access`` is asked: one user's access to many interviews.

    Attributes:
        user_id: 1 to 36 characters, taken to the letter.
        interview_ids: Strings as given: any order, spelling and repetition, also what is no UUID.
    """

    user_id: UserId
    interview_ids: InterviewIds


class GrantCohortAccessRequest(_Request):
    """What ``interview_access.grant_cohort_access`` is asked: many users' access to each of many.

    Both lists as given, multiplied, are at most the worker's GRANT_MAX_INTERVIEW_IDS.

    Attributes:
        user_ids: Each of 1 to 36 characters, taken to the letter; any order and repetition.
        interview_ids: As of ``interview_access.grant_access``.
    """

    user_ids: Annotated[
        tuple[str, ...],
        PlainValidator(_user_ids),
        WithJsonSchema(
            {
                "type": "array",
                "items": _USER_ID_SCHEMA,
                "maxItems": DEFAULT_MAX_INTERVIEW_IDS,
                "description": "In any order; a repeated id counts once.",
            }
        ),
    ]
    interview_ids: InterviewIds


@dataclass(frozen=True, slots=True)
class GrantJob:
    """One of many jobs to be enqueued together: one user's access to interviews, not judged yet.

    Attributes:
        user_id: 1 to 36 characters.
        interview_ids: UUIDs.
        job_id: 1 to 255 printable characters, one for each request; a random UUID where none is
            given, so that whoever holds the job can poll it, or send it again.
        countdown: Seconds before which no worker begins it.
        expires: Seconds, or a datetime (UTC where it has no zone), after which none does.
    """

    user_id: str | UUID
    interview_ids: Iterable[str | UUID]
    job_id: str = field(default_factory=lambda: str(uuid4()))
    countdown: float | None = None
    expires: float | datetime | None = None

    def __post_init__(self) -> None:
        # What can be gone through only once would be gone when the job is sent again.
        object.__setattr__(self, "interview_ids", as_texts(self.interview_ids))


class CreateInterviewAttemptRequest(_Request):
    """What ``interview_access.create_interview_attempt`` is asked: one attempt, starting now.

    Attributes:
        interview_id: A string as given, also one that is no UUID.
        user_id: 1 to 36 characters, taken to the letter.
    """

    interview_id: Annotated[
        str, PlainValidator(_interview_id), WithJsonSchema(_INTERVIEW_ID_SCHEMA)
    ]
    user_id: UserId


@dataclass(frozen=True, slots=True)
class RequestedInterviews:
    """Interview ids as given, told apart.

    Attributes:
        wanted: Canonical ids, each once, sorted: whoever sorts them again has it for nothing.
        malformed: Strings that are no UUID, each once, in the order of their first appearance.
        given: All of them, as given.
    """

    wanted: tuple[InterviewId, ...]
    malformed: tuple[str, ...]
    given: tuple[str, ...]

    @classmethod
    def among(cls, texts: Sequence[str]) -> Self:
        """Tell the ids apart."""
        canonical = _canonical(texts)
        malformed: dict[str, None] = {}
        if len(canonical) < len(texts):
            malformed = dict.fromkeys(text for text in texts if not _UUID.fullmatch(text))
        wanted = sorted(canonical)
        if any(map(eq, wanted, islice(wanted, 1, None))):  # a set of a million takes 50 MB
            wanted = sorted(set(wanted))
        return cls(tuple(wanted), tuple(malformed), tuple(texts))

    @property
    def repeated(self) -> int:
        """How many were given again, in whatever spelling."""
        return len(self.given) - len(self.wanted) - len(self.malformed)

    def digest(self, task: str, whose: str | Collection[str]) -> str:
        """What tells whether two messages ask for the same: SHA-256, 64 hex digits.

        Taken over the task's name, the user id (or the sorted distinct ones) and the sorted
        distinct interview ids, canonical where they are UUIDs, as a JSON array in ASCII without
        white space. Order, spelling and repetition do not change it.
        """
        users = whose if isinstance(whose, str) else sorted(set(whose))
        content = hashlib.sha256(f"[{_json(task)},{_json(users)},".encode("ascii"))
        if self.wanted and not self.malformed:
            # None needs an escape, for which a JSON encoder looks at each character.
            separator = '["'
            for some in _slices(self.wanted):
                content.update((separator + '","'.join(some)).encode("ascii"))
                separator = '","'
            content.update(b'"]')
        else:
            content.update(_json(sorted([*self.wanted, *self.malformed])).encode("ascii"))
        content.update(b"]")
        return content.hexdigest()

    def spelled(self, interview_ids: Collection[str]) -> dict[str, InterviewId]:
        """These canonical ids by each of their spellings, in the order as given."""
        spellings = {text: canonical_interview_id(text) for text in self.given}
        return {text: one for text, one in spellings.items() if one and one in interview_ids}


def request_digest(task: str, whose: str | Collection[str], interview_ids: Sequence[str]) -> str:
    """What tells whether two messages ask for the same: :meth:`RequestedInterviews.digest`."""
    return RequestedInterviews.among(interview_ids).digest(task, whose)


def unreadable_request_digest(
    task: str, args: Sequence[object], kwargs: Mapping[str, object]
) -> str:
    """The digest of a request that cannot be read: over its arguments as they came.

    Where they are a user id, or a list of them, and a list of strings all the same (more of them
    than allowed, say), it is the digest that a readable request of that content has.
    """
    of_cohort = task == GRANT_COHORT_ACCESS
    request = GrantCohortAccessRequest if of_cohort else GrantAccessRequest
    given = {**dict(zip(request.model_fields, args, strict=False)), **kwargs}
    user_id, user_ids = given.get("user_id"), _listed(given.get("user_ids"))
    interview_ids = _listed(given.get("interview_ids"))
    if len(given) == 2 and interview_ids is not None:  # noqa: PLR2004
        if of_cohort and user_ids is not None:
            return request_digest(task, user_ids, interview_ids)
        if not of_cohort and isinstance(user_id, str | UUID):
            return request_digest(task, str(user_id), interview_ids)
    return _sha256(_json([task, list(args), dict(kwargs)]))


def _listed(value: object) -> tuple[str, ...] | None:
    return _texts(value) if isinstance(value, list | tuple) else None


def _json(content: object) -> str:
    # Types that JSON lacks (dates, say) reach a worker through Celery's own JSON.
    return json.dumps(content, default=repr, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class GrantAccessResult(_Result):
    """The result of a grant-access job, also of a cohort's.

    Attributes:
        created_access_count: The rows that this job inserted.
    """

    success: Literal[True] = True
    created_access_count: int


class InterviewAttemptResult(_Result):
    """The result of a create-interview-attempt job."""

    success: Literal[True] = True
    interview_attempt_id: str


class JobProgress(BaseModel):
    """How far a running job of several chunks is: grants done, of the total it was asked for."""

    model_config = ConfigDict(defer_build=True)  # the first who needs it builds it

    done: int
    total: int


class JobFailure(BaseModel):
    """Why a job failed, was cancelled or expired.

    Attributes:
        type: The name of the error's class.
        sentence: For people.
        details: For programs.
    """

    model_config = ConfigDict(defer_build=True)  # the first who needs it builds it

    type: str
    sentence: str
    details: dict[str, Any] = {}


# pydantic's own strings have no lone surrogates, of which JSON allows the escape.
_AsGiven = Annotated[
    list[str], PlainValidator(list), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired", "unknown"]

FINAL_STATES: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled", "expired"})


class JobStatus(BaseModel):
    """What is known of a job; what is not known, or does not apply, is left out of its JSON.

    Attributes:
        state: ``queued``: sent, and no worker has begun it, or it waits for another try.
            ``running``: a worker has begun it.
            ``cancelled`` and ``expired``: it was not done and never will be. ``unknown``: nobody
            has announced a job of this id, and none was begun or finished under it.
        cancel_requested: It was asked to be cancelled and has not ended yet: unless it is about to
            finish, it stops at its next chunk; unless it has begun, it never will.
        progress: While it runs, in several chunks.
        requested: Ids as given; the sum of the three that follow. Where it succeeded.
        repeated: Given again, in whatever spelling.
        already_granted: Grants that stood before.
        created: Grants that this job made.
        created_by_user: How many of these each user had, where it was a job for a cohort.
        result: As the contract has it. Where it succeeded.
        error: Where it failed, was cancelled or expired.
        unknown_interview_ids: IDs that no interview has, as given, to be cut from the request:
            all of them, unless ``omitted`` names the field.
        malformed_interview_ids: IDs that are not UUIDs, likewise.
        omitted: How many entries of each field named here are omitted, where the whole status is
            larger than the 256 KB of a reply. `interview-access status JOB_ID --json` prints all.
    """

    model_config = ConfigDict(defer_build=True)  # the first who needs it builds it

    job_id: str
    state: JobState
    task: str | None = None
    user_id: str | None = None
    sent_at: datetime | None = None
    eta: datetime | None = None
    expires_at: datetime | None = None
    cancel_requested: Literal[True] | None = None
    progress: JobProgress | None = None
    requested: int | None = None
    repeated: int | None = None
    already_granted: int | None = None
    created: int | None = None
    created_by_user: dict[str, int] | None = None
    result: dict[str, Any] | None = None
    error: JobFailure | None = None
    unknown_interview_ids: _AsGiven | None = None
    malformed_interview_ids: _AsGiven | None = None
    omitted: dict[str, int] | None = None
    finished_at: datetime | None = None

    @property
    def final(self) -> bool:
        """Whether it will not change any more."""
        return self.state in FINAL_STATES


_NO_NUL = r"^[^\x00]*$"  # which PostgreSQL cannot store


class Announcement(BaseModel):
    """What makes a job's id known before a worker has begun it: stored with its message.

    Whoever enqueues without the client package may write one too, in the same MULTI as the message.

    Attributes:
        digest: Of the request, where the writer knows it: :func:`request_digest`.
    """

    model_config = ConfigDict(defer_build=True)  # the first who needs it builds it

    task: Annotated[str, Field(max_length=255, pattern=_NO_NUL)]
    digest: Annotated[str, Field(max_length=64, pattern=_NO_NUL)] | None = None
    sent_at: datetime
    eta: datetime | None = None
    expires_at: datetime | None = None
