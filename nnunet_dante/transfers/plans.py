"""Make plans for the target: with the donor's network and preprocessing, and the target's name, reader and channels."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from ..datasets.fingerprint import INTENSITY
from ..errors import ConfigurationError
from ..models.settings import read_dante_block, with_overrides
from ..types import Plans
from .geometry import DonorGeometry
from .match import NameMatch

_OLD_INTENSITY = "foreground_intensity_properties_by_modality"
# pretrain_info (nnU-Net after 2.8.1) names a file of the donor's machine, from which the donor itself had started.
_NOT_TAKEN = ("dante", "continue_training", "pretrain_info", _OLD_INTENSITY)


@dataclass(frozen=True, kw_only=True)
class ChannelPlan:
    """How a channel is normalised.

    scheme: name of nnU-Net's normalisation class. use_mask: whether it looks at voxels of the nonzero mask alone.
    scheme_from, statistics_from: "donor" or "target".
    """

    name: str
    scheme: str
    use_mask: bool
    scheme_from: str
    statistics_from: str


@dataclass(frozen=True, kw_only=True)
class PlansReport:
    """How the donor's configuration fits the target's images. All axes are in the transposed order of the plans.

    plans_spacing_mm: spacing to which images are resampled, which is the donor's or the target's own.
    target_spacing_mm: median spacing of the target's images.
    spacing_ratio: target_spacing_mm / plans_spacing_mm. Above 1, images are upsampled and look smoother than those that
        the donor saw; below 1, detail is lost.
    patch_size: in voxels.
    median_shape: median shape of the target's images after resampling, in voxels.
    donor: the geometry of the donor, if these plans have the target's own.
    """

    channels: tuple[ChannelPlan, ...]
    plans_spacing_mm: tuple[float, ...]
    target_spacing_mm: tuple[float, ...]
    spacing_ratio: tuple[float, ...]
    patch_size: tuple[int, ...]
    median_shape: tuple[int, ...]
    donor: DonorGeometry | None = None


def retarget_plans(donor_plans: Plans, *, configuration: str, plans_name: str, dataset_name: str, reader: str,
                   channels: NameMatch, fingerprint: dict[str, Any], intensity: str = "donor",
                   batch_size: int | None = None) -> tuple[Plans, PlansReport]:
    """Return plans for the target, and a report of how they fit its images. `donor_plans` are not changed.

    Spacing, patch size, topology, transpose and resampling stay the donor's; so do normalisation and intensity
    statistics of channels that the donor knows by name. New channels get the normalisation that nnU-Net chooses for
    their name, and the target's statistics. Of the configurations, only `configuration`, those from which it inherits,
    and the other stages of its cascade are kept.

    Args:
        donor_plans: content of the donor's plans.json.
        configuration: the donor's configuration.
        plans_name, dataset_name, reader: go into the new plans.
        channels: the channels of target and donor.
        fingerprint: nnU-Net's fingerprint of the target.
        intensity: "target" uses the target's intensity statistics for all channels.
        batch_size: replaces the donor's.

    Raises:
        ConfigurationError: `intensity` or `configuration` is unknown, or the plans lack a configuration.
    """
    if intensity not in ("donor", "target"):
        raise ConfigurationError(f"intensity is {intensity!r}; choose 'donor' or 'target'.")
    plans = {k: deepcopy(v) for k, v in donor_plans.items() if k not in _NOT_TAKEN}
    names = _chain(donor_plans["configurations"], configuration)
    plans["configurations"] = {name: deepcopy(donor_plans["configurations"][name]) for name in names}
    order = [int(axis) for axis in plans["transpose_forward"]]
    spacing = np.median(np.asarray(fingerprint["spacings"], float), 0)[order]
    plans |= {
        "dataset_name": dataset_name, "plans_name": plans_name, "image_reader_writer": reader,
        "original_median_spacing_after_transp": [float(s) for s in spacing],
        "original_median_shape_after_transp": [
            round(float(n)) for n in np.median(np.asarray(fingerprint["shapes_after_crop"], float), 0)[order]],
        INTENSITY: _intensities(donor_plans, channels, fingerprint, intensity)}
    _retarget_configurations(plans, names, channels, fingerprint)
    if batch_size is not None:
        plans["configurations"][configuration]["batch_size"] = int(batch_size)
    return plans, describe_plans(plans, configuration, channels,
                                 has_statistics=_intensity_source(donor_plans, intensity))


def _chain(configurations: dict[str, Any], wanted: str) -> list[str]:
    """Return `wanted`, the other stages of its cascade, and all from which these inherit, in the order of the plans."""
    if wanted not in configurations:
        raise ConfigurationError(f"Configuration {wanted!r} is not in the plans; they hold {sorted(configurations)}.")
    found, waiting = set(), [wanted]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in configurations:
            raise ConfigurationError(f"The plans name the configuration {name!r}, but do not hold it; they hold "
                                     f"{sorted(configurations)}. Use the complete plans.json of the model.")
        found.add(name)
        following = configurations[name].get("next_stage") or []
        waiting += [n for n in (configurations[name].get("inherits_from"), configurations[name].get("previous_stage"),
                                *([following] if isinstance(following, str) else following)) if n]
    return [name for name in configurations if name in found]


def _resolved(plans: Plans, configuration: str, key: str) -> Any:
    """Return the value of `key` of a configuration; it may be inherited."""
    own = plans["configurations"][configuration]
    return own[key] if key in own else _resolved(plans, own["inherits_from"], key)


def _intensity_source(donor_plans: Plans, intensity: str) -> bool:
    return intensity == "donor" and bool(donor_plans.get(INTENSITY) or donor_plans.get(_OLD_INTENSITY))


def _intensities(donor_plans: Plans, channels: NameMatch, fingerprint: dict[str, Any],
                 intensity: str) -> dict[str, Any]:
    donors = {str(k): v for k, v in (donor_plans.get(INTENSITY) or donor_plans.get(_OLD_INTENSITY) or {}).items()}
    own = {str(k): v for k, v in fingerprint[INTENSITY].items()}
    keep = _intensity_source(donor_plans, intensity)
    return {str(i): deepcopy(donors[str(j)] if keep and j is not None else own[str(i)])
            for i, j in enumerate(channels.source)}


def _retarget_configurations(plans: Plans, names: list[str], channels: NameMatch,
                             fingerprint: dict[str, Any]) -> None:
    identifiers: dict[str, str] = {}
    cropped = fingerprint.get("median_relative_size_after_cropping", 1.0) < 0.75  # as nnU-Net decides on the mask
    source = channels.source
    schemes = [get_normalization_scheme(name) for name in channels.target]
    masks = [cropped and bool(s.leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true) for s in schemes]
    for name in names:
        config = plans["configurations"][name]
        if "data_identifier" in config:  # configurations that shared preprocessed data still share it
            config["data_identifier"] = identifiers.setdefault(config["data_identifier"],
                                                               f"{plans['plans_name']}_{name}")
        if (old := config.get("normalization_schemes")) is not None:
            config["normalization_schemes"] = [s.__name__ if i is None else old[i] for i, s in zip(source, schemes)]
        if (old := config.get("use_mask_for_norm")) is not None:
            config["use_mask_for_norm"] = [m if i is None else bool(old[i]) for i, m in zip(source, masks)]
        if "spacing" in config:
            config["median_image_size_in_voxels"] = _median_shape(plans, config["spacing"], fingerprint)


def _median_shape(plans: Plans, spacing: Sequence[float], fingerprint: dict[str, Any]) -> list[float]:
    order = [int(axis) for axis in plans["transpose_forward"]][-len(spacing):]
    shapes = np.asarray(fingerprint["shapes_after_crop"], float)[:, order]
    spacings = np.asarray(fingerprint["spacings"], float)[:, order]
    return [float(n) for n in np.median(np.round(shapes * spacings / np.asarray(spacing, float)), 0)]


def describe_plans(plans: Plans, configuration: str, channels: NameMatch, *, has_statistics: bool,
                   own_schemes: bool = False, donor: DonorGeometry | None = None) -> PlansReport:
    """Return what plans mean for the target.

    Args:
        plans, configuration: for the target.
        channels: which channels the donor knows.
        has_statistics: known channels have the donor's intensity statistics.
        own_schemes: all channels have the target's normalisation schemes.
        donor: what the donor was trained at, where the plans have another geometry.
    """
    def get(key: str) -> Any:
        return _resolved(plans, configuration, key)

    spacing = np.asarray(get("spacing"), float)
    target = np.asarray(plans["original_median_spacing_after_transp"], float)[-len(spacing):]
    return PlansReport(
        channels=tuple(ChannelPlan(name=name, scheme=scheme, use_mask=mask,
                                   scheme_from="target" if i is None or own_schemes else "donor",
                                   statistics_from="donor" if i is not None and has_statistics else "target")
                       for name, i, scheme, mask in zip(
                           channels.target, channels.source, get("normalization_schemes"), get("use_mask_for_norm"))),
        plans_spacing_mm=tuple(spacing.tolist()), target_spacing_mm=tuple(target.tolist()),
        spacing_ratio=tuple((target / spacing).tolist()), patch_size=tuple(int(n) for n in get("patch_size")),
        median_shape=tuple(int(n) for n in get("median_image_size_in_voxels")), donor=donor)


def merge_plans(existing: Plans, new: Plans, *, configuration: str) -> Plans:
    """Return `new` together with the other configurations that earlier transfers wrote into `existing`.

    Raises:
        ConfigurationError: `existing` was not written by a transfer, or the two differ in something that they share.
    """
    if not (block := read_dante_block(existing))["start_weights"]:
        raise ConfigurationError(f"Plans {existing.get('plans_name')!r} exist and were not written by `nnunet-dante "
                                 "transfer`, so they are not changed. Choose another name with -p.")
    others = {name: entry for name, entry in block["start_weights"].items() if name != configuration}
    if not others:
        return new
    differing = [key for key in sorted(existing.keys() | new.keys()) if key not in ("configurations", "dante")
                 and existing.get(key) != new.get(key)]
    differing += [name for name in existing["configurations"].keys() & new["configurations"].keys()
                  if existing["configurations"][name] != new["configurations"][name]]
    if differing:
        raise ConfigurationError(f"Plans {existing.get('plans_name')!r} hold {sorted(others)} of another donor, "
                                 f"and {configuration!r} needs different values of {differing}. Choose another name "
                                 "for the new plans with -p.")
    merged = deepcopy(existing)
    merged["configurations"] |= new["configurations"]
    merged["dante"]["start_weights"] |= new["dante"]["start_weights"]
    merged["dante"] = with_overrides(merged["dante"], block["overrides"] | read_dante_block(new)["overrides"])
    return merged
