"""Time of an exported model's apply, relative to nnU-Net's own predictor on the same image, in one process.

    python benchmarks/dafne_apply_time.py MODEL_FOLDER IMAGE.nii.gz [--rounds 7] [--out benchmarks/results]

Both take turns, with the same number of threads, mirroring off and tile step 0.5; the first round warms up and does not
count. The ratio is the median over rounds of (apply / nnU-Net) in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import nibabel
import numpy as np
import torch

# nnU-Net's predictor takes its number of threads from here
os.environ["nnUNet_def_n_proc"] = str(torch.get_num_threads())  # noqa: SIM112

from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor  # noqa: E402

from nnunet_dante.dafne.settings import settings_for  # noqa: E402
from nnunet_dante.dafne.sources import function_of, sources  # noqa: E402
from nnunet_dante.models.checkpoint import unique_tensors  # noqa: E402
from nnunet_dante.models.donor import open_donor  # noqa: E402


def shipped(folder: Path, orientation: str) -> SimpleNamespace:
    donor = open_donor(folder)
    settings = settings_for(donor, orientation=orientation, as_shown=False, mirroring=False, tile_step=0.5)
    functions = {name: function_of(text, name) for name, text in sources(settings).items()}
    model = SimpleNamespace(model=functions["init_model_function"]())
    functions["weights_to_model_function"](model, unique_tensors(donor.weights))
    return SimpleNamespace(apply=lambda data: functions["apply_model_function"](model, data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    image = nibabel.load(options.image)
    model = shipped(options.model, "".join(nibabel.aff2axcodes(image.affine)))
    stock = nnUNetPredictor(use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"),
                            allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(options.model), (open_donor(options.model).fold,))
    view = image.as_reoriented(nibabel.orientations.ornt_transform(
        nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("PLS")))
    voxels, spacing = image.get_fdata(dtype=np.float32), [float(s) for s in image.header.get_zooms()]
    times: dict[str, list[float]] = {"apply": [], "nnunet": []}
    for number in range(options.rounds + 1):
        factor = np.float32(1 + 0.01 * number)  # or apply would remember its last result
        begin = perf_counter()
        model.apply({"image": view.get_fdata(dtype=np.float32) * factor, "affine": view.affine})
        middle = perf_counter()
        stock.predict_single_npy_array((voxels * factor).transpose(2, 1, 0)[None], {"spacing": spacing[::-1]}, None,
                                       None, False)
        times["apply"].append(middle - begin)
        times["nnunet"].append(perf_counter() - middle)
    ratio = statistics.median(a / b for a, b in list(zip(*times.values()))[1:])
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"apply {medians['apply']:.2f} s, nnU-Net {medians['nnunet']:.2f} s, ratio {ratio:.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "dafne_apply_time.json").write_text(json.dumps(
        {"date": date.today().isoformat(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
         "torch": torch.__version__, "shape": list(voxels.shape), "ratio": round(ratio, 3),
         "seconds": {k: [round(t, 3) for t in v[1:]] for k, v in times.items()}}, indent=1))


if __name__ == "__main__":
    main()
