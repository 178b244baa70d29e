"""A real browser for tests: Debian's Chromium, driven by selenium, and what is asked of every page in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--use-angle=swiftshader",
         "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--force-prefers-reduced-motion")
LIMIT = 180  # seconds; a page is rarely slower than 10, but the machine may do much else
PICTURES = os.environ.get("UI_PICTURES")  # the folder for the pictures of docs/ui.md, where they are to be made


def needed() -> tuple[str, str]:
    """Return Chromium and its driver; without them a test is skipped, but not on CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not all(found):
        assert not os.environ.get("CI"), "CI installs Debian's chromium and chromium-driver"
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    return found


class Server:
    """`nnunet-dante ui` as a process, as a user starts it."""

    def __init__(self, root: Path):
        self.root = root

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nnunet_dante.cli", "ui", "--no-browser", "--port", "0", "--root", str(self.root)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        said = ""
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/\?token=(\S+)", said)):
            line = self.process.stdout.readline()
            assert line, f"the server ended: {said}"
            said += line
        self.base, self.token = found[1], found[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def browser(width: int = 1280):
    """A driver of Chromium with an empty profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = needed()
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.set_script_timeout(LIMIT)
    try:
        resize(found, width)
        yield found
    finally:
        found.quit()


def resize(driver, width: int, height: int = 900) -> None:
    """Give the page this width; a window in Chromium cannot be narrower than 500 pixels."""
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})


def wait(condition, seconds: float = LIMIT, what="it"):
    """Return the first true value of `condition`; what: text, or a function that returns it, for the case that none comes."""
    from selenium.common.exceptions import (
        ElementClickInterceptedException,
        ElementNotInteractableException,
        StaleElementReferenceException,
    )

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except (StaleElementReferenceException, ElementClickInterceptedException, ElementNotInteractableException):
            pass  # the page has just changed there, or a message lies over it
        time.sleep(0.2)
    raise AssertionError(f"{what() if callable(what) else what} did not come in {seconds:.0f} s")


def text(driver) -> str:
    return driver.execute_script("return document.body.innerText")


def sees(driver, words: str, seconds: float = LIMIT) -> None:
    wait(lambda: words in text(driver), seconds, lambda: f"{words!r} on {driver.current_url} (there is:\n{text(driver)}\n)")


def button(driver, name: str):
    """Return the visible button or link with this name, which is not one of the bar at the top; None if there is none."""
    path = f"//*[self::button or self::a][contains(normalize-space(.), '{name}')][not(ancestor::nav)]"
    return next((e for e in driver.find_elements("xpath", path) if e.is_displayed() and e.is_enabled()), None)


def field(driver, name: str):
    return wait(lambda: next(iter(driver.find_elements("css selector", f'input[aria-label^="{name}"]')), None), what=f"the field {name!r}")


def click(driver, name: str) -> None:
    def clicked() -> bool:
        if (found := button(driver, name)) is None:
            return False
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()
        return True

    wait(clicked, what=lambda: f"the button {name!r} on {driver.current_url} (there is:\n{text(driver)}\n)")


def press(driver, name: str, *keys: str) -> None:
    """Press keys on the slider with this name."""
    driver.execute_script("""const slider = document.querySelector(`[aria-label="${arguments[0]}"]`);
        slider.scrollIntoView({block: 'center'});
        (slider.matches('[tabindex]') ? slider : slider.querySelector('[tabindex]')).focus()""", name)
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def picture(driver, name: str) -> None:
    """Save a picture for the documentation, if pictures are asked for."""
    if PICTURES:
        time.sleep(0.5)
        driver.execute_script("window.scrollTo(0, 0)")
        driver.save_screenshot(str(Path(PICTURES) / f"ui-{name}.png"))


def barriers(driver) -> list[str]:
    """Return what axe-core finds on the page: contrast, names, roles, and that nothing is wider than the window."""
    import axe_core_python

    script = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
    driver.execute_script(script)
    found = driver.execute_async_script(
        "const done = arguments[0]; axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
        ".then(r => done(r.violations)).catch(e => done([{id: String(e), nodes: []}]))")
    wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    return [f"{v['id']}: {node['html'][:160]} {node.get('failureSummary', '')[:200]}" for v in found for node in v["nodes"][:2] or [
        {"html": v.get("help", "")}]] + ([f"{wide} pixels wider than the window"] if wide > 0 else [])


def complaints(driver) -> list[str]:
    """Return the errors in the browser's console since the last call, and every address elsewhere that it asked for."""
    import json

    log = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"
           and not re.search(r"/report\.html - Blocked script execution .* sandboxed", entry["message"])]  # as it should be
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = message["params"]["request"]["url"]
            if not address.startswith(("http://127.0.0.1:", "file:", "data:", "blob:", "chrome:", "about:", "ws://127.0.0.1:")):
                log.append(f"asked for {address}")
    return log
