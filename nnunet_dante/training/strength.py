"""The end of a training: choose how much of what was learned is kept, on cases that the training did not see.

What a training changed is `trained - start`, and `start + s (trained - start)` is a network for every strength s
(`adapters/strength.py`). Training on few cases can make a good donor worse. Then the best strength on the validation
cases is below 1, and strength 0 is the donor itself. So, as far as these cases can tell, a training does no harm.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager, convert_labelmap_to_one_hot
from torch import nn

from ..adapters.strength import at_strength, interpolate, note_strength, start_weights, trained_weights
from ..datasets.annotated import completed_labels, foreground
from ..errors import DanteError, StrengthError
from ..files import counted, nnunet_folder, read_json
from ..models.checkpoint import load_checkpoint_safely, save_atomically
from ..models.network import build_network
from ..types import DatasetJson, ReadOnlyStateDict, StateDict
from .provenance import load_start_weights

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
FINER = 0.1
MAX_CASES = 8
FEW = 4  # training cases; fewer than nnU-Net's five folds need
START = "checkpoint_start.pth"
_OTHER_CASES = "With other labelled cases: nnunet-dante strength FOLD_FOLDER --cases DIR"
_Base: Any = object


def search(score: Callable[[float], float]) -> dict[float, float]:
    """Return {strength: score} on a coarse grid from 0 to 1, and for the two strengths beside the best of them."""
    curve = {strength: score(strength) for strength in GRID}
    best = best_strength(curve)
    for strength in (round(best - FINER, 1), round(best + FINER, 1)):
        if 0 <= strength <= 1:
            curve[strength] = score(strength)
    return dict(sorted(curve.items()))


def best_strength(curve: Mapping[float, float]) -> float:
    """Return the strength with the highest score; if several are equal, the smallest of them."""
    return max(sorted(curve), key=lambda strength: curve[strength])


def summary(strength: float, curve: Mapping[float, float], cases: int) -> str:
    """Return in one sentence what was kept, and what keeping all or nothing would have given."""
    kept = "nothing" if strength == 0 else "all" if strength == 1 else f"{100 * strength:.0f} %"
    others = [f"{name} {curve[other]:.3f}" for other, name in ((1, "all of it"), (0, "none")) if other != strength]
    return (f"kept {kept} of what was learned: Dice {curve[strength]:.3f} on {unseen_cases(cases)}; "
            f"{', '.join(others)}.")


def unseen_cases(number: int) -> str:
    """Return the number of cases in words."""
    return counted(number, "unseen case")


def dice_of_labels(truth: np.ndarray, mask: np.ndarray, label_manager: LabelManager) -> list[float]:
    """Return the Dice of each label or region, without voxels of the ignore label; nan if neither mask has it."""
    ignored = None if label_manager.ignore_label is None else truth == label_manager.ignore_label
    dice = []
    for label in organs(label_manager):
        tp, fp, fn, _ = compute_tp_fp_fn_tn(region_or_label_to_mask(truth, label), region_or_label_to_mask(mask, label),
                                            ignored)
        dice.append(float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else math.nan)
    return dice


def of_drawn(dice: Sequence[float], dataset_json: DatasetJson, undrawn: Collection[str]) -> list[float]:
    """Return the Dice of each label or region, nan for those that were not drawn in the case."""
    return [math.nan if name in undrawn else value for name, value in zip(foreground(dataset_json), dice)]


def by_origin(dice: Sequence[float], dataset_json: DatasetJson,
              completed: Collection[str]) -> tuple[list[float], list[float]]:
    """Return the Dice of the labels of a case that were drawn, and of those that a donor completed; nan for others."""
    others = set(foreground(dataset_json)).difference(completed)
    return of_drawn(dice, dataset_json, completed), of_drawn(dice, dataset_json, others)


def balanced_dice(cases: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float]:
    """Return the Dice by which strengths are compared, and the mean Dice of the labels that were drawn.

    cases: of `by_origin`. Labels that a donor completed count as much as those that were drawn, all together: its masks
    are its own predictions, so that many of them would outweigh any new label, and speak against every training.
    """
    drawn, completed = (mean_dice([d for dice in part for d in dice]) for part in zip(*cases))
    return drawn if completed != completed else (drawn + completed) / 2, drawn


def mean_dice(dice: Sequence[float]) -> float:
    """Return the mean of the Dice values that are defined; nan if none is."""
    return float(np.nanmean(dice)) if any(d == d for d in dice) else math.nan


def organs(label_manager: LabelManager) -> list[Any]:
    """Return what nnU-Net gives a Dice: the numbers of the labels, or the regions."""
    return label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels


def load_start(network: nn.Module, source: str, *, fold: Path, entry: dict | None,
               folder: Callable[[], Path]) -> StateDict:
    """Return the weights before a training, with the added modules as they start.

    Args:
        network: as prediction builds it; changed in place.
        source: "start_source" of the training's "dante" block.
        fold: folder fold_X of the training.
        entry: the "start_weights" of its plans for its configuration.
        folder: returns the preprocessed data set, into which `nnunet-dante transfer` writes start weights.

    Raises:
        StrengthError: there are no start weights, or their file in `fold` is missing or belongs to another network.
        ConfigurationError: the file that `transfer` wrote is missing, or has been changed.
    """
    if source == "-pretrained_weights" and (file := fold / START).is_file():
        try:
            network.load_state_dict(load_checkpoint_safely(file)["network_weights"])
        except (KeyError, TypeError, RuntimeError, AttributeError) as error:
            raise StrengthError(f"{file} does not hold the start weights of this training ({error}). Put it back as "
                                f"it was.") from error
    elif source == "transfer" and entry:
        load_start_weights(network, folder(), entry)
    else:
        raise StrengthError(f"the start weights are needed to change how much is kept. This training started from "
                            f"{source!r}: random weights are not kept, and those of -pretrained_weights are expected "
                            f"in {fold / START}.")
    return network.state_dict()


def start_of(checkpoint: Mapping[str, Any], *, fold: Path, folder: Callable[[], Path]) -> StateDict:
    """Return the weights before a finished training: its checkpoint holds them, or the file that it started from.

    Args:
        checkpoint: its checkpoint_final.
        fold, folder: as for `load_start`.

    Raises:
        StrengthError: the checkpoint does not hold the start that it names, or as `load_start`.
        ConfigurationError: as `load_start`.
    """
    if (start := start_weights(checkpoint)) is not None:
        return start
    init = checkpoint["init_args"]
    network = build_network(init["plans"], init["dataset_json"], init["configuration"],
                            trainer_name=checkpoint["trainer_name"])
    return load_start(network, str(checkpoint["dante"].get("start_source")), fold=fold, folder=folder,
                      entry=init["plans"].get("dante", {}).get("start_weights", {}).get(init["configuration"]))


class StrengthMixin(_Base):
    """After the last epoch, choose the strength, and set network, checkpoint_final and adapter to it."""

    run_method: Any
    output_folder: str
    kept_strength: Mapping[str, Any] | None = None  # what the checkpoint of a finished training says of its strength
    dice_of_drawn: Mapping[float, float] = MappingProxyType({})  # strength -> mean Dice of the labels that were drawn

    def keep_start(self) -> None:
        """Save the weights that -pretrained_weights gave; the choice of the strength at the end needs them."""
        if self.start_source == "-pretrained_weights" and self.local_rank == 0 and not self.disable_checkpointing:
            save_atomically({"network_weights": dict(self.bare_network.state_dict())},
                            Path(self.output_folder, START))

    def on_train_end(self) -> None:
        """Let nnU-Net write everything that was learned to disk, then choose how much of it is kept."""
        super().on_train_end()
        if not self.run_method.uses_start_weights:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("kept all that was learned: without checkpoints nothing else can be kept")
            return
        if self.is_ddp:
            dist.barrier()  # rank 0 has written the checkpoint
        final = Path(self.output_folder, "checkpoint_final.pth")
        checkpoint = self.read_checkpoint(str(final))
        try:
            start = start_weights(checkpoint) or self.start_state()
        except DanteError as error:
            self.print_to_log_file(f"WARNING: kept all that was learned. {error}")
            return
        strength, facts = self._strength(start, trained_weights(checkpoint))
        checkpoint = at_strength(checkpoint, strength, start=start, facts=facts)
        if self.local_rank == 0:
            save_atomically(checkpoint, final)
        self.bare_network.load_state_dict(checkpoint["network_weights"])
        self.kept_strength = checkpoint["dante"]["strength"]

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, and note beside the scores at which strength the masks were predicted."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            note_strength(Path(self.output_folder), {"dante": {"strength": self.kept_strength}})

    def start_state(self) -> StateDict:
        """Return the weights before the training, on the CPU; raises the errors of `load_start`."""
        return load_start(self._built(), self.start_source, fold=Path(self.output_folder), entry=self.start_entry,
                          folder=lambda: Path(self.preprocessed_dataset_folder_base))

    def _strength(self, start: ReadOnlyStateDict, trained: ReadOnlyStateDict) -> tuple[float, dict[str, Any]]:
        """Return the strength, and facts about its choice for the checkpoint; they are the same on all ranks."""
        if (before := self.kept_strength) is not None:
            return before["value"], {key: fact for key, fact in before.items() if key not in ("value", "trained")}
        if (given := self.run_method.strength) is not None:
            self.print_to_log_file(f"strength {given:g}, as the options say")
            return given, {"rule": "given"}
        training, validation = self.do_split()
        unseen = sorted(set(validation) - set(training))
        if not unseen:
            return self._without_unseen_cases(start, training)
        cases = sorted(random.Random(0).sample(unseen, min(MAX_CASES, len(unseen))))
        self.print_to_log_file(f"Choosing how much of what was learned to keep: {len(GRID) + 2} strengths at most, "
                               f"each predicts {unseen_cases(len(cases))} ({', '.join(cases)}) without mirroring. "
                               "nnU-Net's Mean Validation Dice further below is with mirroring and of all validation "
                               "cases, so it can differ.")
        began = time.monotonic()
        curve = search(self._scorer(start, trained, cases))
        facts = {"rule": "unseen cases", "cases": len(cases), "curve": [[s, d] for s, d in curve.items()],
                 "seconds": round(time.monotonic() - began, 1)}
        if any(dice != dice for dice in curve.values()):
            self.print_to_log_file("kept all that was learned: no label is drawn in the unseen cases")
            return 1.0, facts
        strength = best_strength(curve)
        self.print_to_log_file(summary(strength, curve, len(cases)))
        if self.dice_of_drawn.get(strength) == 0:
            self.print_to_log_file("WARNING: no label that you drew was found in an unseen case. Train longer.")
        return strength, facts

    def _without_unseen_cases(self, start: ReadOnlyStateDict,
                              training: Sequence[str]) -> tuple[float, dict[str, Any]]:
        """Return the strength, and facts about its choice, if the training saw all cases.

        The first rule that applies decides. If the folds of this data set were trained: the mean of the strengths that
        they chose on their unseen cases. If there are few cases: 1 - Dice of the start weights on them. Else: 1.
        """
        folds = self._strengths_of_folds(training)
        if folds:
            strength = round(sum(folds.values()) / len(folds), 2)
            self.print_to_log_file(f"kept {100 * strength:.0f} % of what was learned: the mean of what the folds chose "
                                   f"on their unseen cases ({', '.join(f'{n}: {s:g}' for n, s in folds.items())})")
            return strength, {"rule": "mean of the folds", "folds": folds}
        if len(training) <= FEW:
            dice = self._scorer(start, start, training)(0.0)
            if dice == dice:
                strength = round(1 - dice, 2)
                self.print_to_log_file(
                    f"kept {100 * strength:.0f} % of what was learned: all {len(training)} labelled cases were trained "
                    f"on, so none is left to choose on. Before training the Dice on them was {dice:.3f}; what is kept "
                    f"is what was lacking. {_OTHER_CASES}")
                return strength, {"rule": "what the start lacked", "start_dice": dice}
        self.print_to_log_file(f"kept all that was learned: every case was trained on, so there is none to choose on. "
                               f"Train the folds first, and their choice is taken over. {_OTHER_CASES}")
        return 1.0, {"rule": "no unseen cases"}

    def _strengths_of_folds(self, training: Sequence[str]) -> dict[str, float]:
        """Return {fold: strength} of the other folds' trainings, or {} if one of the cases was seen by all of them."""
        splits = Path(self.preprocessed_dataset_folder_base, "splits_final.json")
        if not splits.is_file():
            return {}
        start = (self.start_entry or {}).get("sha256")
        strengths: dict[str, float] = {}
        missing = set(training)
        for number, split in enumerate(read_json(splits)):
            final = Path(self.output_folder_base, f"fold_{number}", "checkpoint_final.pth")
            if number == self.fold or not final.is_file():
                continue
            dante = load_checkpoint_safely(final).get("dante") or {}
            kept = dante.get("strength") or {}
            if kept.get("rule") == "unseen cases" and dante.get("start_weights") == start:
                strengths[str(number)] = kept["value"]
                missing -= set(split["val"]) - set(split["train"])
        return {} if missing else strengths

    def _scorer(self, start: ReadOnlyStateDict, trained: ReadOnlyStateDict,
                cases: Sequence[str]) -> Callable[[float], float]:
        """Return a function from a strength to nnU-Net's mean Dice over cases and labels, without mirroring.

        Labels that a donor completed count half, as in `balanced_dice`.
        """
        network, drawn = self._built(), dict[float, float]()
        self.dice_of_drawn = drawn
        predictor = nnUNetPredictor(use_mirroring=False, device=self.device, allow_tqdm=False,
                                    perform_everything_on_device=self.device.type == "cuda")
        predictor.manual_initialization(network, self.plans_manager, self.configuration_manager, None,
                                        self.dataset_json, type(self).__name__, None)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.is_ddp else (0, 1)
        data = self.dataset_class(self.preprocessed_dataset_folder, list(cases),
                                  folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage)
        completed = completed_labels(nnunet_folder("nnUNet_raw", self.plans_manager.dataset_name), self.dataset_json,
                                     cases)

        def score(strength: float) -> float:
            began = time.monotonic()
            network.load_state_dict(interpolate(start, trained, strength))
            dice = [by_origin(self._dice(predictor, data, case), self.dataset_json, completed[case])
                    for case in cases[rank::ranks]]
            if self.is_ddp:  # all ranks take part: one that only waited for the others would run into NCCL's timeout
                of_ranks: list[Any] = [None] * ranks
                dist.all_gather_object(of_ranks, dice)
                dice = sum(of_ranks, [])
            mean, drawn[strength] = balanced_dice(dice)
            self.print_to_log_file(f"  strength {strength:.1f}: Dice {mean:.4f}, {time.monotonic() - began:.1f} s")
            return mean

        return score

    def _dice(self, predictor: nnUNetPredictor, data: Any, case: str) -> list[float]:
        """Return the Dice of each label or region of a case, predicted and compared as nnU-Net's validation does."""
        image, _, previous, properties = data.load_case(case)
        image = np.asarray(image[:])
        if self.is_cascaded:
            one_hot = convert_labelmap_to_one_hot(previous[:], self.label_manager.foreground_labels,
                                                  output_dtype=image.dtype)
            image = np.vstack((image, one_hot))
        try:
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image)).cpu()
        except RuntimeError as error:
            if "Encountered inf" not in str(error):  # nnU-Net refuses such a prediction, so it counts as the worst
                raise
            return [0.0] * len(organs(self.label_manager))
        mask = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans_manager, self.configuration_manager, self.label_manager, properties,
            num_threads_torch=torch.get_num_threads())
        file = Path(self.preprocessed_dataset_folder_base, "gt_segmentations",
                    f"{case}{self.dataset_json['file_ending']}")
        truth = self.plans_manager.image_reader_writer_class().read_seg(str(file))[0][0]
        return of_drawn(dice_of_labels(truth, mask, self.label_manager), self.dataset_json, self.undrawn.get(case, ()))

    def _built(self) -> nn.Module:
        """Return a network as prediction builds it, on the CPU."""
        return self.build_network_architecture(
            self.plans_manager, self.configuration_manager, self.num_input_channels,
            self.label_manager.num_segmentation_heads, enable_deep_supervision=False)
