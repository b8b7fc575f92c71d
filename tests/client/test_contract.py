"""The documents in contract/, checked against the models and a real worker."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
import yaml
from interview_access import contracts, errors
from interview_access.contracts import (
    GrantJob,
    JobStatus,
    announcement_key,
    reply_key,
    request_digest,
    result_key,
)
from interview_access.protocol.messages import JobMessage
from interview_access.stored_errors import to_result
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from referencing import Registry, Resource

from contract.generate import FAILURES, FOLDER, schemas
from devstack.servers import LocalStack
from tests.support.stores import an_interview, until
from tests.support.workers import QUEUE, ROOT, Site, site_with_worker

VECTORS: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text(encoding="utf-8"))
GIVEN: dict[str, Any] = VECTORS["given"]
ASYNCAPI: dict[str, Any] = yaml.safe_load((FOLDER / "asyncapi.yaml").read_text(encoding="utf-8"))
Change = Callable[[dict[str, Any]], object]

ASYNCAPI_SCHEMA = ROOT / ".venv/node/node_modules/@asyncapi/specs/schemas/3.0.0.json"

FILES = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.schema.json")}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in FILES.items()
)


def violations(name: str, value: object) -> list[str]:
    """Collect the violations of a schema by a value."""
    checker = Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(
        FILES[f"{name}.schema.json"], registry=REGISTRY, format_checker=checker
    )
    return [error.message for error in validator.iter_errors(value)]


# --- Without a server -----------------------------------------------------------------------------


def test_the_schemas_are_generated_from_the_models() -> None:
    """Each file is what `make contract` generates."""
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.schema.json")}
    assert written == schemas()


@pytest.mark.parametrize("name", sorted(FILES))
def test_each_schema_is_valid(name: str) -> None:
    """Each file is a JSON Schema of its dialect."""
    Draft202012Validator.check_schema(FILES[name])


def test_the_failure_schema_has_the_errors_that_workers_store() -> None:
    """The schema has no error that only a client raises."""
    stored = {
        *(errors.InvalidGrantRequestException, errors.InvalidInterviewIdException),
        *(errors.JobCancelledException, errors.JobExpiredException, errors.JobFailedError),
        errors.StorageUnavailableException,
    }
    assert {kind.__name__ for kind in stored} == FAILURES.keys()


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidGrantRequestException.of([("user_id", "a value", "nothing")]),
        errors.InvalidInterviewIdException.of(["x"], ["y"]),
        errors.JobCancelledException.of("job"),
        errors.JobExpiredException.of("job", "2026-01-01T00:00:00+00:00"),
        errors.StorageUnavailableException.of(17, "away"),
        errors.StorageUnavailableException.of_ledger("away"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_details_of_an_error_have_the_keys_of_its_schema(
    error: errors.InterviewAccessError,
) -> None:
    """The details have the keys that the schema names, and no others."""
    name = type(error).__name__
    stored = to_result(error)
    assert not violations("failure", stored)
    properties, required = FAILURES[name]["properties"], FAILURES[name]["required"]
    assert set(required) <= error.details.keys() <= properties.keys()
    assert violations("failure", {**stored, "exc_message": [error.sentence, {}]})


def test_a_status_and_an_announcement_are_valid() -> None:
    """A status and an announcement of the client package are valid by their schemas."""
    message = JobMessage.of(GrantJob("ann", [], job_id="job", countdown=1, expires=60))
    assert not violations("announcement", json.loads(message.announce_command[2]))
    status = JobStatus(
        job_id="job", state="failed", error=contracts.JobFailure(type="x", sentence="y")
    )
    assert not violations("job-status", json.loads(status.model_dump_json(exclude_none=True)))
    assert violations("job-status", {"job_id": "job", "state": "lost"})


FOR_SCHEMAS = [  # arguments by name, and not the limit of these tests' own worker
    vector
    for vector in VECTORS["vectors"]
    if not vector["message"]["args"] and "GRANT_MAX" not in vector["name"]
]


@pytest.mark.parametrize("vector", FOR_SCHEMAS, ids=lambda vector: vector["name"])
def test_a_request_schema_refuses_invalid_vectors(vector: dict[str, Any]) -> None:
    """The request schemas refuse the vectors with invalid arguments, and no others."""
    result, message = vector["result"]["result"], vector["message"]
    details = result["exc_message"][1] if "exc_type" in result else {}
    name = message["task"].rpartition(".")[2].replace("_", "-")
    refused = bool(details.get("problems") or details.get("malformed_total"))
    assert bool(violations(f"{name}-request", message["kwargs"])) == refused


@pytest.mark.parametrize("vector", VECTORS["digests"], ids=lambda vector: vector["name"])
def test_a_digest(vector: dict[str, Any]) -> None:
    """The digest of a request is the SHA-256 of the text in the vector."""
    whose = vector.get("user_ids") or vector["user_id"]
    assert request_digest(vector["task"], whose, vector["interview_ids"]) == vector["digest"]
    assert hashlib.sha256(vector["hashed"].encode("ascii")).hexdigest() == vector["digest"]


# --- AsyncAPI -------------------------------------------------------------------------------------


def resolved(reference: str) -> Any:
    """Resolve a reference of the AsyncAPI file."""
    if not reference.startswith("#/"):
        return FILES[reference]
    value: Any = ASYNCAPI
    for key in reference[2:].split("/"):
        value = value[key]
    return value


def references(value: Any) -> Iterator[str]:
    """Find all references in a value."""
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from references(one)


def test_the_asyncapi_file_is_valid() -> None:
    """The file is valid by AsyncAPI's own schema, and each of its references can be resolved."""
    assert ASYNCAPI_SCHEMA.exists(), "make .venv/node/ready installs AsyncAPI's schema"
    schema = json.loads(ASYNCAPI_SCHEMA.read_text(encoding="utf-8"))
    validator_for(schema)(schema).validate(ASYNCAPI)
    for reference in references(ASYNCAPI):
        assert resolved(reference)


def test_the_asyncapi_file_has_the_names_of_the_contract() -> None:
    """Its addresses are the queues and keys of the client package, and its messages the tasks."""
    channels, messages = ASYNCAPI["channels"], ASYNCAPI["components"]["messages"]
    assert {name: channel["address"] for name, channel in channels.items()} == {
        "jobs": contracts.QUEUE,
        "control": contracts.CONTROL_QUEUE,
        "results": result_key("{id}"),
        "replies": reply_key("{id}"),
        "announcements": announcement_key("{id}"),
        "limits": contracts.LIMITS_KEY,
    }
    tasks = FILES["envelope.schema.json"]["properties"]["headers"]["properties"]["task"]["enum"]
    assert {one["name"] for one in messages.values() if "name" in one} == set(tasks)


def test_the_asyncapi_examples_are_valid() -> None:
    """Each example is valid by the schema of its payload."""
    messages = ASYNCAPI["components"]["messages"].values()
    examples = [
        (one["payload"]["$ref"], case) for one in messages for case in one.get("examples", [])
    ]
    assert len(examples) == 6
    for schema, case in examples:
        assert not violations(schema.removesuffix(".schema.json"), case["payload"])


# --- On a worker ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and the interviews of the vectors."""
    folder = tmp_path_factory.mktemp("contract")
    with site_with_worker(stack, _migrated, 10, folder, **GIVEN["settings"]) as here:
        for interview_id in GIVEN["interviews"]:
            here.store.add_interview(replace(an_interview(), id=interview_id))
        yield here


def sent(here: Site, message: dict[str, Any], job_id: str) -> dict[str, Any]:
    """Send a message, and return the result of its job without times and ID."""
    here.redis.delete(result_key(job_id))
    here.send(*message["args"], task=message["task"], job_id=job_id, **message["kwargs"])
    meta = here.answer(job_id)
    assert not violations("stored-result", meta)
    return {key: meta[key] for key in ("status", "result", "traceback")}


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_a_vector(here: Site, vector: dict[str, Any]) -> None:
    """A worker stores the result of the vector for its message."""
    job_id = str(uuid4())
    message = vector["message"]
    if "granted" in vector:
        granted = {**message["kwargs"], "interview_ids": vector["granted"]}
        sent(here, {**message, "kwargs": granted}, str(uuid4()))
    if "sent_before" in vector:
        sent(here, vector["sent_before"], job_id)
    stored = sent(here, message, job_id)
    wanted = vector["result"]
    if "interview_attempt_id" in wanted["result"]:
        attempt_id = str(UUID(stored["result"]["interview_attempt_id"]))
        wanted = {**wanted, "result": {**wanted["result"], "interview_attempt_id": attempt_id}}
    assert stored == wanted
    refused = [vector["refusal"]] if "refusal" in vector else []
    until(lambda: refusals(here, job_id) == refused)


def refusals(here: Site, job_id: str) -> list[str]:
    """Find the reasons of the job's dead letters."""
    letters = here.dead_letters()
    return [one["reason"].partition(":")[0] for one in letters if one["job_id"] == job_id]


def envelope(job_id: str) -> dict[str, Any]:
    """Build an envelope with the required fields only."""
    return {
        "body": json.dumps([[], {"user_id": job_id, "interview_ids": []}, {}]),
        "content-type": "application/json",
        "headers": {"task": contracts.GRANT_ACCESS, "id": job_id},
        "properties": {},
    }


def with_fields(**fields: object) -> Change:
    """Change fields of the envelope, or add them; None removes one."""

    def change(message: dict[str, Any]) -> None:
        for name, value in fields.items():
            message[name.replace("_", "-")] = value
            if value is None:
                del message[name.replace("_", "-")]

    return change


def with_headers(**fields: object) -> Change:
    """Change headers of the envelope, likewise."""
    return lambda message: with_fields(**fields)(message["headers"])


def with_base64(message: dict[str, Any]) -> None:
    """Encode the body in base64."""
    message["body"] = base64.b64encode(message["body"].encode()).decode()
    message["properties"]["body_encoding"] = "base64"


VALID: dict[str, Change] = {
    "smallest": with_fields(),
    "base64": with_base64,
    "encoding": with_fields(content_encoding="utf-8"),
    "embed null": lambda message: message.update(body=message["body"].replace("{}]", "null]")),
    "eta": with_headers(eta="2020-01-01T00:00:00Z"),
    "expires": with_headers(expires="2099-01-01T00:00:00+00:00"),
    "limits": with_headers(timelimit=[5, None]),
    "more": with_headers(lang="go"),
}


@pytest.mark.parametrize("change", VALID.values(), ids=VALID)
def test_a_valid_envelope_is_executed(here: Site, change: Change) -> None:
    """A worker executes a message that is valid by the schema."""
    message = envelope(str(uuid4()))
    change(message)
    assert not violations("envelope", message)
    here.redis.lpush(QUEUE, json.dumps(message))
    assert here.answer(message["headers"]["id"])["status"] == "SUCCESS"


INVALID: dict[str, Change] = {
    "no body": with_fields(body=None),
    "no content type": with_fields(content_type=None),
    "no headers": with_fields(headers=None),
    "no properties": with_fields(properties=None),
    "no task": with_headers(task=None),
    "no id": with_headers(id=None),
    "another type": with_fields(content_type="application/x-yaml"),
    "body as a list": with_fields(body=[[], {}, {}]),
    "another task": with_headers(task="no.such_task"),
    "id as a number": with_headers(id=7),
    "eta as a number": with_headers(eta=5),
    "one limit": with_headers(timelimit=[5]),
}


@pytest.mark.parametrize("change", INVALID.values(), ids=INVALID)
def test_an_invalid_envelope_is_dead_lettered(here: Site, change: Change) -> None:
    """A message without what the schema requires becomes a dead letter."""
    message = envelope(str(uuid4()))
    change(message)
    assert violations("envelope", message)
    text = json.dumps(message)
    here.redis.lpush(QUEUE, text)
    until(lambda: text in [one["message"] for one in here.dead_letters()])


def test_the_envelopes_of_producers_are_valid(here: Site) -> None:
    """The envelopes of Celery and of the client package are valid by the schema."""
    celery = str(uuid4())
    here.producer.send_task(contracts.GRANT_ACCESS, task_id=celery, queue="sample")
    raw: Any = here.redis.rpop("sample")
    ours = JobMessage.of(GrantJob("ann", [], countdown=1, expires=60)).envelope
    for message in json.loads(raw), json.loads(ours):
        assert not violations("envelope", message)
