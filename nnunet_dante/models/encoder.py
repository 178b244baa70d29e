"""Checkpoints that hold an encoder and no decoder that segments, such as those of self-supervised trainings with nnssl.

nnssl writes "nnssl_adaptation_plan" into its checkpoints: architecture, geometry of the pretraining, and where encoder
and stem lie among the weights. A decoder in these files reconstructs images and is left out, as nnssl's own fine-tuning
does. Source: github.com/MIC-DKFZ/nnssl, adaptation_planning/adaptation_plan.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import msgspec
from torch import Tensor

from ..errors import DonorError
from ..types import DatasetJson, Plans, StateDict

ENCODER = "encoder."
ADAPTATION_PLAN = "nnssl_adaptation_plan"
_NETWORKS = {name: f"dynamic_network_architectures.architectures.unet.{name}"
             for name in ("PlainConvUNet", "ResidualEncoderUNet")}
_MAX_CHANNELS = 100
_IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
_RESENC_L = {
    "n_stages": 6, "features_per_stage": [32, 64, 128, 256, 320, 320], "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6, "strides": [[1, 1, 1]] + [[2, 2, 2]] * 5, "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5, "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}}


class _Architecture(msgspec.Struct):
    arch_class_name: str
    arch_kwargs: dict[str, Any] | None = None


class AdaptationPlan(msgspec.Struct):
    """What nnssl says of its encoder. Unknown fields pass."""

    architecture_plans: _Architecture
    key_to_encoder: str
    pretrain_plan: dict[str, Any] = {}
    pretrain_num_input_channels: int = 1
    recommended_downstream_patchsize: list[int] | None = None


def encoder_weights(weights: Mapping[str, Tensor], content: Mapping[str, Any], name: str) -> StateDict | None:
    """Return the weights of the encoder below "encoder.", or None where a checkpoint holds a whole network.

    Args:
        weights: of the checkpoint.
        content: of the checkpoint, to see whether nnssl wrote it.
        name: of the file, for messages.

    Raises:
        DonorError: it is an encoder of another kind than that of a U-Net.
    """
    prefix = ENCODER
    if (plan := adaptation_plan(content, name)) is not None:
        if not f".{plan.key_to_encoder}".endswith(".encoder.stages"):
            raise DonorError(f"{name}: the encoder of its {plan.architecture_plans.arch_class_name} lies at "
                             f"{plan.key_to_encoder!r}. Supported are encoders of U-Nets, which lie at "
                             "'encoder.stages' (ResEncL, ResidualEncoderUNet, PlainConvUNet).")
        prefix = plan.key_to_encoder.removesuffix("stages")
    elif not all(key.startswith(ENCODER) for key in weights):
        return None
    found = {ENCODER + key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if not found:
        raise DonorError(f"{name} says that its encoder lies at {prefix!r}, but holds no weights there; it begins with "
                         f"{', '.join(list(weights)[:3])}.")
    return found


def adaptation_plan(content: Mapping[str, Any], name: str) -> AdaptationPlan | None:
    """Return what nnssl wrote into a checkpoint, or None.

    Raises:
        DonorError: it is damaged.
    """
    if ADAPTATION_PLAN not in content:
        return None
    try:
        return msgspec.convert(content[ADAPTATION_PLAN], AdaptationPlan)
    except msgspec.ValidationError as error:
        raise DonorError(f"The {ADAPTATION_PLAN!r} of {name} is damaged: {error}. Get the checkpoint again.") from error


def nnssl_plans(plan: AdaptationPlan, name: str) -> tuple[Plans, bool]:
    """Return plans of nnU-Net for an encoder of nnssl, and whether the spacing in them is that of the pretraining.

    Raises:
        DonorError: the architecture is unknown.
    """
    kind = plan.architecture_plans.arch_class_name
    arguments = plan.architecture_plans.arch_kwargs
    if kind in ("ResEncL", "NoSkipResEncL"):
        kind, arguments = "ResidualEncoderUNet", arguments or _RESENC_L
    if kind not in _NETWORKS or not arguments:
        raise DonorError(f"{name} is an encoder of the architecture {kind!r}; supported are ResEncL, NoSkipResEncL, "
                         "and ResidualEncoderUNet and PlainConvUNet with their arguments (arch_kwargs).")
    configurations = plan.pretrain_plan.get("configurations") or {}
    said = next((c for c in configurations.values() if isinstance(c, dict)), configurations) if isinstance(
        configurations, dict) else {}
    channels = plan.pretrain_num_input_channels
    schemes = said.get("normalization_schemes")
    spacing: Any = said.get("spacing")
    patch: Any = plan.recommended_downstream_patchsize or said.get("patch_size")
    known = all(isinstance(given, (list, tuple)) and len(given) == 3 for given in (spacing, patch))
    return encoder_plans(
        {"network_class_name": _NETWORKS[kind], "arch_kwargs": dict(arguments), "_kw_requires_import": _IMPORTED},
        dataset_name=str(plan.pretrain_plan.get("dataset_name", "unknown")), spacing=spacing if known else [1.0] * 3,
        patch_size=patch if known else [64] * 3, channels=channels,
        planner="nnUNetPlannerResEncL" if kind == "ResidualEncoderUNet" else "ExperimentPlanner",
        schemes=schemes if isinstance(schemes, list) and len(schemes) == channels else None,
        transpose=order if isinstance(order := plan.pretrain_plan.get("transpose_forward"), list) else None), known


def encoder_plans(architecture: dict[str, Any], *, spacing: Sequence[float], patch_size: Sequence[int], channels: int,
                  planner: str, schemes: list[str] | None = None, transpose: Sequence[int] | None = None,
                  dataset_name: str = "unknown") -> Plans:
    """Return plans of nnU-Net with one configuration, 2d or 3d_fullres, for an encoder that has none.

    Args:
        architecture: as in plans of nnU-Net.
        spacing: mm, in the order of `transpose`.
        patch_size: voxels.
        channels: that the encoder reads.
        planner: name of the planner of nnU-Net whose memory target counts.
        schemes: normalisation of each channel; default: z-scores.
        transpose: order of the axes; default: as stored.
        dataset_name: of the pretraining.
    """
    order = list(transpose or ())
    order = order if order in map(list, permutations(range(3))) else [0, 1, 2]
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "encoder", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": list(patch_size), "median_image_size_in_voxels": list(patch_size),
        "spacing": list(spacing), "normalization_schemes": schemes or ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels, "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1}, "architecture": architecture,
        "batch_dice": False}
    return {
        "dataset_name": dataset_name, "plans_name": "encoder", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": order, "transpose_backward": [order.index(axis) for axis in range(3)],
        "experiment_planner_used": planner, "label_manager": "LabelManager",
        "configurations": {"2d" if len(spacing) == 2 else "3d_fullres": configuration}}


def image_kernel(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the weight of the first convolution, shape (out, in, *kernel), which reads the image.

    Raises:
        DonorError: there is none in 2D or 3D.
    """
    for tensor in weights.values():
        if tensor.ndim in (4, 5):
            return tensor
    raise DonorError(f"{name} holds no convolution in 2D or 3D, so it is no encoder of a U-Net.")


def encoder_dataset(channels: int) -> DatasetJson:
    """Return a dataset.json for an encoder: its channels have no names, and no label of it is known.

    Raises:
        DonorError: the number of channels is absurd.
    """
    if not 1 <= channels <= _MAX_CHANNELS:
        raise DonorError(f"The encoder reads {channels} channels; possible are 1 to {_MAX_CHANNELS}.")
    return {"channel_names": {str(i): "unknown" for i in range(channels)}, "labels": {"background": 0, "unknown": 1},
            "file_ending": ".nii.gz", "numTraining": 0}
