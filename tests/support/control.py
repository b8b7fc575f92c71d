"""Control requests of a bare Redis client, and their replies."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

from interview_access.contracts import CONTROL_QUEUE, JOB_STATUS, reply_key

from tests.support.stores import until
from tests.support.workers import Site


def control_request(
    here: Site,
    job_id: str,
    *,
    request_id: str = "",
    task: str = JOB_STATUS,
    expires: str | None = None,
    with_reply_key: bool = True,
) -> str:
    """Send a control request as a bare Redis client does, and return its ID."""
    request_id = request_id or str(uuid4())
    envelope = {
        "body": json.dumps([[], {"job_id": job_id}, {}]),
        "content-type": "application/json",
        "headers": {"task": task, "id": request_id, "expires": expires},
        "properties": {"reply_to": reply_key(request_id)} if with_reply_key else {},
    }
    here.redis.lpush(CONTROL_QUEUE, json.dumps(envelope))
    return request_id


def reply(here: Site, request_id: str) -> dict[str, Any]:
    """Wait for the reply to a control request."""
    until(lambda: here.redis.exists(reply_key(request_id)) == 1)
    text: Any = here.redis.get(reply_key(request_id))
    return dict(json.loads(text))


def reply_sizes(here: Site) -> list[int]:
    """Return the sizes in bytes of all replies in Redis."""
    keys: Any = here.redis.keys(reply_key("*"))
    return [int(here.redis.strlen(key)) for key in keys]
