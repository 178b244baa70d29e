"""The whole way in a real browser: choose, start, watch, stop, go on, look, set the strength, hand on.

UI_PICTURES=docs/images makes the pictures of docs/ui.md.
"""

from __future__ import annotations

import http.client
import io
import json
import shutil
import time
from pathlib import Path

import browser
import nibabel
import numpy as np
import pytest
import tiny
from browser import click, field, picture, sees, wait

pytestmark = pytest.mark.slow
pytest.importorskip("nicegui")
pytest.importorskip("selenium")
SHAPE = (40, 48, 40)
LONG = 900  # seconds, for what takes one or two minutes on a machine that does nothing else


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a donor and with images and masks, as users have them."""
    browser.needed()
    root = Path("/tmp/anna") if browser.PICTURES else tmp_path_factory.mktemp("home")
    if browser.PICTURES:
        shutil.rmtree(root, ignore_errors=True)
    tiny.write_model_folder(root / "models", labels={"background": 0, "kidney": 1, "tumour": 2})
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / "scans" / folder).mkdir(parents=True)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    for case in range(2):
        middle = np.array(SHAPE) / 2 + rng.uniform(-3, 3, 3)
        body = sum(((grid[i] - SHAPE[i] / 2) / (SHAPE[i] * 0.46)) ** 2 for i in range(3)) < 1
        kidney = sum(((grid[i] - middle[i]) / r) ** 2 for i, r in enumerate((9, 14, 11))) < 1
        tumour = sum((grid[i] - middle[i] - (3, 6, 2)[i]) ** 2 for i in range(3)) < 25
        mask = np.where(tumour, 2, np.where(kidney, 1, 0)).astype(np.uint8)
        image = (200 * body + 250 * kidney + 250 * tumour + rng.normal(0, 40, SHAPE)).astype(np.float32)
        for name, voxels in (("images", image), ("labels", mask)):
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1])), root / "scans" / name / f"P{case + 1:02d}.nii.gz")
    return root


@pytest.fixture(scope="module")
def server(root):
    found = browser.Server(root)
    found.start()
    yield found
    found.kill()


@pytest.fixture(scope="module")
def driver():
    with browser.browser() as found:
        yield found


def enter(driver, server, path="/"):
    driver.get(f"{server.base}/?token={server.token}")
    driver.get(server.base + path)


def test_without_the_token_there_is_no_page(server):
    host = server.base.removeprefix("http://")
    for path, headers in (("/", {}), ("/?token=wrong", {}), (f"/?token={server.token}", {"Origin": "http://evil.example"}),
                          (f"/?token={server.token}", {"Host": "evil.example"}), ("/_nicegui_ws/socket.io/?EIO=4&transport=polling", {})):
        connection = http.client.HTTPConnection(host)
        connection.request("GET", path, headers=headers)
        assert connection.getresponse().status == 403, path


def test_the_whole_way(driver, server, root):
    _choose_and_start(driver, server, root)
    _stop_and_go_on_without_a_server(driver, server, root)
    _look_and_hand_on(driver, server, root)
    _on_a_phone_and_in_the_dark(driver, server, root)
    _delete(driver, server, root)


def drawn(driver, chart: str) -> int:
    """Return how many points the longest line of a chart has."""
    return driver.execute_script("""const place = document.querySelector(`[aria-label="${arguments[0]}"]`);
        const shown = place && getElement(Number(place.id.slice(1)))?.chart?.getOption();
        return Math.max(0, ...(shown?.series ?? []).filter((line) => line.name !== "donor").map((line) => line.data.length))""", chart)


def pixels(canvas) -> np.ndarray:
    """Return what a canvas shows, shape (y, x, 3)."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB"))


def _choose_and_start(driver, server, root):
    enter(driver, server)
    assert "token" not in driver.current_url
    sees(driver, "Adapt a network to your images")
    sees(driver, "Dataset900_Donor")
    picture(driver, "start")
    click(driver, "scans")
    wait(lambda: field(driver, "Folder").get_attribute("value").endswith("scans"))
    click(driver, "Look at it")
    sees(driver, "What do the numbers in the masks mean?")
    field(driver, "1 is").send_keys("kidney")
    field(driver, "2 is").send_keys("tumour")
    click(driver, "Use these names")
    sees(driver, "Adapt a network to these cases")
    assert "background=" not in driver.current_url, "these two are all numbers in the masks"
    wait(lambda: len(driver.find_elements("css selector", ".case img")) == 2, what="pictures of both cases")
    picture(driver, "data")
    assert browser.barriers(driver) == []
    click(driver, "Adapt a network to these cases")
    sees(driver, "known")
    picture(driver, "adapt")
    assert browser.barriers(driver) == []
    field(driver, "Options of the trainings").send_keys("epochs=4, iterations=4, val_iterations=1, lr=0.01")
    click(driver, "Start")
    sees(driver, "running")
    assert (root / "nnunet-dante" / "scans" / "adapt.json").is_file()


def _stop_and_go_on_without_a_server(driver, server, root):
    out = root / "nnunet-dante" / "scans"
    wait(lambda: drawn(driver, "Dice by epoch") >= 2, LONG, "two epochs in the curve")
    sees(driver, "Memory so far, at most")
    picture(driver, "run")
    assert browser.barriers(driver) == []
    click(driver, "Stop")
    sees(driver, "Go on")
    done = set(json.loads((out / "adapt.json").read_text())["done"])
    click(driver, "Go on")
    sees(driver, "running")
    assert browser.complaints(driver) == []
    server.kill()
    wait(lambda: set(json.loads((out / "adapt.json").read_text())["done"]) > done, LONG, "a step without a server")
    server.start()
    enter(driver, server, "/runs")
    driver.get_log("browser")  # that the server could not be reached is no fault
    click(driver, "scans")


def _look_and_hand_on(driver, server, root):
    out = root / "nnunet-dante" / "scans"
    wait(lambda: "files" in json.loads((out / "adapt.json").read_text())["done"], LONG, "the end of the run")
    click(driver, "See the result")
    canvas = wait(lambda: next(iter(driver.find_elements("css selector", "canvas[data-shown='2']")), None), what="image and mask")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    wait(lambda: len(np.unique(pixels(canvas).reshape(-1, 3), axis=0)) > 200, what="a canvas that is not empty")
    shown = pixels(canvas)
    browser.press(driver, "Opacity of truth", *["\ue014"] * 10)  # right
    wait(lambda: (pixels(canvas) != shown).mean() > 0.01, what="the truth")
    sees(driver, "How much of the training is kept")
    sees(driver, "Write the model at this strength")
    picture(driver, "result")
    assert browser.barriers(driver) == []

    before = (out / "model.zip").stat().st_mtime_ns
    browser.press(driver, "Strength", *["\ue012"] * 20)  # left
    sees(driver, "Chosen: 0 %")
    click(driver, "Write the model at this strength")
    sees(driver, "The model keeps 0 % now", LONG)
    assert (out / "model.zip").stat().st_mtime_ns > before

    field(driver, "Folder with new images").send_keys(str(root / "scans" / "images"))
    click(driver, "Segment them")
    sees(driver, "the least sure first", LONG)
    assert len(list((root / "nnunet-dante").glob("scans-masks/P0?.nii.gz"))) == 2

    (root / "dafne").mkdir()
    field(driver, "Models folder of Dafne").send_keys(str(root / "dafne"))
    click(driver, "Put it into Dafne")
    wait(lambda: list((root / "dafne").glob("*.model")), what="the model in Dafne's folder")
    session = http.client.HTTPConnection(server.base.removeprefix("http://"))
    session.request("GET", f"/file{out}/model.zip", headers={
        "Cookie": "; ".join(f"{c['name']}={c['value']}" for c in driver.get_cookies()), "Accept-Encoding": "gzip"})
    assert session.getresponse().read() == (out / "model.zip").read_bytes(), "as it is on disk, not compressed once more"
    enter(driver, server, "/compare")
    sees(driver, "Finished runs")
    assert browser.barriers(driver) == []
    assert browser.complaints(driver) == []


def _on_a_phone_and_in_the_dark(driver, server, root):
    out = root / "nnunet-dante" / "scans"
    for width, scheme in ((390, "light"), (1280, "dark")):
        browser.resize(driver, width)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        for page, words in (("/", "Dataset900_Donor"), ("/runs", "scans"), (f"/run?folder={out}", "Steps"), (f"/result?folder={out}", "Hand it on")):
            enter(driver, server, page)
            sees(driver, words)
            found = browser.barriers(driver)
            assert found == [], (width, scheme, page, found)
        if width == 390:
            picture(driver, "phone")
    browser.resize(driver, 1280)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def _delete(driver, server, root):
    out = root / "nnunet-dante" / "scans"
    enter(driver, server, f"/run?folder={out}")
    click(driver, "Delete")
    sees(driver, "Your images stay.")
    click(driver, "Delete it")
    sees(driver, "No run yet")
    assert not out.exists() and len(list((root / "scans" / "images").iterdir())) == 2


def test_by_keyboard_alone(driver, server):
    enter(driver, server)
    sees(driver, "Choose the folder")
    reached = []
    for _ in range(40):
        driver.switch_to.active_element.send_keys("\ue004")  # tab
        reached.append(driver.switch_to.active_element.text or driver.switch_to.active_element.get_attribute("aria-label"))
        if "scans" in (reached[-1] or ""):
            break
    assert "Runs" in reached and "Folder" in reached and "Look at it" in reached, reached
    driver.switch_to.active_element.send_keys("\ue007")  # enter
    wait(lambda: field(driver, "Folder").get_attribute("value").endswith("scans"))
    field(driver, "Folder").send_keys("\ue007")
    sees(driver, "/scans")
    assert "/data" in driver.current_url


def test_what_is_wrong_is_said(driver, server, root):
    for page, words in (("/data?folder=/etc", "lies outside of"), ("/data?folder=../..", "lies outside of"),
                        (f"/data?folder={root / 'models'}", "no image"), ("/run?folder=scans", "cannot be read")):
        enter(driver, server, page)
        sees(driver, words)


def test_the_server_is_small_and_idle(server):
    status = Path(f"/proc/{server.process.pid}/status")
    if not status.exists():
        pytest.skip("needs Linux")

    def value(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    assert value("VmRSS") < 300 * 1024, f"{value('VmRSS')} kB"
    before = value("voluntary_ctxt_switches")
    time.sleep(10)
    woken = value("voluntary_ctxt_switches") - before  # benchmarks/page.py measures what that costs
    assert woken < 1000, f"woken {woken} times in 10 s, with a browser open"
