"""Every trainer on a device: trained, stopped and continued, validated, predicted; its first loss against the CPU's.

    python benchmarks/gpu/smoke.py --device cuda --out OUT [--tiny] [--only nnUNetTrainerLoRA ...]

Mixed precision and torch.compile are as nnU-Net has them: both on by default on CUDA, none on a CPU. The data are the
synthetic boxes of the tests. OUT/smoke.json is written anew after every trainer. A trainer passes if
- the loss of the first step is that of a CPU in float32 within LOSS, compiled or not;
- a training that was stopped after an epoch ends with the weights of one that was not: within WEIGHTS of the largest
  weight, and bit for bit on a CPU;
- torch.compile met no graph break, and never fell back to eager code: torch raises an error where it would;
- nnU-Net's validation finds a Dice, and device and CPU predict the same label in at least SAME of the voxels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import traceback
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "MPLBACKEND": "Agg"}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402
from nnunetv2.training.logging.nnunet_logger import LocalLogger  # noqa: E402
from running import Prepared, build, prepare, threads_for_pools, train_and_resume  # noqa: E402

from nnunet_dante.training import trainers  # noqa: E402
from nnunet_dante.training.launch import VARIABLE, search_path  # noqa: E402

LOSS, WEIGHTS, SAME = 0.02, 0.02, 0.98
FIRST = ("nnUNetTrainerLoRA", "nnUNetTrainerFineTune", "nnUNetTrainerGradualUnfreezing", "nnUNetTrainerLoRADecoder")
NAMES = [*FIRST, *sorted(trainers.TRAINERS.keys() - set(FIRST))]
DEFAULT = {"features": (32, 64, 128, 256), "patch": (64, 64, 64)}
# An epoch for every stage of gradual unfreezing.
OVERRIDES = {"epochs": 6, "iterations": 2, "val_iterations": 1, "rank": 8, "alpha": 16.0, "open_by": 1.0}


@contextlib.contextmanager
def compiling(on: bool) -> Any:
    """Let nnU-Net compile by its own rule, or not at all."""
    os.environ.pop("nnUNet_compile", None)
    if not on:
        os.environ |= {"nnUNet_compile": "f"}
    torch._dynamo.reset()
    yield
    os.environ.pop("nnUNet_compile", None)


def first_loss(cls: Any, ready: Prepared, device: str, batch: dict) -> float:
    torch.manual_seed(0)
    trainer = build(cls, ready, device=device)
    trainer.on_train_start()
    trainer.current_epoch = trainer.num_epochs - 1  # every stage is open
    trainer.on_train_epoch_start()
    return float(trainer.train_step(dict(batch))["loss"])


def mask(folder: Path, device: str, image: np.ndarray, properties: dict) -> np.ndarray:
    predictor = nnUNetPredictor(device=torch.device(device), allow_tqdm=False,
                                perform_everything_on_device=device == "cuda")
    predictor.initialize_from_trained_model_folder(str(folder.parent), (0,), "checkpoint_final.pth")
    return predictor.predict_single_npy_array(image, properties, None, None, False)


def facts(name: str, ready: Prepared, device: str) -> dict[str, Any]:
    """Return what was measured; raises whatever a step raises."""
    cls, counters = getattr(trainers, name), torch._dynamo.utils.counters
    drawn = build(cls, ready)
    drawn.on_train_start()
    batch = next(drawn.dataloader_train)
    losses = {}
    for kind, where, on in (("cpu", "cpu", False), ("eager", device, False), ("default", device, True)):
        with compiling(on):
            losses[kind] = first_loss(cls, ready, where, batch)
    counters.clear()
    with compiling(True), pytest.MonkeyPatch.context() as patch:
        threads_for_pools(patch)
        patch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)
        _, expected, resumed = train_and_resume(cls, ready, patch, device=device)
        folder = Path(resumed.output_folder)
        found = torch.load(folder / "checkpoint_final.pth", weights_only=False, map_location="cpu")["network_weights"]
        resumed.perform_actual_validation()
    largest = max(float(w.abs().max()) for w in expected.values())
    apart = max(float((found[key].cpu() - w.cpu()).abs().max()) for key, w in expected.items()) / largest
    case = next((ready.root / "nnUNet_raw" / ready.dataset / "imagesTr").glob("*_0000.nii.gz"))
    image, properties = resumed.plans_manager.image_reader_writer_class().read_images([str(case)])
    masks = [mask(folder, where, image, properties) for where in (device, "cpu")]
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    return {"losses": losses, "continued_apart": apart, "graph_breaks": sum(counters["graph_break"].values()),
            "graphs": counters["stats"]["unique_graphs"], "dice": summary["foreground_mean"]["Dice"],
            "same_voxels": float(np.mean(masks[0] == masks[1]))}


def faults(row: dict[str, Any], device: str) -> list[str]:
    """Return what is outside the tolerances."""
    cpu = row["losses"]["cpu"]
    apart = [f"loss {kind} {loss:.4f}, on the CPU {cpu:.4f}" for kind, loss in row["losses"].items()
             if not math.isclose(loss, cpu, rel_tol=LOSS)]
    if not row["continued_apart"] <= (0 if device == "cpu" else WEIGHTS):
        apart.append(f"continued apart by {row['continued_apart']:.2g}")
    if row["graph_breaks"]:
        apart.append(f"{row['graph_breaks']} graph breaks")
    if device == "cuda" and not row["graphs"]:
        apart.append("nothing was compiled")
    if not row["same_voxels"] >= SAME:
        apart.append(f"only {row['same_voxels']:.1%} of the voxels are predicted as on the CPU")
    if not math.isfinite(row["dice"]):
        apart.append("the validation found no Dice")
    return apart


def check_all(names: list[str], rows: list[dict[str, Any]], device: str, tiny: bool, file: Path) -> None:
    """Check one trainer after the other; append to `rows`, and write `file` after each."""
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    options: dict[str, Any] = {} if tiny else {"donor_options": DEFAULT, "shape": (80, 72, 64)}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        ready = prepare(Path(folder), overrides=OVERRIDES, reader="NibabelIO", **options).activate(patch)
        for name in names:
            start = perf_counter()
            row: dict[str, Any] = {"trainer": name, "error": ""}
            try:
                row |= facts(name, ready, device)
                row["error"] = "; ".join(faults(row, device))
            except Exception as error:  # the next trainer may work
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
            rows.append(row | {"seconds": round(perf_counter() - start, 1)})
            print(f"{name}: {row['error'] or 'passed'}", file=sys.stderr, flush=True)
            content = {"machine": machine, "torch": torch.__version__, "rows": rows}
            file.write_text(json.dumps(content, indent=1) + "\n")


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| trainer | passed | loss CPU / eager / default | continued | graphs | s |", "|---|---|---|---|---|---|"]
    for row in rows:
        losses = " / ".join(f"{loss:.4f}" for loss in row.get("losses", {}).values())
        lines.append(f"| {row['trainer']} | {row['error'] or 'yes'} | {losses} | {row.get('continued_apart', '')} | "
                     f"{row.get('graphs', '')} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a network and images as small as in the tests")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="TRAINER")
    given = parser.parse_args()
    os.environ[VARIABLE] = search_path()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        check_all(given.only, rows, given.device, given.tiny, given.out / "smoke.json")
    finally:
        print(markdown(rows), flush=True)
    sys.exit(any(row["error"] for row in rows))


if __name__ == "__main__":
    main()
