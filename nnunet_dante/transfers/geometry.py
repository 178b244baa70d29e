"""Plans at the target's own spacing: nnU-Net's planner decides, for the network that the donor has.

The planner of the donor's plans chooses spacing, patch and batch size for the target. Where it asks how much memory
the network of its own choice needs, it is told what the donor's needs, at the patch that the donor's strides divide.
"""

from __future__ import annotations

import contextlib
import io
import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..datasets.dataset import Target
from ..errors import DonorError, TransferError
from ..models.donor import Donor, fit_encoder
from ..models.encoder import encoder_plans, image_kernel
from ..models.memory import conv_voxels
from ..models.network import build_network
from ..types import Plans

_TAKEN = ("batch_size", "patch_size", "spacing", "median_image_size_in_voxels")
_PLANNERS = ("ExperimentPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL", "nnUNetPlannerResEncXL")
_NORMALISATION = ("normalization_schemes", "use_mask_for_norm")


@dataclass(frozen=True, kw_only=True)
class DonorGeometry:
    """What the donor was trained at, where the target keeps its own geometry; axes in the donor's transposed order.

    spacing_mm, patch_size: empty where they are unknown. kernel: voxels of the first convolution. planner: nnU-Net's
    planner that chose the target's geometry.
    """

    spacing_mm: tuple[float, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    kernel: tuple[int, ...]
    planner: str


def own_geometry(plans: Plans, configuration: str, target: Target, *, normalisation: bool = True,
                 trainer_name: str = "nnUNetTrainer", trust: bool = False) -> tuple[Plans, DonorGeometry]:
    """Return plans with the target's own spacing, patch and batch size for the network that they describe.

    The donor's geometry is returned, too, for the report.

    Args:
        plans: for the target already, with the donor's geometry; not changed.
        configuration: the one to plan; the others of the plans are left out.
        target: with its fingerprint in nnUNet_preprocessed.
        normalisation: whether the target's own normalisation is taken, too.
        trainer_name, trust: as in `build_network`.

    Raises:
        TransferError: the network cannot be used at another spacing, or nnU-Net cannot plan the target.
    """
    config = PlansManager(plans).get_configuration(configuration)
    if config.previous_stage_name or config.next_stage_names:
        raise TransferError(f"--geometry target: {configuration!r} is a stage of a cascade, whose spacing depends on "
                            "the other stage. Use --geometry donor, or a donor of another configuration.")
    with torch.device("cpu" if trust else "meta"):  # own architectures may need real numbers to be built
        network: Any = build_network(plans, target.dataset_json, configuration, trainer_name=trainer_name, trust=trust)
    step = patch_steps(network, configuration)
    planned = plan(target, plans, len(step), lambda patch, *_: conv_voxels(network, fitting_patch(patch, step)))
    planned["patch_size"] = fitting_patch(planned["patch_size"], step)
    changed = deepcopy(plans)
    entry = deepcopy(config.configuration)  # with what it inherits
    entry.pop("inherits_from", None)
    entry |= {key: planned[key] for key in (*_TAKEN, *(_NORMALISATION if normalisation else ()))}
    # Data of the same configuration at the donor's spacing may be there, under the name without the ending.
    entry["data_identifier"] = f"{plans['plans_name']}_{configuration}_target"
    changed["configurations"] = {configuration: entry}
    return changed, DonorGeometry(
        spacing_mm=tuple(map(float, config.spacing)), patch_size=tuple(map(int, config.patch_size)),
        batch_size=int(config.batch_size), planner=_planner(plans.get("experiment_planner_used")).__name__,
        kernel=tuple(int(n) for n in np.broadcast_to(network.encoder.kernel_sizes[0], len(step))))


def plan(target: Target, plans: Plans, dimension: int, needed: Any) -> dict[str, Any]:
    """Return the configuration that nnU-Net's planner makes for the target, in the axes of the plans.

    Args:
        target: with its fingerprint in nnUNet_preprocessed.
        plans: "experiment_planner_used" and "transpose_forward" of these count. The order of the axes is the donor's,
            because its weights know the body in that order; nnU-Net's for the target where it is not given.
        dimension: 2 or 3, of the network.
        needed: replaces nnU-Net's `static_estimate_VRAM_usage`, which returns the voxels of all feature maps.
    """
    planner_class = _planner(plans.get("experiment_planner_used"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            planner = planner_class(target.name)
            planner.static_estimate_VRAM_usage = needed
            order = [int(axis) for axis in plans.get("transpose_forward") or planner.determine_transpose()[0]]
            spacing = np.asarray(planner.determine_fullres_target_spacing(), float)
            found = planner.dataset_fingerprint
            shapes = [compute_new_shape(shape, old, spacing) for shape, old in zip(
                found["shapes_after_crop"], found["spacings"])]
            median = np.median(shapes, 0)[order]
            planned: dict[str, Any] = planner.get_plans_for_configuration(
                spacing[order][-dimension:], median[-dimension:], "", float(np.prod(median)) * len(target.cases), {})
    except TransferError:
        raise
    except Exception as error:  # whatever nnU-Net's planner stumbles over
        raise TransferError(f"--geometry target: nnU-Net's {planner_class.__name__} cannot plan {target.name} "
                            f"({type(error).__name__}: {error}). Use --geometry donor.") from error
    return planned | {"transpose_forward": order, "spacing": [float(mm) for mm in planned["spacing"]],
                      "batch_size": int(planned["batch_size"]),
                      "median_image_size_in_voxels": [float(n) for n in median[-dimension:]]}


def planned_encoder(donor: Donor, target: Target) -> Donor:
    """Return a donor that is an encoder of unknown architecture, with the plans of nnU-Net's that have this encoder.

    The target is planned by each of nnU-Net's planners; the first network whose encoder has the same layers and shapes
    is taken. Its strides are the planner's, as weights say nothing of them.

    Args:
        donor: an encoder without plans.
        target: with its fingerprint in nnUNet_preprocessed.

    Raises:
        TransferError: no planner's network has this encoder.
    """
    kernel = image_kernel(donor.weights, donor.checkpoint_name)
    problems = []
    for name in _PLANNERS:
        found = plan(target, {"experiment_planner_used": name}, kernel.ndim - 2, _stock_need)
        plans = encoder_plans(
            json.loads(json.dumps(found["architecture"])), spacing=found["spacing"], channels=kernel.shape[1],
            patch_size=[int(n) for n in found["patch_size"]], planner=name, transpose=found["transpose_forward"])
        try:
            return fit_encoder(donor, plans)
        except DonorError as error:
            problems.append(str(error))
    raise TransferError(f"Nothing says which network the encoder in {donor.checkpoint_name} belongs to, and none that "
                        f"{', '.join(_PLANNERS)} plan for {target.name} has it. Put the plans.json and dataset.json of "
                        f"a model with this encoder beside the checkpoint. The first plan: {problems[0]}")


def _stock_need(patch: Any, channels: int, classes: int, name: str, arguments: Any, imported: Any) -> int:
    """nnU-Net's own estimate; that sets torch's threads to nnUNet_n_proc_DA, which fails where that is 0."""
    with torch.device("meta"):
        network: Any = get_network_from_plans(name, arguments, imported, channels, classes, allow_init=False)
    return int(network.compute_conv_feature_map_size(patch))


def patch_steps(network: Any, configuration: str) -> tuple[int, ...]:
    """Return what each side of a patch must be a multiple of: the product of the encoder's strides along each axis.

    Raises:
        TransferError: the network's weights belong to one patch size, or its strides are unknown.
    """
    strides = getattr(getattr(network, "encoder", None), "strides", None)
    if strides is None or not hasattr(network, "compute_conv_feature_map_size"):
        raise TransferError(f"--geometry target: the weights of a {type(network).__name__} ({configuration}) belong to "
                            "its patch size, or its strides are not known. Use --geometry donor; supported are "
                            "PlainConvUNet and ResidualEncoderUNet.")
    return tuple(int(n) for n in np.prod(np.asarray(strides), 0))


def fitting_patch(patch: Any, step: tuple[int, ...]) -> list[int]:
    """Return the smallest patch that is not smaller than `patch`, and whose sides are multiples of `step`.

    At least two voxels are left at the lowest resolution: norms need more than one.
    """
    if min(patch) < 1:
        raise TransferError("--geometry target: the donor's network needs more memory than nnU-Net's planner allows, "
                            "at any patch size. Use --geometry donor.")
    fitting = [-(-int(size) // n) * n for size, n in zip(patch, step)]
    if all(size == n for size, n in zip(fitting, step)):
        fitting = [size * 2 for size in fitting]
    return fitting


def _planner(name: object) -> type[ExperimentPlanner]:
    """Return the planner of the donor's plans, whose memory target counts; nnU-Net's default where it is unknown."""
    folder = Path(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(str(folder), str(name), "nnunetv2.experiment_planning")
    known = isinstance(found, type) and issubclass(found, ExperimentPlanner)
    return found if known else ExperimentPlanner
