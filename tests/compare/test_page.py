"""The report in a real browser, opened as a file: tables sort, plots say their values, cases are seen, nothing is asked of a network."""

from __future__ import annotations

import io

import browser
import folds
import numpy as np
import pytest
from browser import wait
from PIL import Image

from nnunet_dante.compare.report import compare

pytestmark = pytest.mark.slow
pytest.importorskip("ipyniivue")
pytest.importorskip("selenium")


@pytest.fixture
def page(nnunet_paths, tmp_path):
    """The address of a report, and a browser."""
    browser.needed()
    folds.write_dataset(tmp_path)
    compare([folds.write_fold(tmp_path, f"nnUNetTrainer{name}", shifts=shifts) for name, shifts in (
        ("LoRA", (0, 1)), ("FromScratch", (2, 4)), ("HeadOnly", (1, 3)))], tmp_path / "report")
    with browser.browser() as driver:
        yield f"file://{tmp_path}/report/report.html", driver


def test_the_report_in_light_and_dark(page):
    address, driver = page
    backgrounds = []
    for scheme in ("light", "dark"):
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        driver.get(address)
        backgrounds.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
        _sort(driver)
        _values(driver)
        _volumes(driver)
        assert browser.barriers(driver) == [] and browser.complaints(driver) == []
    assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 25, 30)"]


def _sort(driver):
    table = driver.find_element("css selector", "table")
    head = table.find_elements("css selector", "th")[1]
    for order in ("ascending", "descending"):
        driver.execute_script("arguments[0].focus()", head.find_element("css selector", "button"))
        driver.switch_to.active_element.send_keys("\ue007")  # Enter
        values = [float(row.text.split()[0]) for row in table.find_elements("css selector", "tbody td:nth-child(2)")]
        assert head.get_attribute("aria-sort") == order and len(values) == 3
        assert values == sorted(values, reverse=order == "descending")


def _values(driver):
    titles = driver.execute_script("return [...document.querySelectorAll('svg circle title')].map(t => t.textContent)")
    assert any(title.startswith("HeadOnly (") and "Dice 0." in title for title in titles), titles
    hit = driver.execute_script("""const circle = document.querySelector('svg circle');
        circle.scrollIntoView({block: 'center'}); const box = circle.getBoundingClientRect();
        return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)?.tagName""")
    assert hit == "circle", "the pointer meets what says the value"


def _volumes(driver):
    section = driver.find_element("css selector", ".volumes")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", section)
    section.find_element("css selector", "button").click()
    canvas = wait(lambda: next(iter(driver.find_elements("css selector", "canvas[data-shown='2']")), None), 60,
                  f"image and truth; {section.text}")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    wait(lambda: len(np.unique(_pixels(canvas), axis=0)) > 50, 20, "a canvas that is not empty")
    shown = _pixels(canvas)
    section.find_element("xpath", ".//label[contains(., 'FromScratch')]/input").click()
    wait(lambda: (_pixels(canvas) != shown).mean() > 0.001, 20, "another mask")


def _pixels(canvas):
    return np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB")).reshape(-1, 3)
