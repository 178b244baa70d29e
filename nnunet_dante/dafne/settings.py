"""Everything that the shipped functions need to know about a model, as one dict of plain JSON values.

    architecture, patch, spacing_mm, transpose, normalization, resample_data, resample_logits, channels, labels,
    region_order      as nnU-Net uses them, labels and channels by name
    orientation       of the training files, such as "RAS". If as_shown is true, images are taken as Dafne shows them
    mirroring, tile_step, learning    how the client predicts and learns
    origin            plans, dataset.json and facts about the checkpoint, which `nnunet-dante import` needs
"""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from .. import __version__
from ..errors import DafneError
from ..methods.nonlinear import added_by
from ..models.donor import Donor
from ..models.labels import channel_names, has_regions, head_names

FORMAT = 1
_SCHEMES = ("ZScoreNormalization", "CTNormalization", "NoNormalization", "RescaleTo01Normalization",
            "RGBTo01Normalization")
_RESAMPLING = {"resample_data_or_seg_to_shape": False, "resample_torch_fornnunet": None, "no_resampling_hack": None}
_INTENSITIES = ("mean", "std", "percentile_00_5", "percentile_99_5")
# Five epochs are Dafne's own number (Santini 2025), rank and alpha those of this package's LoRA trainer. At its rate of
# 1e-3, 40 steps on ten hippocampi change little; 3e-3 gained twice as much Dice on held-out ones, and lost on neither
# label. (Two starts, 15 held-out cases, one label corrected.)
LEARNING = {"epochs": 5, "min_steps": 40, "max_minutes": 20, "learning_rate": 3e-3, "rank": 8, "alpha": 16.0,
            "protection": 0.0}


def settings_for(donor: Donor, *, orientation: str, as_shown: bool, mirroring: bool, tile_step: float,
                 protection: float = 0.0) -> dict[str, Any]:
    """Return the settings of a donor's configuration; for the arguments see `export_model`.

    Raises:
        DafneError: the model needs something that the shipped functions cannot do, or its plans lack something. The
            message says what.
    """
    try:
        return _settings(donor, orientation=orientation, as_shown=as_shown, mirroring=mirroring, tile_step=tile_step,
                         protection=protection)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DafneError(f"{donor.source} cannot be exported to Dafne: its plans or dataset.json lack or misstate "
                         f"something ({type(error).__name__}: {error}). Use those that nnU-Net wrote.") from error


def _settings(donor: Donor, *, orientation: str, as_shown: bool, mirroring: bool, tile_step: float,
              protection: float) -> dict[str, Any]:
    manager = PlansManager(donor.plans)
    config = manager.get_configuration(donor.configuration)
    _refuse_unknown(donor, manager, config)
    dimension = len(config.patch_size)
    axes = list(donor.mirroring_axes or ())
    return {
        "format": FORMAT, "version": __version__, "dimension": dimension,
        "architecture": _architecture(donor, config), "patch": [int(n) for n in config.patch_size],
        "spacing_mm": [float(s) for s in config.spacing], "transpose": [int(t) for t in manager.transpose_forward],
        "orientation": orientation, "as_shown": as_shown, "normalization": _normalization(donor, manager, config),
        "resample_data": _resampling(config.configuration, "data"),
        "resample_logits": _resampling(config.configuration, "probabilities"),
        "channels": list(channel_names(donor.dataset_json)), **_labels(donor.dataset_json),
        "mirroring": axes if mirroring else [], "tile_step": float(tile_step),
        "learning": LEARNING | {"mirroring": axes, "protection": float(protection)},
        "origin": {
            "plans": _plans(donor, config), "dataset_json": donor.dataset_json, "configuration": donor.configuration,
            "mirroring_axes": None if donor.mirroring_axes is None else axes, "trainer": donor.network_trainer,
            "fold": donor.fold, "donor": donor.provenance()}}


def _refuse_unknown(donor: Donor, manager: PlansManager, config: ConfigurationManager) -> None:
    def refuse(what: str, found: Any, allowed: Any) -> None:
        raise DafneError(f"{donor.source} cannot be exported to Dafne: {what} is {found!r}; possible is {allowed}.")

    if config.previous_stage_name is not None:
        refuse("the configuration", donor.configuration, "one that needs no prediction of a previous stage, "
               "such as 3d_fullres or 3d_lowres")
    name = config.network_arch_class_name.split(".")[-1]
    if name not in ("PlainConvUNet", "ResidualEncoderUNet"):
        refuse("the network", name, "PlainConvUNet or ResidualEncoderUNet")
    if donor.network_trainer != "nnUNetTrainer" and not added_by(donor.network_trainer):
        refuse("the trainer", donor.network_trainer, "one that uses the network of the plans, "
               "nnUNetTrainerSpatialAdapter, or nnUNetTrainerAdaptFormer")
    if (preprocessor := config.configuration.get("preprocessor_name", "DefaultPreprocessor")) != "DefaultPreprocessor":
        refuse("the preprocessor", preprocessor, "DefaultPreprocessor")
    for scheme in config.normalization_schemes:
        if scheme not in _SCHEMES:
            refuse("a normalisation", scheme, ", ".join(_SCHEMES))
    for axis in donor.mirroring_axes or ():
        if axis >= len(config.patch_size):
            refuse("a mirroring axis", axis, f"0 to {len(config.patch_size) - 1}")
    for part in ("data", "probabilities"):
        if (function := config.configuration[f"resampling_fn_{part}"]) not in _RESAMPLING:
            refuse(f"the resampling of {part}", function, ", ".join(_RESAMPLING))


def _architecture(donor: Donor, config: ConfigurationManager) -> dict[str, Any]:
    given, dimension = config.network_arch_init_kwargs, len(config.patch_size)
    residual = config.network_arch_class_name.endswith("ResidualEncoderUNet")
    stages = int(given["n_stages"])

    def each(key: str, count: int = stages) -> list:
        value = given.get(key)
        return list(value) if isinstance(value, (list, tuple)) else [value] * count

    def spatial(key: str) -> list[list[int]]:
        return [[int(n) for n in (v if isinstance(v, (list, tuple)) else [v] * dimension)] for v in each(key)]

    def name(key: str) -> str | None:
        return given[key].rpartition(".")[2] if given.get(key) else None

    features = [int(f) for f in each("features_per_stage")]
    return {
        "residual": residual, "dimension": dimension, "channels": len(channel_names(donor.dataset_json)),
        "heads": len(head_names(donor.dataset_json)), "features": features, "kernels": spatial("kernel_sizes"),
        "strides": spatial("strides"), "blocks": each("n_blocks_per_stage" if residual else "n_conv_per_stage"),
        "decoder_blocks": each("n_conv_per_stage_decoder", stages - 1), "bias": bool(given.get("conv_bias", False)),
        "norm": name("norm_op"), "norm_kwargs": given.get("norm_op_kwargs") or {}, "activation": name("nonlin"),
        "activation_kwargs": given.get("nonlin_kwargs") or {}, "activation_first": bool(given.get("nonlin_first")),
        "bottlenecks": each("bottleneck_channels") if "Bottleneck" in str(given.get("block")) else [None] * stages,
        "stem": int(given.get("stem_channels") or features[0]), **added_by(donor.network_trainer)}


def _normalization(donor: Donor, manager: PlansManager, config: ConfigurationManager) -> list[dict[str, Any]]:
    found = []
    for number, (scheme, masked) in enumerate(zip(config.normalization_schemes, config.use_mask_for_norm)):
        numbers = None
        if scheme == "CTNormalization":
            given = manager.foreground_intensity_properties_per_channel[str(number)]
            numbers = {key: float(given[key]) for key in _INTENSITIES}
        found.append({"scheme": scheme, "masked": bool(masked), "intensities": numbers})
    return found


def _resampling(config: dict[str, Any], part: str) -> dict[str, Any]:
    function = config[f"resampling_fn_{part}"]
    return {"function": function, "kwargs": config.get(f"resampling_fn_{part}_kwargs") or {},
            "force_separate_z": _RESAMPLING[function]}


def _labels(dataset_json: dict[str, Any]) -> dict[str, Any]:
    regions = has_regions(dataset_json)
    names = [name for name in head_names(dataset_json) if regions or name != "background"]
    labels = []
    for name in names:
        value = dataset_json["labels"][name]
        shown = name.replace(",", ".")  # Dafne splits lists of names at commas
        labels.append({"name": shown, "values": [int(v) for v in (value if isinstance(value, list) else [value])]})
    if len({label["name"] for label in labels}) < len(labels):
        raise DafneError(f"Two labels of {names} have the same name in Dafne, which allows no commas; rename one.")
    order = [int(v) for v in dataset_json["regions_class_order"]] if regions else []
    return {"labels": labels, "region_order": order}


def _plans(donor: Donor, config: ConfigurationManager) -> dict[str, Any]:
    """Return the plans with this configuration alone: inherited values written out, links to other stages removed."""
    kept = {k: v for k, v in config.configuration.items() if k not in ("inherits_from", "next_stage")}
    plans = {k: v for k, v in donor.plans.items() if k not in ("dante", "dafne", "continue_training")}
    return plans | {"configurations": {donor.configuration: kept}}
