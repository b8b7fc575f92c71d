"""The documents in contract/: as the models say, and as a real worker does."""

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
    JobStatus,
    announcement_key,
    reply_key,
    request_digest,
    result_key,
)
from interview_access.protocol.messages import GrantMessage
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from referencing import Registry, Resource

from contract.generate import FAILURES, FOLDER, schemas
from devstack.servers import LocalStack
from tests.support.database import database
from tests.support.stores import an_interview, until
from tests.support.workers import QUEUE, ROOT, Site, site, worker

VECTORS: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text(encoding="utf-8"))
GIVEN: dict[str, Any] = VECTORS["given"]
ASYNCAPI: dict[str, Any] = yaml.safe_load((FOLDER / "asyncapi.yaml").read_text(encoding="utf-8"))
Change = Callable[[dict[str, Any]], object]

ASYNCAPI_SCHEMA = ROOT / ".venv/node/node_modules/@asyncapi/specs/schemas/3.0.0.json"

FILES = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.schema.json")}
REGISTRY: Registry[Any] = Registry().with_resources(
    (name, Resource.from_contents(schema)) for name, schema in FILES.items()
)


def wrong(name: str, value: object) -> list[str]:
    """What is wrong with a value by one of the schemas."""
    checker = Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(
        FILES[f"{name}.schema.json"], registry=REGISTRY, format_checker=checker
    )
    return [error.message for error in validator.iter_errors(value)]


# --- Without a server -----------------------------------------------------------------------------


def test_the_schemas_are_the_models() -> None:
    """Each file is what the models make; `make contract` writes them anew."""
    written = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.schema.json")}
    assert written == schemas()


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_schema_is_one(name: str) -> None:
    """Each file is a JSON Schema of its dialect."""
    Draft202012Validator.check_schema(FILES[name])


def test_the_failures_are_those_that_workers_store() -> None:
    """The schema names the errors that a worker stores, and none that only a client raises."""
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
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_errors_details_are_the_schemas(error: errors.InterviewAccessError) -> None:
    """What an error says for programs is what its schema names, no more and no less."""
    name = type(error).__name__
    stored = {"exc_type": name, "exc_module": errors.__name__, "exc_message": list(error.args)}
    assert not wrong("failure", stored)
    assert FAILURES[name]["required"] == list(error.details)
    assert wrong("failure", {**stored, "exc_message": [error.sentence, {}]})


def test_a_status_and_an_announcement_are_their_schemas() -> None:
    """What the models write fits."""
    message = GrantMessage.of("ann", [], job_id="job", countdown=1, expires=60)
    assert not wrong("announcement", json.loads(message.announce_command[2]))
    status = JobStatus(
        job_id="job", state="failed", error=contracts.JobFailure(type="x", sentence="y")
    )
    assert not wrong("job-status", json.loads(status.model_dump_json(exclude_none=True)))
    assert wrong("job-status", {"job_id": "job", "state": "lost"})


FOR_SCHEMAS = [  # arguments by name, and not the limit of these tests' own worker
    vector
    for vector in VECTORS["vectors"]
    if not vector["message"]["args"] and "GRANT_MAX" not in vector["name"]
]


@pytest.mark.parametrize("vector", FOR_SCHEMAS, ids=lambda vector: vector["name"])
def test_a_request_schema_takes_what_can_be_read(vector: dict[str, Any]) -> None:
    """It refuses the vectors that fail for what they are, and no other."""
    result, message = vector["result"]["result"], vector["message"]
    details = result["exc_message"][1] if "exc_type" in result else {}
    name = message["task"].rpartition(".")[2].replace("_", "-")
    refused = bool(details.get("problems") or details.get("malformed_total"))
    assert bool(wrong(f"{name}-request", message["kwargs"])) == refused


@pytest.mark.parametrize("vector", VECTORS["digests"], ids=lambda vector: vector["name"])
def test_a_digest(vector: dict[str, Any]) -> None:
    """The digest of a request is that of the text that the vector shows."""
    whose = vector.get("user_ids") or vector["user_id"]
    assert request_digest(vector["task"], whose, vector["interview_ids"]) == vector["digest"]
    assert hashlib.sha256(vector["hashed"].encode("ascii")).hexdigest() == vector["digest"]


# --- AsyncAPI -------------------------------------------------------------------------------------


def resolved(reference: str) -> Any:
    """What a reference of the AsyncAPI file names."""
    if not reference.startswith("#/"):
        return FILES[reference]
    value: Any = ASYNCAPI
    for key in reference[2:].split("/"):
        value = value[key]
    return value


def references(value: Any) -> Iterator[str]:
    """All references within a value."""
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from references(one)


def test_the_asyncapi_file_is_one() -> None:
    """AsyncAPI's own schema takes it, and every reference in it leads somewhere."""
    assert ASYNCAPI_SCHEMA.exists(), "make .venv/node/ready installs AsyncAPI's schema"
    schema = json.loads(ASYNCAPI_SCHEMA.read_text(encoding="utf-8"))
    validator_for(schema)(schema).validate(ASYNCAPI)
    for reference in references(ASYNCAPI):
        assert resolved(reference)


def test_the_asyncapi_file_has_the_names_of_the_contract() -> None:
    """Its addresses are the queues and keys that both sides use, and its messages their tasks."""
    channels, messages = ASYNCAPI["channels"], ASYNCAPI["components"]["messages"]
    assert {name: channel["address"] for name, channel in channels.items()} == {
        "jobs": contracts.QUEUE,
        "control": contracts.CONTROL_QUEUE,
        "results": result_key("{id}"),
        "replies": reply_key("{id}"),
        "announcements": announcement_key("{id}"),
    }
    tasks = FILES["envelope.schema.json"]["properties"]["headers"]["properties"]["task"]["enum"]
    assert {one["name"] for one in messages.values() if "name" in one} == set(tasks)


def test_the_asyncapi_examples_fit() -> None:
    """Each example is one by its payload's schema."""
    messages = ASYNCAPI["components"]["messages"].values()
    examples = [
        (one["payload"]["$ref"], case) for one in messages for case in one.get("examples", [])
    ]
    assert len(examples) == 5
    for schema, case in examples:
        assert not wrong(schema.removesuffix(".schema.json"), case["payload"])


# --- On a worker ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and the interviews of the vectors."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 10) as here,
        worker(here, tmp_path_factory.mktemp("contract") / "worker.log", **GIVEN["settings"]),
    ):
        for interview_id in GIVEN["interviews"]:
            here.store.add_interview(replace(an_interview(), id=interview_id))
        yield here


def sent(here: Site, message: dict[str, Any], job_id: str) -> dict[str, Any]:
    """What is stored of a message's job in the end, but for when and under which id."""
    here.redis.delete(result_key(job_id))
    here.send(*message["args"], task=message["task"], job_id=job_id, **message["kwargs"])
    meta = here.answer(job_id)
    assert not wrong("stored-result", meta)
    return {key: meta[key] for key in ("status", "result", "traceback")}


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_a_vector(here: Site, vector: dict[str, Any]) -> None:
    """A worker's answer to a vector's message is the vector's result."""
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
    """Why messages of the job are dead letters."""
    letters = here.dead_letters()
    return [one["reason"].partition(":")[0] for one in letters if one["job_id"] == job_id]


def envelope(job_id: str) -> dict[str, Any]:
    """All that a worker needs, and no more."""
    return {
        "body": json.dumps([[], {"user_id": job_id, "interview_ids": []}, {}]),
        "content-type": "application/json",
        "headers": {"task": contracts.GRANT_ACCESS, "id": job_id},
        "properties": {},
    }


def other(**fields: object) -> Change:
    """Other fields of the envelope, or more; None takes one away."""

    def change(message: dict[str, Any]) -> None:
        for name, value in fields.items():
            message[name.replace("_", "-")] = value
            if value is None:
                del message[name.replace("_", "-")]

    return change


def header(**fields: object) -> Change:
    """Other headers, likewise."""
    return lambda message: other(**fields)(message["headers"])


def encoded(message: dict[str, Any]) -> None:
    """Its body in base64, and told to be."""
    message["body"] = base64.b64encode(message["body"].encode()).decode()
    message["properties"]["body_encoding"] = "base64"


TAKEN: dict[str, Change] = {
    "smallest": other(),
    "base64": encoded,
    "encoding": other(content_encoding="utf-8"),
    "embed null": lambda message: message.update(body=message["body"].replace("{}]", "null]")),
    "eta": header(eta="2020-01-01T00:00:00Z"),
    "expires": header(expires="2099-01-01T00:00:00+00:00"),
    "limits": header(timelimit=[5, None]),
    "more": header(lang="go"),
}


@pytest.mark.parametrize("change", TAKEN.values(), ids=TAKEN)
def test_an_envelope_by_the_schema_is_taken(here: Site, change: Change) -> None:
    """What the schema allows, a worker does."""
    message = envelope(str(uuid4()))
    change(message)
    assert not wrong("envelope", message)
    here.redis.lpush(QUEUE, json.dumps(message))
    assert here.answer(message["headers"]["id"])["status"] == "SUCCESS"


REFUSED: dict[str, Change] = {
    "no body": other(body=None),
    "no content type": other(content_type=None),
    "no headers": other(headers=None),
    "no properties": other(properties=None),
    "no task": header(task=None),
    "no id": header(id=None),
    "another type": other(content_type="application/x-yaml"),
    "body as a list": other(body=[[], {}, {}]),
    "another task": header(task="no.such_task"),
    "id as a number": header(id=7),
    "eta as a number": header(eta=5),
    "one limit": header(timelimit=[5]),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_an_envelope_against_the_schema_is_a_dead_letter(here: Site, change: Change) -> None:
    """What the schema requires, a worker needs: the message is kept for the operators."""
    message = envelope(str(uuid4()))
    change(message)
    assert wrong("envelope", message)
    text = json.dumps(message)
    here.redis.lpush(QUEUE, text)
    until(lambda: text in [one["message"] for one in here.dead_letters()])


def test_every_producers_envelope_fits(here: Site) -> None:
    """What Celery and the client package send is an envelope by the schema."""
    celery = str(uuid4())
    here.producer.send_task(contracts.GRANT_ACCESS, task_id=celery, queue="sample")
    raw: Any = here.redis.rpop("sample")
    ours = GrantMessage.of("ann", [], countdown=1, expires=60).envelope
    for message in json.loads(raw), json.loads(ours):
        assert not wrong("envelope", message)
