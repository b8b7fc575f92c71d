"""Writes grants one after another, each third one a duplicate, and reads them back, until told."""

import json
import select
import sys
import time
from collections.abc import Iterator

from django.core.management.base import BaseCommand
from django.db import IntegrityError

from interview.models import Interview, UserInterviewAccess


class Command(BaseCommand):
    """Prints ``writing`` after the first grant, and at the end of its input a JSON object.

    ``written`` and ``refused`` are numbers of grants; ``longest_write`` and ``longest_read`` are
    the longest waits, in seconds.
    """

    def handle(self, *_args: object, **_options: object) -> None:
        """Write and read until the standard input ends."""
        written = refused = 0
        longest_write = longest_read = 0.0
        for user_id, interview in _wanted(Interview.objects.values_list("id", flat=True)[0]):
            started = time.perf_counter()
            try:
                UserInterviewAccess.objects.create(user_id=user_id, interview_id=interview)
                written += 1
            except IntegrityError:
                refused += 1
            longest_write = max(longest_write, time.perf_counter() - started)
            if written == 1:
                self.stdout.write("writing")
                self.stdout.flush()
            started = time.perf_counter()
            if not UserInterviewAccess.objects.filter(user_id=user_id).exists():
                raise AssertionError(f"the grant of {user_id} was written and does not stand")
            longest_read = max(longest_read, time.perf_counter() - started)
            if select.select([sys.stdin], [], [], 0)[0]:
                break
        figures = {
            "written": written,
            "refused": refused,
            "longest_write": longest_write,
            "longest_read": longest_read,
        }
        self.stdout.write(json.dumps(figures))


def _wanted(interview: object) -> Iterator[tuple[str, object]]:
    number = 0
    while True:
        number += 1
        yield f"writer-{number}", interview
        yield f"writer-{number}-twice", interview
        yield f"writer-{number}-twice", interview
