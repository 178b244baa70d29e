"""What the page of `nnunet-dante ui` costs: its first paint, opening a large volume, and a server that does nothing.

    python benchmarks/page.py [--shape 512 512 300] [--out benchmarks/results]

First paint: by the browser's own clock, from the request for the start page on, just after the server has printed its
address. Opening: from the request for the page of a result until image and mask are drawn, with the transfers and the
time that the processes computed, which a busy machine hardly changes; the image has the noise of a CT. Idle: memory and
CPU of the server, with a browser open on its start page. Needs the packages of the tests, and Debian's packages
chromium and chromium-driver. Chromium draws with software.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import SimpleITK

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import browser  # noqa: E402

IDLE_SECONDS = 30
DATASET, MODEL = "Dataset001_Large", "nnUNet_results/Dataset001_Large/nnUNetTrainerLoRA__nnUNetDantePlans__3d_fullres"
PAINT = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
DRAWN = """const canvas = document.querySelector("canvas[data-shown='2']");
    if (!canvas) return null;
    canvas.getContext("webgl2").finish();  // what was sent to be drawn is drawn
    return [performance.now(), performance.getEntriesByType("resource").filter((e) => e.name.includes("/volume/"))
        .map((e) => [e.startTime, e.duration, e.transferSize / 2 ** 20])]"""


def write_run(out: Path, shape: Sequence[int]) -> None:
    """Write what the page of a result reads of a finished run: an image, and a mask as truth and as prediction."""
    raw, fold = out / "nnUNet_raw" / DATASET, out / MODEL / "fold_0"
    middle = tuple(slice(n // 4, 3 * n // 4) for n in reversed(shape))
    mask = np.zeros(shape[::-1], np.uint8)  # shape (z, y, x)
    mask[middle] = 1
    image = np.random.default_rng(0).normal(0, 20, mask.shape).astype(np.int16) + np.int16(60) * mask
    for voxels, file in ((image, raw / "imagesTr" / "P01_0000.nii.gz"), (mask, raw / "labelsTr" / "P01.nii.gz"),
                         (mask, fold / "validation" / "P01.nii.gz")):
        file.parent.mkdir(parents=True)
        volume = SimpleITK.GetImageFromArray(voxels)
        volume.SetSpacing((0.8, 0.8, 1.5))
        SimpleITK.WriteImage(volume, str(file), True)
    (raw / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz", "labels": {"background": 0, "organ": 1}}))
    done = {"data": {"dataset": DATASET}, "folds": {"folds": ["0"]},
            "files": {"folder": MODEL, "fold": "0"}}
    (out / "adapt.json").write_text(json.dumps({"format": 1, "asked": {"model": "M", "source": "S"}, "done": done}))


def opening(driver: Any, server: browser.Server, out: Path) -> dict[str, Any]:
    """Return how many seconds the browser needs for the page of a result with its image and mask."""
    browsers = psutil.Process(driver.service.process.pid).children(recursive=True)
    processes = [psutil.Process(server.process.pid), *browsers]
    before = [cpu_seconds(process) for process in processes]
    driver.get(f"{server.base}/result?folder={out}")
    now, transfers = browser.wait(lambda: driver.execute_script(DRAWN), 300, "image and mask")
    server_cpu, *browser_cpu = [cpu_seconds(process) - was for process, was in zip(processes, before)]
    return {"seconds": now / 1000, "cpu_seconds": {"server": server_cpu, "browser": sum(browser_cpu)}, "transfers": [
        {"begins": begin / 1000, "seconds": seconds / 1000, "mib": mib} for begin, seconds, mib in transfers]}


def cpu_seconds(process: psutil.Process) -> float:
    """Return how long a process has been computing."""
    times = process.cpu_times()
    return times.user + times.system


def idle(server: browser.Server) -> dict[str, float]:
    """Return memory and share of a core of the server's process."""
    process = psutil.Process(server.process.pid)
    before = cpu_seconds(process)
    time.sleep(IDLE_SECONDS)
    return {"mib": process.memory_info().rss / 2**20, "core": (cpu_seconds(process) - before) / IDLE_SECONDS}


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 300))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, browser.browser() as driver:
        root = Path(folder)
        write_run(root / "run", args.shape)
        server = browser.Server(root)
        server.start()
        try:
            driver.get(f"{server.base}/?token={server.token}")
            found = {"shape": list(args.shape), "first_paint_seconds": browser.wait(
                lambda: driver.execute_script(PAINT)) / 1000}
            found["idle"] = idle(server)
            found["opening"] = opening(driver, server, root / "run")
        finally:
            server.kill()
    found |= {"date": str(date.today()), "machine": platform.machine(), "cores": os.cpu_count(),
              "load": os.getloadavg()[0]}
    print(json.dumps(found, indent=1))
    if args.out:
        (args.out / "page.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
