"""The app's configuration."""

from __future__ import annotations

from importlib import import_module

from django.apps import AppConfig


class InterviewAccessConfig(AppConfig):
    """The app, with the label ``interview_access``."""

    name = "interview_access.django"
    label = "interview_access"
    verbose_name = "Interview access"

    def ready(self) -> None:
        """Register the system checks."""
        import_module("interview_access.django.checks")
