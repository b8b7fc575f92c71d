"""The memory of a worker's main process at full load."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from devstack.servers import LocalStack
from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, Site, site, worker

WARM_UP_SECONDS, END_SECONDS = 30.0, 90.0
GROWTH_MB, GROWTH_BYTES_PER_JOB = 1.0, 100
"""Allowed growth, independent of speed and for each job; a leak kept some 300 bytes of each."""
QUEUED = 2_000
"""Minimum number of queued messages, so that no pool process is idle."""


def test_main_process_stays_flat(stack: LocalStack, migrated_url: str, tmp_path: Path) -> None:
    """The memory does not grow from the 30th to the 90th second of full load."""
    with site(stack, migrated_url, 12) as here:
        template = _template(here)
        with worker(here, tmp_path / "worker.log", GRANT_BATCH_SIZE=1) as service:
            main = psutil.Process(service.pid)
            began = time.monotonic()
            samples: list[tuple[float, float, int]] = []
            sent = 0
            while (seconds := time.monotonic() - began) < END_SECONDS:
                waiting: Any = here.redis.llen(QUEUE)
                assert waiting or not sent, "the load was not full"
                samples.append((seconds, main.memory_info().rss / 1e6, sent - waiting))
                if waiting < 2 * QUEUED:
                    here.redis.lpush(QUEUE, *(_message(template) for _ in range(QUEUED)))
                    sent += QUEUED
                time.sleep(0.1)  # the sampling interval
            here.redis.delete(QUEUE)
            assert service.alive
    warm = max(sample[1] for sample in samples if WARM_UP_SECONDS - 5 < sample[0] < WARM_UP_SECONDS)
    end = max(sample[1] for sample in samples if sample[0] > END_SECONDS - 5)
    jobs = samples[-1][2] - next(sample[2] for sample in samples if sample[0] > WARM_UP_SECONDS)
    shown = ", ".join(f"{sample[1]:.1f}" for sample in samples[:: len(samples) // 18])
    limit = GROWTH_MB + GROWTH_BYTES_PER_JOB * jobs / 1e6
    assert end - warm < limit, f"{end - warm:.1f} MB over {jobs} jobs; MB in turn: {shown}"


def _template(here: Site) -> str:
    """Return a message of a small job as Celery writes it, with the job ID ``JOB``."""
    here.producer.send_task(
        GRANT_ACCESS, kwargs={"user_id": "ann", "interview_ids": []}, task_id="JOB", queue="sample"
    )
    until(lambda: here.redis.llen("sample") == 1)
    raw: Any = here.redis.rpop("sample")
    return json.dumps(json.loads(raw))


def _message(template: str) -> str:
    return template.replace('"JOB"', f'"{uuid4()}"')
