"""The page in a real browser: nothing goes wrong, everything is drawn, and tabs, tips and themes work."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateurs import report

sync = pytest.importorskip("playwright.sync_api", reason="the driver of browsers is not installed")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here")


@pytest.fixture(scope="module")
def file(outputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folders = [folder for name, folder in outputs.items() if name != "source"]
    place = tmp_path_factory.mktemp("page") / "page.html"
    return report(folders, output=place, prompt=["once"], tokens=6, device="cpu")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[Any]:
    """Opens the page at a width, in a theme; what goes wrong, or wants a network, fails the test."""
    wrong: list[str] = []
    contexts = []

    def opened(width: int, theme: str, **more: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, offline=True, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and wrong.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def lightness(page: Any, selector: str, of: str) -> float:
    """Of a computed colour, from 0 to 255."""
    colour = page.eval_on_selector(
        selector,
        """(element, of) => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d");
          canvas.fillStyle = getComputedStyle(element)[of];
          canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data];
        }""",
        of,
    )
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_is_drawn_without_scrolling_sideways(opened: Any, width: int, theme: str) -> None:
    page = opened(width, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper, ink = (lightness(page, "body", of) for of in ("backgroundColor", "color"))
    assert (paper > 200 > 100 > ink) if theme == "light" else (ink > 200 > 100 > paper)
    charts = page.locator(".group:not(.away) .chart > svg")
    assert charts.count() > 10
    for chart in charts.all():
        box = chart.bounding_box()
        assert 250 < box["width"] < min(width, 600), "a chart has room"
        assert chart.locator("path.line, path.mark, path.steps, path.area").count(), "and something in it"
    outside = page.evaluate(
        """[...document.querySelectorAll(".panel, .wide, .tabs, header, h1")].filter((element) => {
          const box = element.getBoundingClientRect();
          return box.width && (box.left < 0 || box.right > innerWidth + 1);
        }).length"""
    )
    assert outside == 0
    shades = page.locator("#layers .map td[data-tip]")
    assert shades.count() > 20


def test_tabs_show_one_model_at_a_time_and_obey_keys(opened: Any) -> None:
    page = opened(1400, "light")
    tabs = page.locator("#layers [role=tab]")
    assert tabs.count() == 3
    panels = page.locator("#layers [role=tabpanel]")
    assert [panel.is_visible() for panel in panels.all()] == [True, False, False]
    tabs.nth(1).click()
    assert [panel.is_visible() for panel in panels.all()] == [False, True, False]
    page.keyboard.press("ArrowRight")
    assert [panel.is_visible() for panel in panels.all()] == [False, False, True]
    page.keyboard.press("Home")
    assert tabs.nth(0).get_attribute("aria-selected") == "true"
    assert [panel.is_visible() for panel in panels.all()] == [True, False, False]


def test_tips_follow_the_pointer_and_the_arrow_keys(opened: Any) -> None:
    page = opened(1400, "light")
    tip = page.locator("#tip")
    assert not tip.is_visible()
    mark = page.locator("#quality .mark[data-tip]").first
    mark.hover()
    assert tip.is_visible()
    assert tip.inner_text() == mark.get_attribute("data-tip")
    page.locator("h1").hover()
    assert not tip.is_visible()
    page.locator("#quality .chart > svg").first.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == page.locator("#quality [data-tip]").first.get_attribute("data-tip")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.locator("#texts .tokens").focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == page.locator("#texts [data-tip]").first.get_attribute("data-tip")
    assert len(tip.inner_text().split(",")) == 3, "one divergence of each model but the first"


def test_the_switch_goes_before_the_system(opened: Any) -> None:
    page = opened(400, "dark")
    switch = page.locator("#theme")
    assert lightness(page, "body", "backgroundColor") < 100
    switch.click()
    assert switch.inner_text() == "Theme: light"
    assert lightness(page, "body", "backgroundColor") > 200
    page.reload()
    assert switch.inner_text() == "Theme: light"
    switch.click()
    switch.click()
    assert switch.inner_text() == "Theme: system"


def test_numbers_are_below_each_chart_and_all_is_there_in_print_and_without_scripts(opened: Any) -> None:
    page = opened(1400, "light")
    assert page.locator(".chart").count() == page.locator(".chart details table").count()
    details = page.locator("#quality .chart details").first
    details.locator("summary").click()
    assert details.locator("table").is_visible()
    page.emulate_media(media="print")
    assert all(panel.is_visible() for panel in page.locator("#layers [role=tabpanel]").all())
    plain = opened(1400, "light", java_script_enabled=False)
    assert all(panel.is_visible() for panel in plain.locator("#layers [data-tab]").all())
