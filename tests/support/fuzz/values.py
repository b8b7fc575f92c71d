"""Values that messages must not contain, or that a worker does not accept."""

from __future__ import annotations

from typing import Any

QUEUE = "interview-access"
PRIORITIES = (3, 6, 9)
ELSEWHERE = "fuzz-elsewhere"
GRANT = "interview_access.grant_access"
COHORT = "interview_access.grant_cohort_access"
ATTEMPT = "interview_access.create_interview_attempt"
FORGED = "\n[2026-01-01 00:00:00,000: CRITICAL/MainProcess] FORGED\x1b]0;owned\x07\x1b[2J\r\x9b31m"
"""A log line and terminal control sequences, which must be escaped everywhere."""
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 10**30, 1e308, float("nan"), float("inf"), -float("inf")),
    *(
        "",
        " ",
        "x",
        "\ud800",
        "\0",
        "y" * 300,
        "🙂",
        "\u202e",
        FORGED,
        GRANT,
        "2020-01-01T00:00:00",
    ),
    *([], {}, [None], [1, 2], ["x", "y"], {"a": None}, {"": {"": {}}}, [[], {}, {}], {"task": 1}),
    *({"__type__": "uuid", "__value__": "no uuid"}, {"__type__": "datetime", "__value__": 1}),
    *({"__type__": "decimal", "__value__": "1e999999"}, {"__type__": []}, {"__type__": "bytes"}),
    *({"__type__": "base64", "__value__": "!"}, {"__type__": "no such", "__value__": {}}),
)
"""Values of unexpected types and contents."""
CODECS: tuple[Any, ...] = (
    *(
        "utf-8",
        "UTF8",
        "us-ascii",
        "latin-1",
        "utf-8-sig",
        "utf-16",
        "utf-16-le",
        "utf-32",
        "utf-7",
    ),
    *("punycode", "idna", "zlib_codec", "bz2_codec", "hex_codec", "base64_codec", "rot13", "uu"),
    *("quopri", "raw_unicode_escape", "unicode_escape", "undefined", "cp037", "mbcs", "binary"),
    *("", "no such codec", "\0", "x" * 10_000, None, 5, [], {}),
)
CONTENT_TYPES: tuple[Any, ...] = (
    *("application/data", "application/x-python-serialize", "application/x-yaml", "text/yaml"),
    *("application/x-msgpack", "application/msgpack", "text/plain", "application/JSON", "json"),
    *("pickle", "application/json; charset=utf-16", "", None, 1, [], {}, "\0", FORGED),
)
BUILT_INS = (
    *("celery.map", "celery.chunks", "celery.group", "celery.chord", "celery.chain"),
    *("celery.accumulate", "celery.backend_cleanup", "celery.starmap", "celery.chord_unlock"),
)
TASK_NAMES: tuple[Any, ...] = (
    *BUILT_INS,
    *("no.such.task", "", " ", "interview_access.grant_access ", "INTERVIEW_ACCESS.GRANT_ACCESS"),
    *("__init__", "os.system", "worker.celery.app", "x" * 1_000_000, FORGED, "\ud800", "a\0b"),
    *(None, 0, 1.5, True, [], {}, [GRANT], {"task": GRANT}),
)
ODD_LINKS: list[Any] = [
    *ODD,
    *([GRANT], [[GRANT]], [{"task": GRANT}], [{"task": None, "args": 1}], [{"options": []}]),
    *(
        [{"task": GRANT, "options": {"queue": "q" * 10_000}}],
        [{"task": "x", "subtask_type": "chord"}],
    ),
    *({"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [{}]}, "options": {}},),
    *(
        [
            {
                "task": GRANT,
                "args": [],
                "kwargs": {},
                "options": {"queue": ELSEWHERE, "countdown": "x"},
            }
        ],
    ),
    *([{"task": GRANT, "options": {"link": [{"task": GRANT}], "exchange": FORGED}}],),
]
"""Values for callbacks, chains and chords that Celery never writes."""
