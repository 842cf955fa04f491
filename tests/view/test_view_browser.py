"""The page of a run in a real browser: Chromium without a window, driven by Playwright.

The browser is the system's own (Debian: `apt install chromium`) or the one that AV_MAE_CHROMIUM names; without one this
test fails.
"""

import os
import shutil

import numpy as np
import pytest
import soundfile
from made_run import write_run

from av_mae import plots
from av_mae.view.__main__ import write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """The path of a Chromium."""
    asked = [os.environ["AV_MAE_CHROMIUM"]] if "AV_MAE_CHROMIUM" in os.environ else NAMES
    found = next(filter(None, map(shutil.which, asked)), None)
    if found is None:
        pytest.fail(
            "the page is tested in Chromium, which is not here: install it (Debian: apt install chromium) or "
            "name it with AV_MAE_CHROMIUM"
        )
    return found


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--autoplay-policy=no-user-gesture-required"]
        )
        yield browser
        browser.close()


@pytest.mark.slow
def test_page_in_chromium(browser, tmp_path):
    run = write_run(tmp_path / "run")
    plots.save_png(run / "images" / "localization.png", np.zeros((40, 70, 3), np.uint8))
    tone = np.sin(np.arange(12_000) / 5)
    soundfile.write(run / "images" / "separation" / "clip 1#_estimate.wav", tone, 8000)
    said, asked, failed = [], [], []
    page = browser.new_page(color_scheme="dark")
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.on("requestfailed", lambda request: failed.append(request.url))
    address = write_page(str(run)).as_uri()
    page.goto(address, wait_until="networkidle")
    for image in page.locator("img").all():  # the lazy ones too
        image.scroll_into_view_if_needed()
    page.wait_for_function("Array.from(document.images).every(image => image.complete)")
    sizes = page.evaluate("Array.from(document.images, image => [image.alt, image.naturalWidth, image.naturalHeight])")
    assert ["localization", 70, 40] in sizes and len(sizes) == 4 and all(width > 0 for _, width, _ in sizes)
    curve = page.locator("svg").first
    assert curve.get_attribute("aria-label").startswith("loss over steps") and curve.bounding_box()["width"] > 300
    assert page.evaluate("getComputedStyle(document.querySelector('.problem')).borderLeftWidth") == "4px"

    sounds = page.locator("audio")
    assert sounds.count() == 3
    page.wait_for_function("Array.from(document.querySelectorAll('audio')).every(sound => sound.readyState >= 1)")
    assert page.evaluate("document.querySelectorAll('audio')[1].duration") == pytest.approx(1.5, abs=0.01)
    played = page.evaluate("""async () => {
        const sound = document.querySelectorAll('audio')[1];
        sound.currentTime = 1.2;
        await sound.play();
        await new Promise(done => sound.onended = done);
        return [sound.ended, sound.error];
    }""")
    assert played == [True, None]

    assert said == [] and failed == []
    assert all(url.startswith((run.as_uri(), "data:")) for url in asked)
    assert page.title() == "run · av_mae"
    page.get_by_text("Configuration").click()
    assert "<script>" in page.inner_text("pre")
