"""The report in a real browser: no error, examples open, it fits a phone, both colour schemes, and it opens quickly."""

import shutil

import pytest

from hapo_verl.report.__main__ import main
from tests.report.made import write_metrics, write_trace

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: chromium is not on the PATH")

SECONDS_TO_OPEN = 2.0


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def report(tmp_path):
    """The report of a run with this number of steps, as a file."""

    def make(steps, prompts, **trace):
        write_metrics(tmp_path / "run" / "metrics.jsonl", steps)
        write_trace(tmp_path / "run" / "trace", min(steps, 2 * prompts), prompts=prompts, **trace)
        path = tmp_path / "report.html"
        assert main([str(tmp_path / "run"), "--output", str(path)]) == 0
        return path

    return make


@pytest.fixture
def open_page(browser):
    """Open a file at a given width; any console message or network request fails the test."""
    said, pages = [], []

    def open_at(path, width, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri(), wait_until="load")
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.close()
    assert said == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_and_an_example_opens(report, open_page, width, scheme):
    page = open_page(report(20, prompts=6, tokens=60), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    example = page.locator("details.example").first
    assert example.locator(".tokens").count() == 0
    example.locator("summary").click()
    assert example.locator(".tokens span").count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    red, green, blue = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert (red + green + blue > 3 * 128) == (scheme == "light")


def test_pointing_at_a_curve_shows_its_values(report, open_page):
    page = open_page(report(20, prompts=6), 1280)
    figure = page.locator("figure").first
    figure.locator("svg").hover()
    assert "run, on policy: " in figure.locator(".reading").inner_text()


@pytest.mark.long
def test_10000_steps_and_1000_examples_open_in_two_seconds(report, open_page):
    page = open_page(report(10_000, prompts=1000, groups=1, rollouts=2, tokens=300), 1280)
    # The CPU time of the page's process since it started. It is close to the elapsed time on an idle machine, and does
    # not depend on the machine's load.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    seconds = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}["ProcessTime"]
    assert 0 < seconds < SECONDS_TO_OPEN
