"""`python -m benchmarks.queues NAME`: enqueues jobs, read as JSON lines, by the queue's own API."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    """Enqueue all jobs of standard input, each with its job_id, user_id and interview_ids."""
    queue = importlib.import_module(f"benchmarks.queues.{sys.argv[1]}")
    queue.enqueue([json.loads(line) for line in sys.stdin])


if __name__ == "__main__":
    main()
