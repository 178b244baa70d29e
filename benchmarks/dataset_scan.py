"""What a dry run of `nnunet-dante dataset` costs: its time on a folder of NIfTI files against reading their bytes.

    python benchmarks/dataset_scan.py [--cases 20] [--size 256] [--out benchmarks/results]

The images are smooth with noise, as CT is, and compress to about half. All files are in the file system's cache, so the
disk does not count. "unpack" is gzip alone: no reader can be faster. Also the search through 100,000 empty files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import perf_counter

import numpy as np
import SimpleITK
from scipy.ndimage import gaussian_filter

from nnunet_dante.datasets.gather.found import files_below
from nnunet_dante.datasets.gather.gather import gather
from nnunet_dante.datasets.gather.pairs import find_pairs


def write_cases(folder: Path, cases: int, size: int) -> None:
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(0, 4000, (size // 4, size, size)), 8)
    for n in range(cases):
        image = (np.roll(smooth, n, 1) + rng.normal(0, 12, smooth.shape)).astype(np.int16)
        for name, array in (("", image), ("_seg", (np.roll(smooth, n, 1) > 60).astype(np.uint8))):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(folder / f"P{n:03d}{name}.nii.gz"))


def seconds(action: Callable[[], object]) -> float:
    start = perf_counter()
    action()
    return perf_counter() - start


def unpack(files: list[Path]) -> None:
    for file in files:
        with gzip.open(file) as stream:
            while stream.read(1 << 20):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary, "source")
        source.mkdir()
        write_cases(source, options.cases, options.size)
        files = sorted(source.iterdir())
        size = sum(f.stat().st_size for f in files)
        read = seconds(lambda: [f.read_bytes() for f in files])
        unpacked = seconds(lambda: unpack(files))
        scan = seconds(lambda: gather(source, 1, "Scan", output=temporary, labels=["a=1"], dry_run=True, say=len))
        many = Path(temporary, "many")
        for n in range(1000):
            (many / f"P{n:04d}").mkdir(parents=True)
            for m in range(100):
                (many / f"P{n:04d}" / f"{m // 2}{'_seg' if m % 2 else ''}.png").touch()
        search = seconds(lambda: find_pairs(list(files_below(many))))
    result = {"date": str(date.today()), "processor": platform.processor() or platform.machine(),
              "cores": os.cpu_count(), "cases": options.cases, "megabytes": size / 1e6,
              "read_s": read, "unpack_s": unpacked, "scan_s": scan, "scan_over_read": scan / read,
              "scan_over_unpack": scan / unpacked, "scan_s_per_10_GB": scan / size * 1e10,
              "search_100000_files_s": search}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dataset_scan.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
