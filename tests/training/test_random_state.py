import random

import numpy as np
import torch

from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training.random_state import random_state, restore_random_state


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()]


def test_the_numbers_after_restoring_are_the_numbers_after_saving(tmp_path):
    draw()
    torch.save({"random_state": random_state()}, tmp_path / "state.pth")
    expected = [draw(), draw()]
    draw()
    restore_random_state(load_checkpoint_safely(tmp_path / "state.pth")["random_state"])
    assert [draw(), draw()] == expected
    assert random_state()["numpy"][0] == "MT19937"
