"""The public names, and that importing them is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nnunet_dante

PUBLIC = {
    "DanteError", "LowRankDelta", "inject", "merge", "remove", "audit_gradients", "parameter_groups", "Schedule",
    "Stage", "TrainingPlan", "Method", "LoRA", "GradualUnfreezing", "DanteGradualUnfreezing", "FineTune",
    "DecoderOnly", "HeadOnly", "FromScratch", "SpatialAdapter", "AdaptFormer",
    "DoRA", "LPFT", "ConvAdapter", "drop_aliases", "BitFit", "NormAffine", "DanteMixin", "open_donor", "transfer", "adapt", "predict", "inspect_path", "export_model",
    "import_model", "__version__"}


def test_the_public_names_are_these_and_all_can_be_imported():
    assert set(nnunet_dante.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(nnunet_dante, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nnunet_dante.nonsense  # noqa: B018


@pytest.mark.parametrize("command", ["import nnunet_dante", "import nnunet_dante.cli"])
def test_importing_is_quick(command):
    heavy = "import sys; sys.exit(any(m in sys.modules for m in ('torch', 'nnunetv2', 'matplotlib', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", f"{command}; {heavy}"]).returncode == 0
