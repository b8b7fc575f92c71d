"""The platform's initial plan: Django's ORM in a Celery task, on the platform's models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import django
from celery import Celery
from psycopg.conninfo import conninfo_to_dict

from benchmarks.baselines import plain_url

_SERVICE = Path(__file__).parents[2] / "tests/django_service"
_BATCH = 1_000  # rows of one INSERT of bulk_create, as in the plan


def _set_up() -> None:
    """Configure Django as the platform's service does, with libpq's environment variables."""
    variables = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD"}
    for name, value in conninfo_to_dict(plain_url(os.environ["DATABASE_URL"])).items():
        os.environ[variables.get(name, f"PG{name.upper()}").replace("DBNAME", "DATABASE")] = str(
            value
        )
    os.environ["DJANGO_SETTINGS_MODULE"] = "service_settings"
    sys.path.insert(0, str(_SERVICE))
    django.setup()


_set_up()
app = Celery(
    "django_plan", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BROKER_URL"]
)
app.conf.task_acks_late = True


@app.task(name="grant")  # type: ignore[untyped-decorator] # Celery ships no types
def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:
    """Read interviews and grants, and create the missing ones; the result is the contract's."""
    from interview.models import (  # type: ignore[import-not-found]  # noqa: PLC0415 - after django.setup()
        Interview,
        UserInterviewAccess,
    )

    interviews = {str(one.id): one for one in Interview.objects.filter(id__in=interview_ids)}
    unknown = [one for one in interview_ids if one not in interviews]
    if unknown:
        raise ValueError(f"{len(unknown)} ids have no interview, such as {unknown[0]}")
    granted = {
        str(grant.interview_id) for grant in UserInterviewAccess.objects.filter(user_id=user_id)
    }
    missing = [
        UserInterviewAccess(user_id=user_id, interview=interview)
        for interview_id, interview in interviews.items()
        if interview_id not in granted
    ]
    UserInterviewAccess.objects.bulk_create(missing, batch_size=_BATCH)
    return {"success": True, "created_access_count": len(missing)}
