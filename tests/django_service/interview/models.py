"""The platform's four models. A grant has no unique key here: old databases hold duplicates."""

import uuid

from django.db import models


class Interview(models.Model):
    """An interview that users can be given access to."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    title = models.CharField(max_length=255)
    description = models.TextField(null=True, blank=True)
    duration = models.DurationField()


class InterviewConfig(models.Model):
    """How one interview is run."""

    interview = models.OneToOneField(Interview, on_delete=models.CASCADE)
    is_default_access_allowed = models.BooleanField(default=False)
    should_end_interview_after_duration = models.BooleanField(default=False)


class InterviewAttempt(models.Model):
    """One user's start of one interview."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    interview = models.ForeignKey(Interview, on_delete=models.CASCADE)
    user_id = models.CharField(max_length=36, db_index=True)
    start_datetime = models.DateTimeField()
    end_datetime = models.DateTimeField(null=True, blank=True)
    scheduled_end_datetime = models.DateTimeField(null=True, blank=True)


class UserInterviewAccess(models.Model):
    """One user's access to one interview."""

    interview = models.ForeignKey(Interview, on_delete=models.CASCADE)
    user_id = models.CharField(max_length=36, db_index=True)
