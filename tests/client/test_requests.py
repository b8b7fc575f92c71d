"""The rules of the contract for requests: IDs, digests, validation."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interview_access.contracts import (
    GRANT_ACCESS,
    GrantAccessRequest,
    RequestedInterviews,
    canonical_interview_id,
    describe,
    is_job_id,
    request_digest,
)
from interview_access.errors import InvalidGrantRequestException, InvalidInterviewIdException

ONE = "89d96f4b-c19d-4e69-8eae-e818f3123b09"

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.uuids(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.uuids(), st.booleans())
def test_a_uuid_has_one_canonical_form(value: UUID, upper: bool) -> None:
    """A UUID with or without hyphens, in any case, has one canonical form."""
    for text in (str(value), value.hex):
        assert canonical_interview_id(text.upper() if upper else text) == str(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a1b2c3d4-e5f6-7g8h-9i0j-k1l2m3n4o5p6",
        f"{{{ONE}}}",
        f"urn:uuid:{ONE}",
        f" {ONE}",
        f"{ONE}\n",
        "8_d96f4bc19d4e698eaee818f3123b09",
        "89d96f4bc19d4e698eaee818f3123b0",
        "89d96f4bc-19d-4e69-8eae-e818f3123b09",
        "٨9d96f4bc19d4e698eaee818f3123b09",
        "89d96f4b-c19d4e69-8eae-e818f3123b09",
    ],
    ids=repr,
)
def test_other_spellings_of_a_uuid_are_malformed(text: str) -> None:
    """A spelling that only other parsers accept is malformed."""
    assert canonical_interview_id(text) is None


@given(st.lists(st.uuids(), max_size=8), st.randoms(use_true_random=False))
def test_order_spelling_and_duplicates_do_not_change_the_digest(
    ids: list[UUID], random: Any
) -> None:
    """The digest does not depend on order, spelling or duplicates of the IDs."""
    texts = [str(value) for value in ids]
    others = [random.choice([text, text.upper(), text.replace("-", "")]) for text in texts * 2]
    random.shuffle(others)
    digests = {request_digest(GRANT_ACCESS, "ann", written) for written in (texts, others)}
    assert len(digests) == 1


def test_task_user_and_ids_change_the_digest() -> None:
    """Another task, user or ID has another digest."""
    requests = [("t", "u", [ONE]), ("x", "u", [ONE]), ("t", "x", [ONE]), ("t", "u", [])]
    assert len({request_digest(*request) for request in requests}) == len(requests)


@pytest.mark.parametrize(
    "user_id",
    ["", "x" * 37, "a\0b", "a\ud800", None, 7, True, ["ann"], {"id": "ann"}],
    ids=repr,
)
def test_an_invalid_user_id_is_refused(user_id: object) -> None:
    """The error of an invalid user ID names the argument and what was received."""
    with pytest.raises(InvalidGrantRequestException) as caught:
        GrantAccessRequest.read([], {"user_id": user_id, "interview_ids": []})
    (problem,) = caught.value.details["problems"]
    assert problem["argument"] == "user_id"
    assert problem["got"] == describe(user_id)


@pytest.mark.parametrize("user_id", ["x", "x" * 36, " ann ", "Zoë-😀", UUID(ONE)], ids=repr)
def test_a_user_id_is_used_literally(user_id: object) -> None:
    """A user ID is neither trimmed nor folded; a UUID object counts as its string."""
    assert GrantAccessRequest.read([user_id, []], {}).user_id == str(user_id)


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ([], {}, ["user_id", "interview_ids"]),
        (["ann"], {}, ["interview_ids"]),
        (["ann", []], {"extra": 1}, ["extra"]),
        (["ann", [], 3], {}, ["arguments"]),
        (["ann", []], {"user_id": "bob"}, ["user_id"]),
        ([], {"user_id": 1, "interview_ids": ONE}, ["user_id", "interview_ids"]),
        (["ann", [ONE, 1, [ONE]]], {}, ["interview_ids[1]", "interview_ids[2]"]),
    ],
    ids=["none", "missing", "extra", "too many", "twice", "both", "elements"],
)
def test_each_invalid_argument_is_named(
    args: list[object], kwargs: dict[str, object], named: list[str]
) -> None:
    """The error names each argument that is missing, unknown, given twice or invalid."""
    with pytest.raises(InvalidGrantRequestException) as caught:
        GrantAccessRequest.read(args, kwargs)
    assert [problem["argument"] for problem in caught.value.details["problems"]] == named
    assert all(name in caught.value.sentence for name in named)


@given(st.lists(ANYTHING, max_size=3), st.dictionaries(st.text(), ANYTHING, max_size=3))
def test_errors_are_plain_json(args: list[object], kwargs: dict[str, object]) -> None:
    """The arguments of an error are JSON that strict parsers accept, whatever was received."""
    try:
        request = GrantAccessRequest.read(args, kwargs)
    except InvalidGrantRequestException as error:
        raised: Exception = error
    else:
        malformed = RequestedInterviews.among(request.interview_ids).malformed
        raised = InvalidInterviewIdException.of(malformed, [])
    text = json.dumps(raised.args, allow_nan=False, ensure_ascii=False)
    assert json.loads(text.encode("utf-8")) == list(raised.args)


@pytest.mark.parametrize("value", ["x", "x" * 255, "größe-1", "with space"])
def test_1_to_255_printable_characters_are_a_job_id(value: str) -> None:
    """1 to 255 printable characters are a valid job ID."""
    assert is_job_id(value)


@pytest.mark.parametrize("value", ["", "x" * 256, "a\nb", "a\0", "\ud800", None, 7], ids=repr)
def test_other_values_are_not_a_job_id(value: object) -> None:
    """Other strings and values are not a valid job ID."""
    assert not is_job_id(value)
