"""Read-only admin pages of the outbox and of finished jobs."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from interview_access.django.models import FinishedJob, OutboxRequest

_SHOWN_IDS = 20


class _ReadOnlyAdmin(admin.ModelAdmin):
    search_fields = ("job_id__startswith", "user_id__exact")
    search_help_text = "The beginning of a job ID, or a user ID"
    show_full_result_count = False  # it counts the whole table

    def has_add_permission(self, request: HttpRequest) -> bool:  # noqa: ARG002 - Django's signature
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002 - likewise
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002 - likewise
        return False


@admin.register(OutboxRequest)
class OutboxRequestAdmin(_ReadOnlyAdmin):
    """The jobs that were requested in transactions and have no result yet."""

    list_display = ("job_id", "task", "user_id", "requested_at", "sent_at")
    list_filter = ("task", ("sent_at", admin.EmptyFieldListFilter))
    fields = (
        *("job_id", "task", "user_id", "users", "interviews", "requested_at", "sent_at"),
        *("look_at", "eta", "expires_at", "digest", "headers"),
    )

    def get_queryset(self, request: HttpRequest) -> Any:
        """Read the IDs, which can be 100,000, on the page of one request only."""
        return super().get_queryset(request).defer("user_ids", "interview_ids")

    @admin.display(empty_value="-")
    def users(self, request: OutboxRequest) -> str | None:
        """Show the first users of a cohort."""
        return _shown(request.user_ids)

    @admin.display
    def interviews(self, request: OutboxRequest) -> str | None:
        """Show the first interview IDs."""
        return _shown(request.interview_ids)


@admin.register(FinishedJob)
class FinishedJobAdmin(_ReadOnlyAdmin):
    """The ledger."""

    list_display = ("job_id", "task", "state", "user_id", "created", "finished_at")
    list_filter = ("task", "state")


def _shown(ids: list[Any] | None) -> str | None:
    if ids is None:
        return None
    more = f" and {len(ids) - _SHOWN_IDS:,} more" if len(ids) > _SHOWN_IDS else ""
    return f"{len(ids):,}: {', '.join(map(str, ids[:_SHOWN_IDS]))}{more}"
