"""The page in a real browser, wherever one is installed."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Page,
    ViewportSize,
    WebSocketRoute,
    sync_playwright,
)

from driving_sim.data.drive import sample
from driving_sim.data.inspect.motion import yaw_motion
from driving_sim.data.sources import find_drives
from driving_sim.play.serving.server import Server
from driving_sim.play.starts import Start, find_starts
from driving_sim.world_model import WorldModel
from tests.play.serving.served import serving

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def port(world: WorldModel, starts: dict[str, Start], tmp_path: Path) -> Iterator[int]:
    server = Server(world, "town", starts, sessions=2, recordings=tmp_path / "recordings")
    with serving(server) as port:
        yield port


@pytest.fixture
def page(browser: Browser, port: int) -> Iterator[Page]:
    """Return the page, driving. A message in the console fails the test."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        page = opened(context, port)
        yield page


def opened(context: BrowserContext, port: int) -> Page:
    page = context.new_page()
    page.on("console", lambda message: pytest.fail(f"console: {message.text}"))
    page.on("pageerror", lambda error: pytest.fail(f"page: {error}"))
    page.goto(f"http://127.0.0.1:{port}/")
    status(page, "driving")
    after(page, 1)
    return page


def status(page: Page, expected: str) -> None:
    page.wait_for_selector(f"#status[data-status={expected}]", state="attached")


def frame(page: Page) -> int:
    return int(page.get_attribute("#view", "data-frame") or -1)


def until(page: Page, holds: Callable[[], bool]) -> None:
    """Wait until something holds. (`wait_for_function` needs `eval`, which the page forbids.)"""
    for _ in range(400):
        if holds():
            return
        page.wait_for_timeout(25)
    pytest.fail("it did not happen within 10 s")


def after(page: Page, number: int) -> None:
    until(page, lambda: frame(page) >= number)


def noticed(page: Page, text: str) -> None:
    until(page, lambda: text in (page.text_content("#notice") or ""))


def number(page: Page, selector: str) -> float:
    """Return the number that a gauge shows, negative for a wheel turned to the right."""
    text = page.inner_text(selector)
    (digits, *_) = re.findall(r"\d+(?:\.\d+)?", text)
    return -float(digits) if "right" in text else float(digits)


def test_it_drives_and_shows_what_it_measures(page: Page) -> None:
    after(page, 20)
    for selector in ("#speed", "#time", "#rate"):
        assert number(page, selector) > 0, selector
    page.keyboard.down("ArrowLeft")
    after(page, frame(page) + 4)
    assert number(page, "#wheel-value") > 0
    page.keyboard.up("ArrowLeft")
    assert number(page, "#latency") > 0


@pytest.mark.parametrize("keys", [("ArrowLeft", "ArrowRight"), ("a", "d")])
def test_keys_turn_the_wheel_both_ways(page: Page, keys: tuple[str, str]) -> None:
    for key, sign in zip(keys, (1, -1), strict=True):
        page.keyboard.down(key)
        after(page, frame(page) + 6)
        assert sign * number(page, "#wheel-value") > 0
        page.keyboard.up(key)


def test_pedals_change_the_speed(page: Page) -> None:
    before = number(page, "#speed")
    page.keyboard.down("s")
    after(page, frame(page) + 8)
    braked = number(page, "#speed")
    assert braked < before
    page.keyboard.up("s")
    page.keyboard.down("w")
    after(page, frame(page) + 12)
    assert number(page, "#speed") > braked


def test_pause_step_back_and_reset(page: Page) -> None:
    after(page, 12)
    page.keyboard.press("Space")
    status(page, "paused")
    page.wait_for_timeout(300)
    stopped = frame(page)
    page.keyboard.press(".")
    after(page, stopped + 1)
    page.wait_for_timeout(300)
    assert frame(page) == stopped + 1
    page.click("#back")
    until(page, lambda: frame(page) < stopped)
    page.click("#reset")
    until(page, lambda: frame(page) == 0)
    page.click("#pause")
    status(page, "driving")
    after(page, 3)


def test_another_start_can_be_chosen(page: Page) -> None:
    assert page.get_attribute("#view", "data-start") == "a"
    chosen = page.locator("#starts [data-start=b]")
    chosen.click()
    page.wait_for_selector("#view[data-start=b]")


def test_settings_reach_the_server(page: Page) -> None:
    page.fill("#temperature", "0.5")
    page.keyboard.press("Enter")
    page.fill("#seed", "7")
    page.keyboard.press("Tab")
    page.wait_for_timeout(200)
    page.reload()
    status(page, "driving")
    assert page.input_value("#temperature") == "0.5"
    assert page.input_value("#seed") == "7"


def test_a_script_holds_the_wheel(page: Page) -> None:
    page.fill("#plan", "speed=7 steer=0.1")
    page.click("#hand-over")
    until(page, lambda: number(page, "#speed") == 7)
    page.click("#take-back")
    page.fill("#plan", "nonsense")
    page.click("#hand-over")
    noticed(page, "script")


def test_the_heat_map_and_the_scaling_change_the_picture(page: Page) -> None:
    page.keyboard.press("Space")
    status(page, "paused")
    plain = page.locator("#view").screenshot()
    page.keyboard.press("h")
    page.wait_for_timeout(200)
    heated = page.locator("#view").screenshot()
    assert plain != heated
    page.keyboard.press("h")
    page.wait_for_timeout(200)
    assert page.locator("#view").screenshot() == plain
    page.keyboard.press("p")
    page.wait_for_timeout(200)
    assert page.locator("#view").screenshot() != plain


def test_what_if_shows_three_futures_and_their_truths(page: Page) -> None:
    after(page, 4)
    page.keyboard.press("q")
    page.wait_for_selector("#what-if-panel", state="visible")
    until(page, lambda: "dB" in page.inner_text("#what-if-panel"))
    status(page, "paused")
    page.keyboard.press("Escape")
    page.wait_for_selector("#what-if-panel", state="hidden")


def test_a_drive_is_recorded(page: Page, tmp_path: Path) -> None:
    page.keyboard.press("k")
    page.wait_for_timeout(1000)
    page.keyboard.press("k")
    noticed(page, ".mp4")
    assert len(list((tmp_path / "recordings").glob("*.mp4"))) == 1


def test_two_tabs_drive_apart_and_a_third_waits(page: Page, port: int) -> None:
    second = opened(page.context, port)
    third = page.context.new_page()
    third.goto(f"http://127.0.0.1:{port}/")
    status(third, "busy")
    assert "in use" in third.inner_text("#veil")
    page.keyboard.press("Space")
    status(page, "paused")
    status(second, "driving")


def test_a_lost_connection_is_taken_up_again(page: Page) -> None:
    sockets: list[WebSocketRoute] = []

    def pass_on(socket: WebSocketRoute) -> None:
        sockets.append(socket.connect_to_server())

    page.route_web_socket(re.compile("/drive"), pass_on)
    page.reload()
    after(page, 8)
    stopped = frame(page)
    sockets[0].close()
    status(page, "lost")
    status(page, "driving")
    assert len(sockets) == 2
    after(page, frame(page) + 2)
    assert frame(page) > stopped  # the same drive, not another one


def test_a_server_that_stops_says_so(
    browser: Browser, world: WorldModel, starts: dict[str, Start]
) -> None:
    with browser.new_context() as context:
        with serving(Server(world, "town", starts, sessions=1, recordings=None)) as port:
            page = opened(context, port)
        status(page, "ended")
        assert "The server has stopped" in page.inner_text("#veil-text")


def test_keys_do_not_drive_while_text_is_typed(page: Page) -> None:
    page.fill("#plan", "")
    page.focus("#plan")
    page.keyboard.type("a d w s r q h . ")
    assert page.input_value("#plan") == "a d w s r q h . "
    status(page, "driving")


@pytest.mark.parametrize("size", [(390, 844), (844, 390), (1024, 700)])
def test_the_controls_fit_on_small_screens(
    browser: Browser, port: int, size: tuple[int, int]
) -> None:
    viewport = ViewportSize(width=size[0], height=size[1])
    with browser.new_context(viewport=viewport, has_touch=True, is_mobile=True) as context:
        page = opened(context, port)
        for selector in ("#view", "#wheel", "#throttle", "#brake"):
            box = page.locator(selector).bounding_box()
            assert box is not None, selector
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= size[0] + 1, selector
            assert box["y"] + box["height"] <= size[1] + 1, selector


def test_every_control_has_a_name(page: Page) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, [role], [tabindex]')]
            .filter(e => e.checkVisibility() && !e.ariaLive)
            .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')
                || e.labels?.length || e.textContent.trim() || e.title))
            .map(e => e.outerHTML.slice(0, 100))"""
    )
    assert nameless == []


def test_left_and_right_turn_the_picture_opposite_ways(browser: Browser, tmp_path: Path) -> None:
    world = WorldModel.from_run("synthetic", "cpu")
    server = Server(
        world, "synthetic", find_starts(world, None, tmp_path), sessions=1, recordings=tmp_path
    )
    turned: list[float] = []
    with serving(server) as port, browser.new_context() as context:
        page = opened(context, port)
        for key in ("ArrowLeft", "ArrowRight"):
            page.click("#reset")
            until(page, lambda: frame(page) < 5)
            page.keyboard.down(key)
            page.click("#record")
            page.wait_for_selector("#record[aria-pressed=true]")
            after(page, 20)
            page.click("#record")
            until(page, lambda: len(list(tmp_path.glob("*.json"))) > len(turned))
            page.keyboard.up(key)
            (newest,) = sorted(tmp_path.glob("*.mp4"))[-1:]
            (found,) = find_drives([newest]).drives
            frames = found.frames(np.arange(len(sample(found).timestamps)))
            turned.append(float(yaw_motion(frames).mean()))
    left, right = turned
    assert left * right < 0
