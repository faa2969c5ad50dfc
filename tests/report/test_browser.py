"""The report in a real browser: no errors, no requests, nothing too wide, in light and dark, on a phone and a desktop.

Skipped where Chromium and its driver are not installed (`apt-get install chromium chromium-driver`).
"""

import base64
import json
import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.cli.run import lrquant as command
from tests.tiny import write_tiny

selenium = pytest.importorskip("selenium.webdriver")
exceptions = pytest.importorskip("selenium.common.exceptions")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no Chromium with its driver here: apt-get install chromium chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    done = command(
        "quantize", write_tiny(folder / "tiny"), "--save-dir", folder / "out", "--calib", "zoo:pydoc", "--nsamples", 4,
        "--seqlen", 32, "--epochs", 1, "--batch-size", 2, "--eval-ppl", "zoo:pydoc", "--limit-windows", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


def look(browser: Any, page: Path, width: int, scheme: str) -> Image.Image:
    """The whole page at `width`, as a picture."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        browser.get(page.as_uri())
    except exceptions.TimeoutException:  # a machine under load
        browser.get(page.as_uri())
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    return Image.open(BytesIO(base64.b64decode(shot["data"]))).convert("L")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_cleanly(browser: Any, page: Path, width: int, scheme: str) -> None:
    picture = look(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = {m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert {address for address in addresses if not address.startswith("data:")} <= {page.as_uri()}
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # no sideways scrolling
    assert picture.height > 3000  # figures are there
    background = picture.getpixel((2, 2))
    assert background > 200 if scheme == "light" else background < 60


def test_figures_are_drawn_and_take_the_pages_colours(browser: Any, page: Path) -> None:
    look(browser, page, 1280, "dark")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(svg => { const b = svg.getBoundingClientRect();"
        " return [b.width, b.height, svg.getAttribute('aria-label').length] })"
    )
    assert len(boxes) >= 8
    assert all(width > 300 and height > 100 and label > 20 for width, height, label in boxes)
    fills = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].slice(0, 50).map(t => getComputedStyle(t).fill)"
    )
    assert set(fills) == {"rgb(228, 231, 235)"}  # the dark page's ink


def test_it_prints(browser: Any, page: Path) -> None:
    look(browser, page, 1280, "dark")
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"  # on paper it is light, whatever the screen is
