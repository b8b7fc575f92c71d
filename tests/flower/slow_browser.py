"""What Flower's pages show in a browser, and the screenshots of the documentation.

``make browser-test`` runs it, with a Chromium that is installed already.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright

from tests.flower.scene import COUNTS, SHOWN, WAITING, WORKER, Scene
from tests.support.workers import ROOT

SCREENSHOTS = ROOT / (os.environ.get("SCREENSHOTS") or "build/screenshots")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
"""Chromium in a container, without connections of its own."""
SIZE: ViewportSize = {"width": 1600, "height": 800}


@pytest.fixture(scope="module", autouse=True)
def browser() -> Iterator[Browser]:
    """The installed browser; the tests start no worker without one."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if not program:
        pytest.fail(
            f"expected {' or '.join(PROGRAMS)} on PATH, found none:"
            " install Debian's package chromium, or set CHROMIUM to the program"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(shown: Scene, browser: Browser) -> Iterator[Page]:
    """A page with a storage of its own, whose scripts must raise no error."""
    page = browser.new_page(base_url=shown.url, viewport=SIZE, timezone_id="UTC")
    page.set_default_timeout(10_000)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


def take(page: Page, name: str) -> None:
    """Take a screenshot of a page down to its note, without the address of the broker."""
    page.add_style_tag(content=".broker-url { display: none; }")
    note = page.locator("#note").bounding_box()
    assert note
    page.set_viewport_size({**SIZE, "height": int(note["y"] + note["height"])})
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")


def test_the_list_of_tasks(shown: Scene, page: Page) -> None:
    """Each job that workers have received is in the list, with state and result."""
    page.goto("/tasks")
    for name, (state, result) in SHOWN.items():
        row = page.get_by_role("row").filter(has_text=shown.jobs[name])
        expect(row.locator(".badge")).to_have_text(state)
        expect(row).to_contain_text(result)
    for name in WAITING:
        expect(page.get_by_text(shown.jobs[name])).to_have_count(0)
    take(page, "flower")


def test_the_search_for_a_state(shown: Scene, page: Page) -> None:
    """The search finds jobs by Celery's states."""
    page.goto("/tasks")
    page.get_by_role("searchbox").fill("state:REVOKED")
    rows = page.locator("#tasks-table tbody tr")
    expect(rows).to_have_count(3)
    for name in ("expired", "cancelled", "cancelled while it ran"):
        expect(rows.filter(has_text=shown.jobs[name])).to_have_count(1)


@pytest.mark.parametrize("name", SHOWN)
def test_a_task(shown: Scene, page: Page, name: str) -> None:
    """The page of a job, opened from the list, shows its state and what that means."""
    page.goto("/tasks")
    page.get_by_role("link", name=shown.jobs[name]).click()
    state, result = SHOWN[name]
    expect(row_of(page, "Status")).to_have_text(state)
    expect(row_of(page, "Result")).to_have_text(result)
    expect(page.locator("#note")).to_contain_text(f"interview-access status {shown.jobs[name]}")
    expect(page.locator("#task-terminate")).to_have_count(int(state == "STARTED"))
    if name == "retries exhausted":
        expect(row_of(page, "Exception")).to_contain_text("StorageUnavailableException: ")
        expect(row_of(page, "Rejected")).to_contain_text(" UTC")
        take(page, "flower-dead-letter")


def row_of(page: Page, term: str) -> Locator:
    """Return the value beside a term on a task's page."""
    row = page.locator(".detail-row").filter(
        has=page.locator("dt", has_text=re.compile(f"^{term}$"))
    )
    return row.locator("dd")


def test_a_waiting_job(shown: Scene, page: Page) -> None:
    """The page of a job that waits says where its state is known."""
    page.goto(f"/task/{shown.jobs['waiting']}")
    expect(page.locator("main")).to_contain_text("Unknown task")
    expect(page.locator("#note")).to_contain_text("The recorded outcome: interview-access status")


def test_the_broker(page: Page) -> None:
    """The broker's page has the counts of the queue and its pause."""
    page.goto("/broker")
    for name, numbers in COUNTS.items():
        cells = (
            page.get_by_role("row")
            .filter(has=page.get_by_role("cell", name=name, exact=True))
            .get_by_role("cell")
        )
        expect(cells.nth(1)).to_have_text(str(numbers["messages"]))
    expect(page.locator("#note strong")).to_have_text(
        re.compile("Paused since .* UTC by an operator: maintenance of the database")
    )
    take(page, "flower-broker")


def test_the_workers(page: Page) -> None:
    """The list of workers counts jobs by their events, and the page of one tells about controls."""
    page.goto("/workers")
    row = page.get_by_role("row").filter(has_text=WORKER)
    failed = sum(state == "FAILURE" for state, _ in SHOWN.values())
    expect(row.get_by_role("cell").nth(4)).to_have_text(str(failed))
    page.get_by_role("link", name=WORKER).click()
    page.locator("#worker-tab-tasks").click()
    expect(page.locator("#tab-tasks")).to_contain_text("interview_access.grant_access")
    page.locator("#worker-tab-queues").click()
    expect(page.locator("#tab-queues")).to_contain_text("interview-access")
    expect(page.locator("#note")).to_contain_text("The worker refuses Restart Pool")
