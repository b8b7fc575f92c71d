"""Generate the JSON Schemas of this folder from the models of the client package.

``make contract`` runs it, and a test compares the files with its output. The envelope, the failures
and the value that Celery stores around a result have no model and are defined here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interview_access import errors
from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    JOB_ID_RULE,
    JOB_STATUS,
    MAX_JOB_ID_LENGTH,
    ORIGIN_LENGTHS,
    PROGRESS,
    Announcement,
    CreateInterviewAttemptRequest,
    GrantAccessRequest,
    GrantAccessResult,
    GrantCohortAccessRequest,
    InterviewAttemptResult,
    JobProgress,
    JobStatus,
    WorkerLimits,
    reply_key,
    result_key,
)
from interview_access.errors import MAX_LISTED_PROBLEMS
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

FOLDER = Path(__file__).parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"

Schema = dict[str, Any]

_COUNT: Schema = {"type": "integer", "minimum": 0}
_TEXT: Schema = {"type": "string"}
_JOB_ID: Schema = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_JOB_ID_LENGTH,
    "description": f"{JOB_ID_RULE[0].upper()}{JOB_ID_RULE[1:]}.",
}
_KEPT = (
    "The job is executed whatever the value: a longer text is cut, characters that do not print "
    "are escaped, and other types are ignored."
)
_TIME: Schema = {"type": ["string", "null"], "format": "date-time"}


class _Plain(GenerateJsonSchema):
    """Omits null, which the JSON of a model omits, and the titles of fields."""

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - pydantic's name
        return False

    def nullable_schema(self, schema: core_schema.NullableSchema) -> Schema:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> Schema:
        inner = self.generate_inner(schema["schema"])
        return inner if schema.get("default") is None else {**inner, "default": schema["default"]}


def _model(model: type[BaseModel], *, request: bool = False) -> Schema:
    """Generate the schema of a model, with the descriptions in its docstring."""
    schema = model.model_json_schema(
        schema_generator=_Plain, mode="validation" if request else "serialization"
    )
    _describe(schema)
    for part in schema.get("$defs", {}).values():
        _describe(part)
    return schema


def _describe(schema: Schema) -> None:
    summary, _, attributes = schema.get("description", "").partition("\n\nAttributes:\n")
    schema["description"] = _plain(summary)
    for name, words in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
        schema["properties"][name].setdefault("description", _plain(words))


def _plain(words: str) -> str:
    """Remove the markup of a docstring."""
    words = re.sub(r":\w+:`~?([\w.]+)`", r"\1", " ".join(words.split()))
    return words.replace("``", "`")


def _object(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def _named(items: Schema) -> Schema:
    return {"type": "array", "items": items, "maxItems": MAX_LISTED_PROBLEMS}


FAILURES: dict[str, Schema] = {
    errors.InvalidGrantRequestException.__name__: _object(
        {
            "total": _COUNT,
            "problems": _named(_object({"argument": _TEXT, "expected": _TEXT, "got": _TEXT})),
        }
    ),
    errors.InvalidInterviewIdException.__name__: _object(
        {
            "total": _COUNT,
            "malformed_total": _COUNT,
            "unknown_total": _COUNT,
            "interview_ids": _named(
                _object({"value": _TEXT, "reason": {"enum": ["malformed", "unknown"]}})
            ),
        }
    ),
    errors.JobCancelledException.__name__: _object({"total": _COUNT, "job_id": _TEXT}),
    errors.JobExpiredException.__name__: _object(
        {"total": _COUNT, "job_id": _TEXT, "expires_at": _TEXT}
    ),
    errors.StorageUnavailableException.__name__: _object(
        {"total": _COUNT, "reason": _TEXT},
        {
            "tries": {
                **_COUNT,
                "description": "Attempts of a job; not in the reply to a control request.",
            }
        },
    ),
    errors.JobFailedError.__name__: {"type": "object"},
}
"""Schemas of the details of each error that a worker stores, by the name of its class."""


def _failure() -> Schema:
    kinds = [
        {
            "if": {"properties": {"exc_type": {"const": name}}},
            "then": {"properties": {"exc_message": {"prefixItems": [True, details]}}},
        }
        for name, details in FAILURES.items()
    ]
    return {
        "title": "Failure",
        "description": "The result of a job whose status is FAILURE. A reader treats an unknown "
        "exc_type as JobFailedError, and ignores unknown keys.",
        **_object(
            {
                "exc_type": {"type": "string", "examples": list(FAILURES)},
                "exc_module": {"const": errors.__name__},
                "exc_message": {
                    "type": "array",
                    "prefixItems": [
                        {
                            "type": "string",
                            "description": "The reason for people, in one sentence.",
                        },
                        {"type": "object", "description": "The reason for programs."},
                    ],
                    "minItems": 2,
                    "maxItems": 2,
                },
            }
        ),
        "allOf": kinds,
    }


def _stored_result() -> Schema:
    results = {
        "SUCCESS": {
            "anyOf": [
                {"$ref": "grant-access-result.schema.json"},
                {"$ref": "create-interview-attempt-result.schema.json"},
                {"$ref": "job-status.schema.json"},
            ]
        },
        "FAILURE": {"$ref": "failure.schema.json"},
        PROGRESS: {"$ref": "progress.schema.json"},
    }
    return {
        "title": "StoredResult",
        "description": f"The value of {result_key('JOB_ID')}, and the reply to a control request. "
        "Only SUCCESS and FAILURE are final. With any other status, or without a value, the job is "
        "queued or running.",
        **_object(
            {
                "task_id": {
                    **_JOB_ID,
                    "description": "The ID of the job, or of the control request.",
                },
                "status": {"type": "string", "examples": [*results, "STARTED", "RETRY"]},
                "result": {},
            },
            {
                "traceback": {"type": ["string", "null"]},
                "date_done": _TIME,
                "queue": {
                    "type": "string",
                    "description": f"`{CONTROL_QUEUE}` in the reply to a control request.",
                },
            },
        ),
        "allOf": [
            {
                "if": {"properties": {"status": {"const": status}}},
                "then": {"properties": {"result": result}},
            }
            for status, result in results.items()
        ],
    }


def _envelope() -> Schema:
    kwargs = [
        {"$ref": f"{name}.schema.json"}
        for name in (
            "grant-access-request",
            "grant-cohort-access-request",
            "create-interview-attempt-request",
            "job-question",
        )
    ]
    headers = _object(
        {
            "task": {
                "enum": [
                    *(GRANT_ACCESS, GRANT_COHORT_ACCESS, CREATE_INTERVIEW_ATTEMPT),
                    *(JOB_STATUS, CANCEL_JOB),
                ]
            },
            "id": _JOB_ID,
        },
        {
            "eta": {
                **_TIME,
                "description": "Time before which the job is not started; UTC if it has no zone.",
            },
            "expires": {
                **_TIME,
                "description": "Time after which the job is not started; UTC if it has no zone.",
            },
            "enqueued_at": {
                **_TIME,
                "description": "Time when the message was enqueued, for metrics and the audit; UTC "
                "if it has no zone. Any other value is ignored.",
            },
            "requested_at": {
                **_TIME,
                "description": "Time when the job was requested, if it was enqueued later, as from "
                "the outbox; likewise.",
            },
            "actor": {
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": ORIGIN_LENGTHS["actor"],
                "description": "Who requested the job: printable characters. It is kept with the "
                f"job's outcome. {_KEPT}",
            },
            "reason": {
                "type": ["string", "null"],
                "minLength": 1,
                "maxLength": ORIGIN_LENGTHS["reason"],
                "description": f"Why, likewise. {_KEPT}",
            },
            "timelimit": {
                "type": "array",
                "items": {"type": ["number", "null"], "exclusiveMinimum": 0},
                "minItems": 2,
                "maxItems": 2,
                "description": "Hard and soft time limit in seconds, instead of the worker's.",
            },
            "ignore_result": {
                "type": ["boolean", "null"],
                "description": "If true, no result is stored in Redis.",
            },
        },
    )
    properties = {
        "type": "object",
        "properties": {
            "body_encoding": {"enum": ["base64", None]},
            "reply_to": {
                "type": ["string", "null"],
                "description": f"The key of the reply to a control request: `{reply_key('ID')}`, "
                "with the request's own ID. With any other value, or none, the reply is stored "
                f"under `{result_key('ID')}`, unless the ID is a job's.",
            },
        },
        "description": "Required, and may be empty.",
    }
    body = {
        "type": "string",
        "description": "JSON: [args, kwargs, embed], in base64 if properties.body_encoding is "
        "base64. Recommended: args is empty, and embed is an empty object.",
        "contentMediaType": "application/json",
        "contentSchema": {
            "type": "array",
            "prefixItems": [
                {"type": "array"},
                {"anyOf": kwargs},
                {"type": ["object", "null"]},
            ],
            "minItems": 3,
            "maxItems": 3,
        },
    }
    return {
        "title": "Envelope",
        "description": "An element of the queue's list: a message of Celery's protocol 2. Other "
        "fields are allowed and ignored.",
        **_object(
            {
                "body": body,
                "content-type": {"const": "application/json"},
                "headers": headers,
                "properties": properties,
            },
            {"content-encoding": {"const": "utf-8"}},
        ),
    }


def _job_question() -> Schema:
    return {
        "title": "JobQuestion",
        "description": f"The kwargs of the control requests {JOB_STATUS} and {CANCEL_JOB}.",
        **_object({"job_id": _JOB_ID}),
        "additionalProperties": False,
    }


def schemas() -> dict[str, str]:
    """Generate the text of each schema file, by file name."""
    content = {
        "grant-access-request": _model(GrantAccessRequest, request=True),
        "grant-access-result": _model(GrantAccessResult),
        "grant-cohort-access-request": _model(GrantCohortAccessRequest, request=True),
        "create-interview-attempt-request": _model(CreateInterviewAttemptRequest, request=True),
        "create-interview-attempt-result": _model(InterviewAttemptResult),
        "progress": _model(JobProgress),
        "announcement": _model(Announcement),
        "job-status": _model(JobStatus),
        "job-question": _job_question(),
        "worker-limits": _model(WorkerLimits),
        "failure": _failure(),
        "stored-result": _stored_result(),
        "envelope": _envelope(),
    }
    texts = {}
    for name, schema in content.items():
        file = f"{name}.schema.json"
        whole = {"$schema": DIALECT, "$id": file, **schema}
        texts[file] = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    return texts


def main() -> None:
    """Write the schema files, and delete those that are no longer generated."""
    texts = schemas()
    for path in FOLDER.glob("*.schema.json"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
