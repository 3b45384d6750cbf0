"""The report in a real browser: nothing fails, nothing is fetched, charts are drawn, search works.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from emission_runs import NASTY, two_sources

COMMAND = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(COMMAND is None, reason="no Chromium is installed")

VISIBLE = (
    "[...document.querySelectorAll('#examples details')]"
    ".filter((row) => row.getClientRects().length)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("page")
    run = two_sources()
    for i, row in enumerate(run.rows):
        row["reason"] = "below_cut"
        row["messages"] = [
            {**row["messages"][0], "content": f"{row['messages'][0]['content']} {NASTY}"},
            row["messages"][1],
        ]
        if row["messages_reflected"]:
            row["messages_reflected"] = [row["messages"][0], row["messages_reflected"][1]]
        if i == 44:
            row["messages"][0]["content"] += " with a Zeppelin"
    run.rejects = [
        {"source": "sums", "file": "f", "record": 3, "reason": "unparsable", "raw": "half a Zeppe"}
    ]
    run.left_out = {
        "sums": {
            "duplicate_of": {"chat": 2},
            "near_duplicate_of": {"chat": 1, "sums": 4},
            "overlaps": {"exam": {"exact": 3}, "quiz": {"ngram": 5}},
        }
    }
    html = run.emit(str(folder / "run"), budget_rows=60).files["report.html"]
    (folder / "report.html").write_bytes(html)
    browser = Browser(str(COMMAND), folder / "profile")
    browser.ask("Emulation.setDeviceMetricsOverride", width=1180, height=900,
                deviceScaleFactor=1, mobile=False)  # fmt: skip
    browser.open(f"file://{folder}/report.html")
    yield browser
    browser.close()


def search(page: Browser, words: str = "", fate: str = "") -> list[str]:
    """The fates of the rows that are visible after a search."""
    page.value(
        f"(() => {{ const box = document.getElementById('search');"
        f" box.querySelector('input').value = {words!r};"
        " box.querySelector('input').dispatchEvent(new Event('input'));"
        f" box.querySelector('select').value = {fate!r};"
        " box.querySelector('select').dispatchEvent(new Event('change')); })()"
    )
    found: list[str] = page.value(f"{VISIBLE}.map((row) => row.dataset.fate)")
    return found


def test_no_error_and_nothing_but_the_page_is_fetched(page: Browser) -> None:
    assert page.reported("Runtime.exceptionThrown", "Runtime.consoleAPICalled") == []
    assert page.reported("Log.entryAdded") == []
    fetched = [event["request"]["url"] for event in page.reported("Network.requestWillBeSent")]
    assert len(fetched) == 1
    assert fetched[0].endswith("/report.html")


def test_charts_are_drawn(page: Browser) -> None:
    drawn = page.value(
        "[...document.querySelectorAll('svg')].map((svg) => {"
        " const box = svg.getBoundingClientRect();"
        " const marks = [...svg.querySelectorAll('rect, path, circle')]"
        "  .filter((mark) => mark.getBoundingClientRect().height > 1);"
        " return [box.width, box.height, marks.length]; })"
    )
    assert len(drawn) >= 8
    for width, height, marks in drawn:
        assert width > 200
        assert height > 60
        assert marks >= 2
    bars = page.value(
        "[...document.querySelectorAll('.fill')].map((bar) => bar.getBoundingClientRect().width)"
    )
    assert len(bars) > 6
    assert max(bars) > 50


def test_pairs_of_sources_are_told_most_rows_first(page: Browser) -> None:
    rows = page.value(
        "[...document.querySelectorAll('section')]"
        ".filter((one) => one.querySelector('h2')?.textContent.startsWith('Repeated and'))"
        ".flatMap((one) => [...one.querySelectorAll('tr')])"
        ".map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert rows == [
        ["source", "stays in", "exact", "near"],
        ["sums", "sums", "–", "4"],
        ["sums", "chat", "2", "1"],
        ["source", "holds text of", "exact", "n-gram"],
        ["sums", "quiz", "–", "5"],
        ["sums", "exam", "3", "–"],
    ]


def test_search_filters_by_text_and_by_fate(page: Browser) -> None:
    everything = search(page)
    assert set(everything) == {"emitted", "selected", "dropped", "rejected"}
    assert search(page, "zeppelin") == ["dropped"]
    assert search(page, "ZEPPE") == ["dropped", "rejected"]
    assert search(page, "zeppe half") == ["rejected"]
    assert set(search(page, fate="dropped")) == {"dropped"}
    assert search(page, "zeppe", fate="emitted") == []
    sums = search(page, "of sums")
    assert 0 < len(sums) < len(everything)
    said = page.value("document.querySelector('#search output').textContent")
    assert said == f"{len(sums)} of {len(everything)} shown"
    assert search(page) == everything


def test_text_of_rows_stays_text(page: Browser) -> None:
    assert page.value("document.querySelectorAll('img, script').length") == 1
    assert page.value(f"document.body.textContent.split({NASTY!r}).length") > 20


def test_a_row_opens(page: Browser) -> None:
    search(page, "zeppelin")
    tall = (
        "document.querySelector('#examples details:not([hidden])').getBoundingClientRect().height"
    )
    before = page.value(tall)
    page.value("document.querySelector('#examples details:not([hidden]) summary').click()")
    assert page.value(tall) > before + 40
    search(page)


@pytest.mark.parametrize("width", [1180, 390])
def test_page_has_no_sideways_scroll_and_follows_the_theme(page: Browser, width: int) -> None:
    page.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
             deviceScaleFactor=1, mobile=False)  # fmt: skip
    colours = []
    for theme in ("light", "dark"):
        page.ask("Emulation.setEmulatedMedia",
                 features=[{"name": "prefers-color-scheme", "value": theme}])  # fmt: skip
        style = "getComputedStyle(document.body)"
        colours.append((page.value(f"{style}.backgroundColor"), page.value(f"{style}.color")))
        assert page.value("document.documentElement.scrollWidth") <= width
    assert len({colour for pair in colours for colour in pair}) == 4


def test_page_without_script_shows_all_rows(page: Browser, tmp_path: Path) -> None:
    page.ask("Emulation.setScriptExecutionDisabled", value=True)
    page.ask("Page.reload")
    page.events.clear()
    while not page.reported("Page.loadEventFired"):
        page.ask("Page.getFrameTree")
    page.ask("Emulation.setScriptExecutionDisabled", value=False)
    shown: Any = page.value(f"[{VISIBLE}.length, document.getElementById('search').offsetHeight]")
    assert shown[0] > 60
    assert shown[1] == 0
