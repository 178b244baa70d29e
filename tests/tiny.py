"""Tiny networks, data sets and models, so that the suite runs on a CPU in seconds.

Images hold bright boxes of known place, so that even a few training steps have something to learn.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
from torch import nn

LABELS = {"background": 0, "organ": 1, "lesion": 2}


def _dimension(module: str, dim: int):
    return getattr(nn, f"{module}{dim}d")


def plain_unet(dim: int = 3, *, channels: int = 1, classes: int = 3, features=(4, 8, 12), strides=None, kernels=None,
               deep_supervision: bool = True, blocks: int = 1) -> nn.Module:
    """A PlainConvUNet of three stages, built as nnU-Net builds it."""
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    n = len(features)
    return PlainConvUNet(
        channels, n, features, _dimension("Conv", dim), kernels or [[3] * dim] * n,
        strides or [[1] * dim] + [[2] * dim] * (n - 1), [blocks] * n, classes, [blocks] * (n - 1), True,
        _dimension("InstanceNorm", dim), {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
        deep_supervision=deep_supervision)


def residual_unet(dim: int = 3, *, channels: int = 1, classes: int = 3, features=(4, 8, 12), strides=None,
                  kernels=None, deep_supervision: bool = True) -> nn.Module:
    """A ResidualEncoderUNet of three stages, built as nnU-Net builds it."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    n = len(features)
    return ResidualEncoderUNet(
        channels, n, features, _dimension("Conv", dim), kernels or [[3] * dim] * n,
        strides or [[1] * dim] + [[2] * dim] * (n - 1), [1] * n, classes, [1] * (n - 1), True,
        _dimension("InstanceNorm", dim), {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
        deep_supervision=deep_supervision)


def primus(*, channels: int = 1, classes: int = 3) -> nn.Module:
    """A Primus (ViT) of two blocks for patches of 16 voxels; it has no deep supervision."""
    from dynamic_network_architectures.architectures.primus import Primus

    return Primus(channels, 24, (8, 8, 8), classes, eva_depth=2, eva_numheads=2, input_shape=(16, 16, 16))


def planned(method, network: nn.Module):
    """Let a method adapt the network, and return its plan with only the plan's parameters trainable."""
    method.adapt(network)
    plan = method.plan(network)
    plan.restrict(network)
    return plan


def trainable(network: nn.Module) -> set[str]:
    return {name for name, p in network.named_parameters() if p.requires_grad}


def plans(dataset_name: str, *, architecture: str = "PlainConvUNet", plans_name: str = "nnUNetPlans",
          spacing_mm=(1.0, 1.0, 1.0), normalization: str = "ZScoreNormalization", channels: int = 1,
          features=(4, 8, 12), patch=(16, 16, 16), transpose=(0, 1, 2)) -> dict:
    """Plans as nnU-Net's planner writes them, for `2d`, `3d_fullres` and a cascade of `3d_lowres`."""
    def configuration(dim: int, name: str) -> dict:
        blocks = "n_conv_per_stage" if architecture == "PlainConvUNet" else "n_blocks_per_stage"
        n = len(features)
        resample = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
        return {
            "data_identifier": f"{plans_name}_{name}", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
            "patch_size": list(patch[-dim:]), "median_image_size_in_voxels": [20.0, 24.0, 18.0][-dim:],
            "spacing": list(spacing_mm[-dim:]), "normalization_schemes": [normalization] * channels,
            "use_mask_for_norm": [False] * channels, "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_seg": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resample,
            "resampling_fn_seg_kwargs": resample | {"is_seg": True, "order": 1},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": resample | {"order": 1},
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.unet.{architecture}",
                "arch_kwargs": {
                    "n_stages": n, "features_per_stage": list(features), "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
                    "kernel_sizes": [[3] * dim] * n, "strides": [[1] * dim] + [[2] * dim] * (n - 1), blocks: [1] * n,
                    "n_conv_per_stage_decoder": [1] * (n - 1), "conv_bias": True,
                    "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}},
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
            "batch_dice": dim == 2}

    intensity = {"max": 1.0, "mean": 0.4, "median": 0.4, "min": 0.0, "percentile_00_5": 0.0, "percentile_99_5": 1.0,
                 "std": 0.3}
    return {
        "dataset_name": dataset_name, "plans_name": plans_name, "original_median_spacing_after_transp": list(spacing_mm),
        "original_median_shape_after_transp": [20, 24, 18], "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose), "transpose_backward": list(np.argsort(transpose).tolist()),
        "configurations": {
            "2d": configuration(2, "2d"), "3d_fullres": configuration(3, "3d_fullres"),
            "3d_lowres": configuration(3, "3d_lowres") | {"next_stage": "3d_cascade_fullres"},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}},
        "experiment_planner_used": "ExperimentPlanner", "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensity for c in range(channels)}}


class Rows(NamedTuple):
    """The rows of a segmentation head."""

    names: tuple[str, ...]
    regions: bool = False


def label_match(donor: Rows, target: Rows):
    from nnunet_dante.transfers.match import LabelMatch

    return LabelMatch(target=target.names, donor=donor.names, target_regions=target.regions, donor_regions=donor.regions)


def dataset_json(*, labels=None, channel_names=None, n_cases: int = 5, regions_class_order=None) -> dict:
    content = {"channel_names": channel_names or {"0": "MRI"}, "labels": labels or LABELS, "numTraining": n_cases,
               "file_ending": ".nii.gz"}
    return content | ({"regions_class_order": regions_class_order} if regions_class_order else {})


def write_raw_dataset(raw: Path, *, dataset_id: int = 901, name: str = "Tiny", n_cases: int = 5, labels=None,
                      channel_names=None, regions_class_order=None, shape=(20, 24, 18), spacing_mm=(1.0, 1.0, 1.0),
                      values=(1, 2), seed: int = 0, offset: float = 0.0, reader: str = "None") -> str:
    """Write `n_cases` labelled cases below nnUNet_raw; returns the data set's name.

    values: the integers drawn into the masks, one nested box each.
    """
    dataset = f"Dataset{dataset_id:03d}_{name}"
    folder = Path(raw) / dataset
    content = dataset_json(labels=labels, channel_names=channel_names, n_cases=n_cases,
                           regions_class_order=regions_class_order)
    content |= {} if reader == "None" else {"overwrite_image_reader_writer": reader}
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    affine = np.diag([*spacing_mm, 1.0])
    for case in range(n_cases):
        mask = np.zeros(shape, np.uint8)
        start = rng.integers(2, 5, 3)
        for depth, value in enumerate(values):
            a, b = start + 2 * depth, start + np.array(shape) // 2 - 2 * depth
            a[np.equal(shape, 1)], b[np.equal(shape, 1)] = 0, 1
            mask[a[0]:b[0], a[1]:b[1], a[2]:b[2]] = value
        for channel in range(len(content["channel_names"])):
            image = (mask * (0.5 + channel) + offset + rng.normal(0, 0.1, shape)).astype(np.float32)
            nibabel.save(nibabel.Nifti1Image(image, affine), folder / "imagesTr" / f"case_{case:03d}_{channel:04d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "labelsTr" / f"case_{case:03d}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(content))
    return dataset


def write_fingerprint(folder: Path, *, n_cases: int, channels: int = 1, shape=(20, 24, 18)) -> None:
    """Write the fingerprint of `write_raw_dataset` into nnUNet_preprocessed/DATASET; nnU-Net's extractor starts processes."""
    statistics = {str(i): {"mean": 9.0, "std": 1.0} for i in range(channels)}
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "dataset_fingerprint.json").write_text(json.dumps({
        "spacings": [[1.0, 1.0, 1.0]] * n_cases, "shapes_after_crop": [list(shape)[::-1]] * n_cases,
        "median_relative_size_after_cropping": 1.0, "foreground_intensity_properties_per_channel": statistics}))


def write_model_folder(results: Path, *, dataset: str = "Dataset900_Donor", configuration: str = "3d_fullres",
                       labels=None, channel_names=None, regions_class_order=None, fold=0, seed: int = 0,
                       checkpoint: str = "checkpoint_final.pth", **plan_options) -> Path:
    """Write a model folder with random weights, with the same keys and types as nnU-Net's save_checkpoint."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    channel_names = channel_names or {"0": "MRI"}
    content = dataset_json(labels=labels, channel_names=channel_names, regions_class_order=regions_class_order)
    donor_plans = plans(dataset, channels=len(channel_names), **plan_options)
    manager = PlansManager(donor_plans)
    config = manager.get_configuration(configuration)
    torch.manual_seed(seed)
    network = get_network_from_plans(
        config.network_arch_class_name, config.network_arch_init_kwargs, config.network_arch_init_kwargs_req_import,
        determine_num_input_channels(manager, config, content),
        manager.get_label_manager(content).num_segmentation_heads, allow_init=True, deep_supervision=True)
    folder = Path(results) / dataset / f"nnUNetTrainer__{donor_plans['plans_name']}__{configuration}"
    (folder / f"fold_{fold}").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(donor_plans))
    (folder / "dataset.json").write_text(json.dumps(content))
    torch.save({
        "network_weights": network.state_dict(), "optimizer_state": {"state": {}, "param_groups": []},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(0.1)], "lrs": [0.01]},
        "_best_ema": np.float64(0.5), "current_epoch": 1,
        "init_args": {"plans": donor_plans, "configuration": configuration, "fold": fold, "dataset_json": content,
                      "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": tuple(range(len(config.patch_size)))},
        folder / f"fold_{fold}" / checkpoint)
    return folder


def add_modules(folder: Path, trainer_name: str, *, seed: int = 1, amount: float = 0.3) -> Path:
    """Turn a model folder into one of `trainer_name` (nnUNetTrainerSpatialAdapter, ...AdaptFormer) whose modules act."""
    from nnunet_dante.models.network import build_network
    from nnunet_dante.peft.added_modules import added_modules

    for file in sorted(Path(folder).glob("fold_*/*.pth")):
        content = torch.load(file, weights_only=False)
        init = content["init_args"]
        network = build_network(init["plans"], init["dataset_json"], init["configuration"], trainer_name=trainer_name)
        network.load_state_dict(content["network_weights"])
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in (p for module in added_modules(network).values() for p in module.parameters()):
                parameter.copy_(amount * torch.randn(parameter.shape, generator=generator))
        torch.save(content | {"network_weights": network.state_dict(), "trainer_name": trainer_name}, file)
    return Path(folder)


def zip_folder(folder: Path, target: Path, prefix: str = "") -> Path:
    """Zip the files of a folder under their names in it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + str(path.relative_to(folder)))
    return target


def slim(folder: Path) -> Path:
    """Keep nothing but weights in a model folder's checkpoint."""
    file = next(folder.glob("fold_*/*.pth"))
    torch.save({"network_weights": torch.load(file, weights_only=False)["network_weights"]}, file)
    return file


def monai_bundle(results: Path, root: Path, *, facts: tuple[str, ...] = ("configuration",)) -> Path:
    """Turn a model folder into what MONAI makes of it."""
    folder = write_model_folder(results)
    content = torch.load(next(folder.glob("fold_*/*.pth")), weights_only=False)
    (root / "models" / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(folder / name, root / "models")
    torch.save({"network_weights": content["network_weights"]}, root / "models" / "fold_0" / "model.pt")
    torch.save({"network_weights": content["network_weights"]}, root / "models" / "fold_0" / "best_model.pt")
    torch.save({"init_args": {key: content["init_args"][key] for key in facts}, "trainer_name": "nnUNetTrainer",
                "inference_allowed_mirroring_axes": (0, 1)}, root / "models" / "nnunet_checkpoint.pth")
    return root
