"""Make a pretrained nnU-Net (the donor) the start of a training on another data set (the target)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from .. import __version__
from ..datasets.dataset import Target, open_target
from ..datasets.orientation import case_orientations, compare_orientations, training_orientation
from ..errors import ConfigurationError, TransferError
from ..files import read_json, write_text_atomically
from ..models.checkpoint import alias_sets, file_sha256, save_atomically, unique_tensors
from ..models.donor import Donor, open_donor
from ..models.labels import head_names
from ..models.memory import planned_gib
from ..models.network import build_network, head_rows, stem_weights
from ..models.overrides import checked_overrides
from ..models.settings import new_dante_block, read_dante_block
from ..peft.added_modules import is_added
from ..types import PathLike, Plans, StateDict
from .geometry import own_geometry, planned_encoder
from .keep import completed_target, open_folds
from .match import Match, match_data_sets
from .mirroring import chosen_axes, describe_axes, side_axis, side_warnings
from .plans import PlansReport, describe_plans, merge_plans, retarget_plans
from .preprocess import preprocess as run_preprocessing
from .preprocess import preprocess_command, stale_data
from .report import TransferReport
from .surgery import head_surgery, invert_channels, stem_surgery


def transfer(source: PathLike, dataset: str | int, *, configuration: str | None = None, fold: int | str | None = None,
             plans_name: str = "nnUNetDantePlans", checkpoint: str = "checkpoint_final.pth",
             batch_size: int | None = None, geometry: str = "donor", intensity: str | None = None,
             invert: Sequence[str] = (), mirroring: str = "donor", keep_labels: Sequence[str] = (),
             rename: Mapping[str, str] | None = None, into: str | None = None, rehearse: PathLike | None = None,
             share: float = 0.25, preprocess: bool = False, overrides: Mapping[str, Any] | None = None,
             trainer: str | None = None, trust: bool = False, num_processes: int | None = None) -> TransferReport:
    """Write plans, dataset.json, fingerprint, start weights and a report for `dataset` into nnUNet_preprocessed.

    Fingerprint and preprocessing start processes, so a script that calls this function needs
    `if __name__ == "__main__":`.

    Args:
        source: model folder, zip file of `nnUNetv2_export_model_to_zip`, checkpoint (also one that holds only an
            encoder, such as nnssl's), or `totalsegmentator:291`.
        dataset: number or name of your data set below nnUNet_raw.
        configuration: configuration of the source, such as 3d_fullres; needed if the source holds several.
        fold: fold of the source; None takes fold_all, or else the lowest fold.
        checkpoint: file name of the checkpoint in the folder of the fold.
        plans_name: name of the plans to write.
        batch_size: replaces the batch size of the donor, or that of nnU-Net's planner.
        geometry: "donor" resamples your images to the donor's spacing, and takes its patch size. "target" takes the
            spacing, patch size and batch size that nnU-Net's planner chooses for your data and the donor's network.
        intensity: whose intensity statistics the normalisation of CT uses, "donor" or "target"; None takes the value
            of `geometry`. With the target's geometry, its normalisation schemes are taken as well.
        invert: channels in which bright and dark are exchanged compared with the donor's images.
        mirroring: axes along which trainings mirror their images: "donor" (as the donor's training did), "none" or
            "all".
        keep_labels: labels of the donor to keep although nobody drew them, or ["all"]: the masks are completed with its
            predictions, as a data set of their own. By default only labels that "annotated" of dataset.json calls
            undrawn are completed; ["none"] completes nothing.
        rename: the donor's name -> yours, of labels that have two names. into, rehearse, share: as in `complete`.
        preprocess: run nnU-Net's preprocessing afterwards.
        overrides: numbers and options of the trainings, such as {"epochs": 100, "l2_sp": 0.01}. Those of an earlier
            transfer of this configuration to the same plans are removed.
        trainer: the trainer that the printed training command names; None takes one that fits the donor.
        trust: also read a checkpoint that executes code.
        num_processes: number of processes for fingerprint and preprocessing; None takes nnU-Net's default.

    Raises:
        DonorError, UntrustedFileError: the source cannot be used.
        TransferError, ConfigurationError: the target or an option cannot be used with this donor. In this case, no file
            is written, except perhaps the target's fingerprint.
    """
    given = checked_overrides(overrides or {})
    if geometry not in ("donor", "target"):
        raise ConfigurationError(f"geometry is {geometry!r}; choose 'donor' or 'target'.")
    intensity = intensity or geometry
    target = open_target(dataset)
    target.split()  # refuses a damaged one
    opened = open_donor(source, configuration=configuration, fold=fold, checkpoint=checkpoint, trust=trust,
                        partial=True)
    donor, target, completion, undrawn = completed_target(
        opened, target, keep=keep_labels, rename=rename or {}, into=into, rehearse=rehearse, share=share, invert=invert,
        folds=lambda: open_folds(source, opened) if fold is None else [opened])
    if donor.encoder_only:
        donor = _with_plans(donor, target, geometry, num_processes)
    plans, plans_report, weights, facts = fit(
        donor, target, plans_name=_checked_name(plans_name), batch_size=batch_size, geometry=geometry,
        intensity=intensity, invert=invert, num_processes=num_processes)
    axes = chosen_axes(mirroring, donor.mirroring_axes, dimension=len(plans_report.patch_size))
    entry = {"file": f"{plans_name}_{donor.configuration}_start.pth", "donor": donor.provenance(),
             **facts.pop("maps"), "inverted_channels": list(invert), "geometry": geometry,
             "encoder_only": donor.encoder_only,
             "mirroring_axes": None if axes is None else list(axes), "network_trainer": donor.network_trainer}
    file = target.preprocessed / f"{plans_name}.json"
    existing = _existing_plans(file)
    plans |= {"dante": new_dante_block(donor.configuration, entry | {"sha256": "0" * 64}, given)}
    if existing:
        plans = merge_plans(existing, plans, configuration=donor.configuration)
    command = preprocess_command(target, plans, donor.configuration)
    config = PlansManager(plans).get_configuration(donor.configuration)
    stale = stale_data(target, target.preprocessed / config.data_identifier,
                       same_plans=_without_dante(existing) == _without_dante(plans))
    orientation, differing = describe_orientation(donor, source, target, plans)
    notes = (*target.warnings, *undrawn, *differing, *_trainer_note(donor), *_invert_note(invert),
             *_removed_note(existing, plans), *side_note(donor, target, plans, axes), *(() if preprocess else stale))
    # All checks are done, so files are written from here on. The plans are the last, because they name the others.
    sha256 = _write(target, file, plans, donor.configuration, weights, entry)
    split = target.write_split()
    report = TransferReport(
        donor=donor.provenance(), dataset=target.name, configuration=donor.configuration, plans_name=plans_name,
        plans_file=file.name, start_weights=str(entry["file"]), start_weights_sha256=sha256, plans=plans_report,
        intensity=intensity, reader=plans["image_reader_writer"], orientation=orientation, cases=len(target.own),
        split=split, batch_size=config.batch_size, mirroring_axes=axes,
        mirroring=describe_axes(mirroring, donor.mirroring_axes, axes), trainer=next_trainer(donor, otherwise=trainer),
        overrides=read_dante_block(plans)["overrides"], encoder_only=donor.encoder_only,
        fold="all" if len(target.own) == 1 else "0", preprocess="" if preprocess else command, notes=notes,
        completion=completion, **facts)
    for suffix, text in ((".json", report.to_json()), (".txt", f"{report}\n")):
        write_text_atomically(text, file.with_name(f"{plans_name}_{donor.configuration}_transfer{suffix}"))
    if preprocess:
        run_preprocessing(target, plans, donor.configuration, num_processes=num_processes)
    return report


def fit(donor: Donor, target: Target, *, plans_name: str = "nnUNetDantePlans", batch_size: int | None = None,
        geometry: str = "donor", intensity: str = "donor", invert: Sequence[str] = (),
        num_processes: int | None = None) -> tuple[Plans, PlansReport, StateDict, dict[str, Any]]:
    """Return (plans, report on them, start weights, facts for the report) of `donor` for `target`.

    No file is written, except the target's fingerprint.

    Raises:
        TransferError, ConfigurationError: as for `transfer`.
    """
    names = match_data_sets(target.dataset_json, donor.dataset_json, cascaded=is_cascaded(donor))
    if donor.encoder_only:
        names = replace(names, labels=replace(names.labels, donor=(), donor_regions=names.labels.target_regions))
    plans, plans_report = retarget_plans(
        donor.plans, configuration=donor.configuration, plans_name=plans_name, dataset_name=target.name,
        reader=target.reader(str(donor.plans.get("image_reader_writer"))), channels=names.channels,
        intensity=intensity, batch_size=batch_size, fingerprint=target.fingerprint(num_processes=num_processes))
    _check_dimensions(donor, plans, target)
    if geometry == "target":
        plans, plans_report = _own_geometry(donor, target, plans, plans_report, names, intensity, batch_size)
    weights, facts = _operate(donor, target, plans, names, _inverted(invert, plans_report))
    facts["maps"] = {"label_map": names.labels.by_name(), "channel_map": names.channels.by_name()}
    return plans, plans_report, weights, facts


def _with_plans(donor: Donor, target: Target, geometry: str, num_processes: int | None) -> Donor:
    """Return an encoder with plans, which nnU-Net makes for the target where the checkpoint says no architecture."""
    if geometry == "donor" and not donor.own_spacing:
        raise TransferError(f"{donor.checkpoint_name} holds an encoder, and nothing says at which spacing it was "
                            "trained. Use --geometry target.")
    if donor.plans:
        return donor
    target.fingerprint(num_processes=num_processes)
    return planned_encoder(donor, target)


def _own_geometry(donor: Donor, target: Target, plans: Plans, report: PlansReport, names: Match, intensity: str,
                  batch_size: int | None) -> tuple[Plans, PlansReport]:
    own = intensity == "target"
    plans, before = own_geometry(plans, donor.configuration, target, normalisation=own,
                                 trainer_name=donor.network_trainer, trust=donor.trust)
    if not donor.own_spacing:
        before = replace(before, spacing_mm=(), patch_size=())
    if batch_size is not None:
        plans["configurations"][donor.configuration]["batch_size"] = int(batch_size)
    return plans, describe_plans(plans, donor.configuration, names.channels, own_schemes=own, donor=before,
                                 has_statistics=any(c.statistics_from == "donor" for c in report.channels))


def is_cascaded(donor: Donor) -> bool:
    """Return whether the donor is the second stage of a cascade, which also reads the prediction of the first."""
    return PlansManager(donor.plans).get_configuration(donor.configuration).previous_stage_name is not None


def describe_orientation(donor: Donor, source: PathLike, target: Target, plans: Plans) -> tuple[str, list[str]]:
    """Return how the images of target and donor are stored (such as RAS), and a warning about cases that differ."""
    found = case_orientations(target.cases, str(plans["image_reader_writer"]))
    return compare_orientations(found, training_orientation(donor, source))


def _inverted(names: Sequence[str], report: PlansReport) -> tuple[int, ...]:
    """Return the numbers of the channels; only those whose intensities have mean 0 can be negated."""
    channels = {channel.name: i for i, channel in enumerate(report.channels)}
    for name in names:
        if name not in channels:
            raise ConfigurationError(f"--invert {name}: the data set has the channels {', '.join(channels)}; name one.")
        if (scheme := report.channels[channels[name]].scheme) != "ZScoreNormalization":
            raise ConfigurationError(f"--invert {name}: this channel is normalised by {scheme}, and only "
                                     f"ZScoreNormalization has mean 0; invert the images instead.")
    return tuple(channels[name] for name in names)


def _invert_note(names: Sequence[str]) -> tuple[str, ...]:
    return (f"the network starts with bright and dark exchanged in {', '.join(names)}: give it your images as they "
            f"are",) if names else ()


def _removed_note(existing: Plans | None, plans: Plans) -> tuple[str, ...]:
    before, after = (read_dante_block(p or {})["overrides"] for p in (existing, plans))
    removed = ", ".join(f"{name} {value}" for name, value in before.items() if name not in after)
    return (f"overrides removed: {removed}. An earlier transfer set them; repeat them to keep them",) if removed else ()


def side_note(donor: Donor, target: Target, plans: Plans, axes: tuple[int, ...] | None) -> tuple[str, ...]:
    """Return a warning if mirroring along `axes` mixes up labels of left and right; the first image is looked at."""
    dimension = len(PlansManager(plans).get_configuration(donor.configuration).patch_size)
    image = next(iter(target.cases.values())).images[0]
    axis = side_axis(image, transpose=plans["transpose_forward"], dimension=dimension)
    return tuple(side_warnings(head_names(target.dataset_json), axes, side_axis=axis,
                               known=donor.mirroring_axes is not None))


def _checked_name(plans_name: str) -> str:
    if not plans_name or "__" in plans_name or Path(plans_name).name != plans_name:
        raise ConfigurationError(f"The plans name is {plans_name!r}; folders are named after it, so it must not be "
                                 "empty, and must not hold '__' or '/'. The default is nnUNetDantePlans.")
    return plans_name


def _check_dimensions(donor: Donor, plans: Plans, target: Target) -> None:
    config = PlansManager(plans).get_configuration(donor.configuration)
    if len(config.patch_size) == 3 and plans["original_median_shape_after_transp"][0] == 1:
        raise TransferError(f"{target.name} holds 2D images (one slice each), but the donor's configuration "
                            f"{donor.configuration!r} is 3D with patch {list(config.patch_size)}. Use a 2d model.")


def next_trainer(donor: Donor, *, otherwise: str | None = None) -> str:
    """Return the trainer to name in a command; the donor's own if that added modules to the network.

    otherwise: the trainer for all other donors; None takes one that fits the donor.
    """
    if any(map(is_added, donor.weights)):
        return donor.network_trainer
    return otherwise or ("nnUNetTrainerFineTune" if donor.encoder_only else "nnUNetTrainerLoRA")


def _trainer_note(donor: Donor) -> tuple[str, ...]:
    if donor.network_trainer == "nnUNetTrainer":
        return ()
    if next_trainer(donor) == donor.network_trainer:
        return (f"the donor's network holds modules that {donor.network_trainer} added: train with -tr "
                f"{donor.network_trainer}, because no other trainer builds this network",)
    return (f"the donor's network is built by its trainer {donor.network_trainer}, not by the plans: the trainers of "
            f"this package build the same network, and nnUNetv2_predict finds it by that name. -tr "
            f"nnUNetTrainerSpatialAdapter and -tr nnUNetTrainerAdaptFormer cannot be used",)


def _operate(donor: Donor, target: Target, plans: Plans, names: Match,
             inverted: tuple[int, ...]) -> tuple[StateDict, dict[str, Any]]:
    """Return the start weights, with head and stem for the target, and facts about them for the report."""
    with torch.random.fork_rng(devices=[]):
        # Layers whose shape depends on the labels (Primus) stay random. With the seed, every transfer gives the same.
        torch.random.default_generator.manual_seed(0)
        network = build_network(plans, target.dataset_json, donor.configuration, trainer_name=donor.network_trainer,
                                trust=donor.trust)
    if donor.encoder_only:
        weights, labels = network.state_dict() | donor.weights, names.labels.report("random, as the whole decoder")
    else:
        weights, labels = head_surgery(donor.weights, heads=head_rows(network), labels=names.labels)
    stems = stem_weights(plans, target.dataset_json, donor.configuration, trainer_name=donor.network_trainer,
                         trust=donor.trust)
    weights, channels, previous = stem_surgery(weights, stems=stems, channels=names.channels,
                                               previous=names.previous_stage)
    weights = invert_channels(weights, stems=stems, channels=inverted) if inverted else weights
    weights, reinitialised = _fitted(weights, network.state_dict())
    kind = {True: "sigmoid regions", False: "softmax labels"}
    mine, theirs = kind[names.labels.target_regions], kind[names.labels.donor_regions]
    label_kind = mine if mine == theirs else f"{mine} (donor: {theirs}; same names start from each other)"
    config = PlansManager(plans).get_configuration(donor.configuration)
    return weights, {"labels": labels, "channels": channels, "previous_stage": previous, "label_kind": label_kind,
                     "weights_copied": _share_copied(donor.weights, weights, reinitialised),
                     "memory_gib": planned_gib(network, config.patch_size, config.batch_size),
                     "reinitialised": reinitialised}


def _fitted(weights: StateDict, expected: StateDict) -> tuple[StateDict, tuple[str, ...]]:
    """Replace tensors of another shape by those of the target network: Primus has a decoder that depends on the labels.

    Returns the weights, and the names of the replaced tensors.
    """
    fitted, replaced = dict(weights), []
    for key, names in alias_sets(expected).items():
        if weights[key].shape != expected[key].shape:
            fitted |= dict.fromkeys(names, expected[key].detach().clone())
            replaced.append(key)
    return fitted, tuple(replaced)


def _share_copied(donor: StateDict, weights: StateDict, reinitialised: tuple[str, ...]) -> float:
    """Return the share of the numbers that are copied from the donor, also to another row or channel."""
    copied = total = 0
    for key, tensor in unique_tensors(weights).items():
        total += tensor.numel()
        if (old := donor.get(key)) is None:  # of the decoder, where the donor is an encoder alone
            continue
        if tensor is old or (tensor.shape == old.shape and torch.equal(tensor, old)):
            copied += tensor.numel()
        elif key not in reinitialised:  # rows are in the first dimension, channels in the second
            copied += max(_shared_slices(tensor, old, dim) for dim in range(min(2, tensor.ndim)))
    return copied / total


def _shared_slices(tensor: Tensor, old: Tensor, dim: int) -> int:
    known = old.unbind(dim)
    return sum(part.numel() for part in tensor.unbind(dim)
               if any(part.shape == k.shape and torch.equal(part, k) for k in known))


def _write(target: Target, file: Path, plans: Plans, configuration: str, weights: StateDict,
           entry: Mapping[str, Any]) -> str:
    """Write weights, dataset.json and, last, the plans; return the weights' sha256, which the plans record."""
    start = target.preprocessed / str(entry["file"])
    save_atomically({"network_weights": weights, "dante": {"format": 1, "version": __version__, **entry}}, start)
    sha256 = file_sha256(start)
    plans["dante"]["start_weights"][configuration]["sha256"] = sha256
    write_text_atomically(json.dumps(target.dataset_json, indent=4), target.preprocessed / "dataset.json")
    write_text_atomically(json.dumps(plans, indent=4), file)
    return sha256


def _existing_plans(file: Path) -> Plans | None:
    if not file.is_file():
        return None
    try:
        if isinstance(plans := read_json(file), dict):
            return plans
        error: object = f"it holds a {type(plans).__name__}"
    except ValueError as found:
        error = found
    raise ConfigurationError(f"{file.name} exists and holds no plans ({error}). Delete it, or choose another name with "
                             "-p.")


def _without_dante(plans: Plans | None) -> Plans:
    return {key: value for key, value in (plans or {}).items() if key != "dante"}
