"""Fine-tune pretrained nnU-Net v2 networks on few labelled cases, and share the result.

The names below are the public API. Each is imported when it is first used, so that `import nnunet_dante` is quick.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "DanteError": "errors",
    "LowRankDelta": "peft.low_rank",
    "inject": "peft.inject",
    "merge": "peft.inject",
    "remove": "peft.inject",
    "audit_gradients": "peft.audit",
    "drop_aliases": "adapters.hf_peft",
    "parameter_groups": "methods.groups",
    "Schedule": "methods.schedule",
    "Stage": "methods.schedule",
    "TrainingPlan": "methods",
    "Method": "methods",
    "LoRA": "methods",
    "DoRA": "methods",
    "LPFT": "methods",
    "ConvAdapter": "methods",
    "BitFit": "methods",
    "NormAffine": "methods",
    "SpatialAdapter": "methods",
    "AdaptFormer": "methods",
    "GradualUnfreezing": "methods",
    "DanteGradualUnfreezing": "methods",
    "FineTune": "methods",
    "DecoderOnly": "methods",
    "HeadOnly": "methods",
    "FromScratch": "methods",
    "DanteMixin": "training.trainer",
    "open_donor": "models.donor",
    "transfer": "transfers.transfer",
    "adapt": "adaptation.run",
    "predict": "adaptation.predict",
    "inspect_path": "command.inspect",
    "export_model": "dafne.export",
    "import_model": "dafne.importer",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
