"""plots.py: pictures of the right shape and colours, and the user's matplotlib left as it was."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nnunet_dante.compare.plots import COLOURS, learning_curves, overlays
from nnunet_dante.compare.runs import Run
from nnunet_dante.compare.training_log import TrainingLog


def run(name: str, dice: list[float], start: float | None = 0.1) -> Run:
    log = TrainingLog(dice=np.array(dice)[:, None], seconds=np.ones(len(dice)), start_dice=start)
    return Run(name=name, log=log, trained=None, total=None)


def colours_of(file) -> set[str]:
    from matplotlib.image import imread

    pixels = (imread(file)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(pixels, axis=0)}


def test_each_run_has_its_own_colour(tmp_path):
    learning_curves([run("a", [0.2, 0.5, 0.6]), run("b", [0.1, 0.1, 0.3], start=None)], tmp_path / "curves.png")
    assert {COLOURS[0], COLOURS[1]} <= colours_of(tmp_path / "curves.png")


@pytest.mark.parametrize("dice", [[0.0, 0.0], [float("nan"), 0.5], [0.4]])
def test_curves_that_never_rise_lack_epochs_or_have_one_epoch_are_drawn(tmp_path, dice):
    learning_curves([run("a", dice)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_only_labels_that_a_mask_holds_are_painted_and_outlined(tmp_path):
    image = np.random.default_rng(0).normal(size=(20, 16, 4))
    mask = np.zeros(image.shape, int)
    mask[5:15, 4:12, 1:3] = 2
    overlays(image, {"truth": mask, "empty": np.zeros_like(mask)}, tmp_path / "o.png", slices=[0, 2],
             labels={"background": 0, "absent": 1, "organ": 2}, spacing_mm=(1, 2, 3), captions={"empty": "Dice 0"})
    from matplotlib.image import imread

    outline = (imread(tmp_path / "o.png")[..., :3] * 255).round().astype(int)
    outline = (outline == [0x00, 0x72, 0xB2]).all(-1)  # COLOURS[1]
    rows, columns = np.nonzero(outline[: int(0.9 * len(outline))])  # without the legend
    assert rows.min() > 0.5 * len(outline) - 5  # slice 0 has no label, slice 2 is the second row
    third = outline.shape[1] / 3
    assert third < columns.min() and columns.max() < 2 * third  # the column "truth" alone


def test_an_outline_lies_where_its_label_is(tmp_path):
    image = np.zeros((20, 20, 1))
    image[0] = 1
    mask = np.zeros(image.shape, int)
    mask[12:18, 2:6, 0] = 1  # right, top
    overlays(image, {"m": mask}, tmp_path / "o.png", labels={"background": 0, "organ": 1}, slices=[0],
             spacing_mm=(1, 1, 1))
    from matplotlib.image import imread

    picture = (imread(tmp_path / "o.png")[..., :3] * 255).round().astype(int)
    rows, columns = np.nonzero((picture == [0xE6, 0x9F, 0x00]).all(-1)[: int(0.8 * len(picture))])
    assert columns.mean() > 0.75 * picture.shape[1] and rows.mean() < 0.45 * len(picture)


def test_drawing_leaves_the_backend_alone_and_importing_draws_in_nothing(tmp_path):
    code = ("import os, sys; os.environ.pop('MPLBACKEND', None)\n"
            "import nnunet_dante.compare.plots as plots\n"
            "assert 'matplotlib' not in sys.modules\n"
            "import matplotlib; matplotlib.use('svg')\n"
            "import numpy as np\n"
            f"plots.overlays(np.zeros((4, 4, 1)), {{}}, r'{tmp_path / 'x.png'}', labels={{'a': 1}}, slices=[0], "
            "spacing_mm=(1, 1, 1))\n"
            "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], check=True)
