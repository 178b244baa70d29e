from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from nnunet_dante.benchmark.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a part of a process")
def test_the_peak_counts_what_was_taken_since_the_start_also_after_it_is_free_again():
    first = PeakMemory(torch.device("cpu"))
    held = np.ones(64 << 20, np.uint8)
    del held
    assert first.peak_mib() > 60
    assert PeakMemory(torch.device("cpu")).peak_mib() < 60, "what an earlier part took does not count"
