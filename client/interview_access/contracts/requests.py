"""Requests of the three tasks: the only place that decides which arguments are valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, LiteralString, Self
from uuid import UUID

from pydantic import (
    BaseModel,
    ConfigDict,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from interview_access.contracts.identifiers import (
    USER_ID_RULE,
    UUID_PATTERN,
    as_text,
    is_user_id,
    strings_of,
)
from interview_access.contracts.names import DEFAULT_MAX_INTERVIEW_IDS, MAX_USER_ID_LENGTH
from interview_access.errors import MAX_LISTED_PROBLEMS, InvalidGrantRequestException
from interview_access.text import describe, shortened

_INTEGER_USER_ID: LiteralString = "; convert an integer key: str(user.pk)"
_MODEL_OBJECTS: LiteralString = '; pass the IDs of the objects: values_list("pk", flat=True)'


def _user_id(value: object, info: ValidationInfo) -> object:
    text = as_text(value)
    if not is_user_id(text):
        raise PydanticCustomError("user_id", _user_id_rule(text, info))
    return text


def _user_id_rule(value: object, info: ValidationInfo) -> LiteralString:
    """Return what is expected; a caller in Python also learns how to convert Django's key."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    hinted = is_integer and (info.context or {}).get("in_python")
    return USER_ID_RULE + _INTEGER_USER_ID if hinted else USER_ID_RULE


def _user_ids(value: object, info: ValidationInfo) -> tuple[object, ...]:
    if not isinstance(value, list | tuple):
        raise PydanticCustomError("user_ids", "a list of user IDs")
    texts = tuple(map(as_text, value))
    wrong = [(at, text) for at, text in enumerate(texts) if not is_user_id(text)]
    if wrong:
        raise _wrong_elements(_user_id_rule(wrong[0][1], info), wrong, info)
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
    texts = strings_of(value)
    if texts is None:
        wrong = [(at, item) for at, item in enumerate(value) if not isinstance(item, str | UUID)]
        raise _wrong_elements("a UUID as a string", wrong, info)
    _check_count(len(texts), info)
    return texts


def _wrong_elements(
    expected: LiteralString, wrong: Sequence[tuple[int, object]], info: ValidationInfo
) -> PydanticCustomError:
    listed = MAX_LISTED_PROBLEMS
    # A caller in Python who passes Django's model objects needs one hint, not the list.
    if (info.context or {}).get("in_python") and hasattr(type(wrong[0][1]), "pk"):
        expected, listed = expected + _MODEL_OBJECTS, 1
    return PydanticCustomError(
        "elements", expected, {"elements": wrong[:listed], "total": len(wrong)}
    )


def _check_count(ids: int, info: ValidationInfo) -> None:
    """Check the number of requested grants: interview IDs as given, times user IDs as given."""
    limit: int | None = (info.context or {}).get("max_interview_ids", DEFAULT_MAX_INTERVIEW_IDS)
    users = len(info.data.get("user_ids", ())) or 1
    if limit is not None and ids * users > limit:
        expected: LiteralString = "at most {limit} IDs (GRANT_MAX_INTERVIEW_IDS)"
        if users > 1:
            expected = "at most {each} IDs for {users} users (GRANT_MAX_INTERVIEW_IDS is {limit})"
        values = {"limit": f"{limit:,}", "each": f"{limit // users:,}", "users": f"{users:,}"}
        raise PydanticCustomError("ids", expected, values)


_INTERVIEW_ID_SCHEMA = {
    "type": "string",
    "pattern": f"^(?:{UUID_PATTERN})$",
    "description": "A UUID: 32 ASCII hex digits, or 8-4-4-4-12 of them, in any case.",
}

_USER_ID_SCHEMA = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_USER_ID_LENGTH,
    "pattern": "^[^\\u0000]*$",
    "description": "Used literally. NUL and lone surrogates are not allowed.",
}

UserId = Annotated[str, PlainValidator(_user_id), WithJsonSchema(_USER_ID_SCHEMA)]

InterviewIds = Annotated[
    tuple[str, ...],
    PlainValidator(_interview_ids),
    WithJsonSchema(
        {
            "type": "array",
            "items": _INTERVIEW_ID_SCHEMA,
            "maxItems": DEFAULT_MAX_INTERVIEW_IDS,
            "description": "In any order; a duplicate counts once. The limit is the worker's "
            "GRANT_MAX_INTERVIEW_IDS, by default the number here.",
        }
    ),
]


class Request(BaseModel):
    """The arguments of a task. A subclass has a field for each, in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    @cache
    def parameters(cls) -> tuple[str, ...]:
        """Names of the arguments, in order."""
        return tuple(cls.model_fields)

    @classmethod
    def read(
        cls,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        *,
        max_interview_ids: int | None = DEFAULT_MAX_INTERVIEW_IDS,
        in_python: bool = False,
    ) -> Self:
        """Validate the arguments of a message.

        Args:
            args: Positional arguments, in the order of the fields.
            kwargs: Named arguments.
            max_interview_ids: Grants that one job may request: interview IDs as given, times user
                IDs as given; None for any number.
            in_python: Whether an error may say how a caller in Python converts the argument.

        Raises:
            InvalidGrantRequestException: if an argument is missing, unknown, given twice or
                invalid; it names each such argument.
        """
        names = cls.parameters()
        if len(args) > len(names):
            expected = f"at most {len(names)} in order ({', '.join(names)})"
            raise InvalidGrantRequestException.of([("arguments", expected, f"{len(args)}")])
        given = dict(zip(names, args, strict=False))
        twice = [(name, "one value", "two") for name in given if name in kwargs]
        if twice:
            raise InvalidGrantRequestException.of(twice)
        try:
            context = {"max_interview_ids": max_interview_ids, "in_python": in_python}
            return cls.model_validate({**given, **kwargs}, context=context)
        except ValidationError as error:
            raise _invalid(error, names) from None


def _invalid(error: ValidationError, names: Sequence[str]) -> InvalidGrantRequestException:
    problems: list[tuple[str, str, str]] = []
    total = 0
    known = f"only {' and '.join(names)}"
    for problem in error.errors(include_url=False):
        total += 1
        if not problem["loc"]:  # a name with a lone surrogate, at which pydantic stops
            name = shortened(str(problem["input"]), quoted=False)
            problems.append((name, known, "an unknown argument"))
            continue
        argument = shortened(str(problem["loc"][0]), quoted=False)
        if problem["type"] == "missing":
            problems.append((argument, "a value", "nothing"))
        elif problem["type"] == "extra_forbidden":
            got = f"an unknown argument with {describe(problem['input'])}"
            problems.append((argument, known, got))
        elif problem["type"] == "elements":
            total += problem["ctx"]["total"] - 1
            for at, item in problem["ctx"]["elements"]:
                problems.append((f"{argument}[{at}]", problem["msg"], describe(item)))
        else:
            problems.append((argument, problem["msg"], describe(problem["input"])))
    return InvalidGrantRequestException.of(problems, total)


class GrantAccessRequest(Request):
    """The arguments of ``interview_access.grant_access``: one user and many interviews.

    Attributes:
        user_id: 1 to 36 characters, used literally.
        interview_ids: Strings as given: in any order and spelling, with duplicates, also malformed.
    """

    user_id: UserId
    interview_ids: InterviewIds


class GrantCohortAccessRequest(Request):
    """The arguments of ``interview_access.grant_cohort_access``: many users and many interviews.

    Each user is granted access to each interview. The number of user IDs times that of interview
    IDs, both as given, is at most the worker's GRANT_MAX_INTERVIEW_IDS.

    Attributes:
        user_ids: Each of 1 to 36 characters, used literally; in any order, with duplicates.
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
                "description": "In any order; a duplicate counts once.",
            }
        ),
    ]
    interview_ids: InterviewIds


class CreateInterviewAttemptRequest(Request):
    """The arguments of ``interview_access.create_interview_attempt``: an attempt that starts now.

    Attributes:
        interview_id: A string as given, also malformed.
        user_id: 1 to 36 characters, used literally.
    """

    interview_id: Annotated[
        str, PlainValidator(_interview_id), WithJsonSchema(_INTERVIEW_ID_SCHEMA)
    ]
    user_id: UserId
