"""`python -m benchmarks.queues NAME`: reads jobs as JSON lines, and enqueues them."""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    """Enqueue the jobs of standard input; each has job_id, user_id and interview_ids."""
    queue = importlib.import_module(f"benchmarks.queues.{sys.argv[1]}")
    queue.enqueue([json.loads(line) for line in sys.stdin])


if __name__ == "__main__":
    main()
