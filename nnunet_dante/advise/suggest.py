"""What to train for a donor and a data set: measured on the user's own training cases, decided by rules."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from ..datasets.dataset import Target, open_target
from ..datasets.fingerprint import INTENSITY
from ..errors import ConfigurationError
from ..files import counted
from ..models.archive import DEFAULT_CHECKPOINT
from ..models.donor import Donor, open_donor
from ..models.network import build_network
from ..training.launch import device_option, train_command
from ..transfers.mirroring import describe_axes
from ..transfers.plans import PlansReport
from ..transfers.report import MAX_SPACING_RATIO
from ..transfers.transfer import describe_orientation, fit, next_trainer, side_note
from ..types import PathLike, Plans
from .probe import Probe, cut_patches, probe
from .rules import INPUT_SIDE, OUTPUT_SIDE, Rule, Situation, choose

_PROBED = 3


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Facts, the rule that applies to them, and commands; `str(suggestion)` is the text that is printed."""

    dataset: str
    situation: Situation
    probe: Probe
    probed: tuple[str, ...]
    fold: str
    renamed: tuple[str, ...]
    spacing_ratio: tuple[float, ...]
    mirroring: tuple[str, ...]
    orientation: tuple[str, ...]
    intensity: tuple[str, ...]
    rule: Rule
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([*self._facts(), *self._suggestion(), "Commands:",
                          *(f"  {command}" for command in self.commands)])

    def _facts(self) -> Iterator[str]:
        s = self.situation
        yield f"{self.dataset}, fold {self.fold}: {counted(s.cases, 'training case')}"
        yield f"  labels     known to the donor: {', '.join(s.known) or 'none'}; new: {', '.join(s.new) or 'none'}"
        yield from (f"  ! {line}" for line in self.renamed)
        ratio = " x ".join(f"{r:.2f}" for r in self.spacing_ratio)
        far = any(not 1 / MAX_SPACING_RATIO <= r <= MAX_SPACING_RATIO for r in self.spacing_ratio)
        yield f"  spacing    {ratio} times the donor's" + (": expect blur (above 1) or lost detail (below 1)" * far)
        yield from (f"  mirroring  {line}" for line in self.mirroring)
        yield from (f"  stored as  {line}" for line in self.orientation)
        yield from (f"  intensity  {line}" for line in self.intensity)
        if s.zero_shot is None:
            yield "  zero-shot  cannot be measured: the donor knows none of your labels by name"
        else:
            by_label = ", ".join(f"{name} {dice:.3f}" for name, dice in self.probe.dice.items())
            yield (f"  zero-shot  Dice {s.zero_shot:.3f} without training ({by_label}); with inverted contrast "
                   f"{s.zero_shot_inverted:.3f}")
            yield (f"             in one patch around a label of each of {', '.join(self.probed)}: expect less "
                   "on whole images")
        yield "  gradients  " + ", ".join(f"{name} {value:.2g}" for name, value in self.probe.gradients.items())
        if s.gradient_ratio is not None:
            side = ("the donor does well, so there is little to explain" if s.holds and not s.new else
                    "contrast is inverted, which this ratio cannot show" if s.inverted else
                    f"the images changed ({INPUT_SIDE} or more)" if s.input_side else
                    f"the labels changed ({OUTPUT_SIDE} or less)" if s.output_side else "undecided")
            yield f"             encoder / decoder {s.gradient_ratio:.2f}: {side}"

    def _suggestion(self) -> Iterator[str]:
        yield "Suggestion:"
        if self.rule.keep:
            yield "  Use the donor as it is, or train: little can be gained, and what does not help is not kept."
        low_rank = f", rank {self.rule.rank}, alpha {2 * self.rule.rank}" if _has_rank(self.rule.trainer) else ""
        yield f"  {self.rule.trainer}{low_rank}"
        start = "image" if self.rule.order == "input_first" else "output (the default)"
        yield f"  If you open the network in stages, begin at the {start}: direction={self.rule.order}"
        yield f"  Reason: {self.rule.reason}."
        yield f"  Source: {self.rule.source}."
        yield ("  The training keeps as much of what it learned as helps on the validation cases, down to nothing:\n"
               "  by their Dice it never ends worse than the donor. With few cases, this is uncertain.")


def suggest(source: PathLike, dataset: str | int, *, configuration: str | None = None, fold: int | str | None = None,
            checkpoint: str = DEFAULT_CHECKPOINT, train_fold: int | str | None = None, trust: bool = False,
            num_processes: int | None = None) -> Suggestion:
    """Measure how the donor fits the training cases and say what to train; only the fingerprint is written.

    Up to three training cases are preprocessed in memory, and one patch of each goes forward and backward. Validation
    and test cases of the splits are not looked at, except by the fingerprint.

    Args:
        source, dataset, configuration, fold, checkpoint, trust, num_processes: as in `transfer`.
        train_fold: fold whose training cases are measured; without a splits_final.json, folds are those that
            `transfer` or nnU-Net is going to write.

    Raises:
        DonorError, UntrustedFileError, TransferError, ConfigurationError: as `transfer`; or the fold is not there.
    """
    target = open_target(dataset)
    donor = open_donor(source, configuration=configuration, fold=fold, checkpoint=checkpoint, trust=trust)
    used, cases = _training_cases(target, train_fold)
    probed = tuple(cases[i * len(cases) // _PROBED] for i in range(_PROBED)) if len(cases) > _PROBED else cases
    plans, plans_report, weights, facts = fit(donor, target, num_processes=num_processes)
    known = tuple(name for name in facts["labels"].matched if name != "background")
    patches = cut_patches([target.cases[c] for c in probed], plans, donor.configuration, target.dataset_json, known)
    patches = [replace(patch, undrawn=target.undrawn.get(c, frozenset())) for c, patch in zip(probed, patches)]
    network = build_network(plans, target.dataset_json, donor.configuration, trainer_name=donor.network_trainer,
                            trust=donor.trust)
    network.load_state_dict(weights)
    measures = probe(network.to("cuda" if torch.cuda.is_available() else "cpu"), patches, target.dataset_json,
                     known=known, batch_dice=PlansManager(plans).get_configuration(donor.configuration).batch_dice)
    situation = Situation(
        cases=len(cases), known=known, new=facts["labels"].new, zero_shot=_mean(measures.dice.values()),
        zero_shot_inverted=_mean(measures.dice_inverted.values()),
        new_channels=facts["channels"].new if facts["channels"].matched else (),
        gradient_ratio=gradient_ratio(measures.gradients) if known else None)
    rule = choose(situation)
    if (trainer := next_trainer(donor, otherwise=rule.trainer)) != rule.trainer:
        rule = replace(rule, trainer=trainer, source="the donor's checkpoint",
                       reason="the donor's network holds modules that no other trainer builds")
    orientation, differing = describe_orientation(donor, source, target, plans)
    side_notes = side_note(donor, target, plans, donor.mirroring_axes)
    rank = rule.rank if _has_rank(rule.trainer) else None
    inverted = [c.name for c in plans_report.channels if situation.inverted and c.scheme == "ZScoreNormalization"]
    if situation.inverted and not inverted:  # what `transfer --invert` would refuse
        found = rule.reason.partition(" and a start")[0]
        rule = replace(rule, reason=f"{found} so exchange them in your image files, as --invert cannot with "
                                    f"{plans_report.channels[0].scheme}")
    return Suggestion(
        dataset=target.name, situation=situation, probe=measures, probed=probed, fold=used, rule=rule,
        renamed=(*facts["labels"].hint("labels"), *facts["channels"].hint("channels")),
        spacing_ratio=plans_report.spacing_ratio,
        mirroring=(describe_axes("donor", donor.mirroring_axes, donor.mirroring_axes), *side_notes),
        orientation=(orientation, *differing), intensity=tuple(_intensity(target, plans, plans_report)),
        commands=(*([_predict_command(Path(source), donor)] if rule.keep else []),
                  _transfer_command(target, source, {
                      "-c": configuration, "--fold": fold,
                      "--checkpoint": None if checkpoint == DEFAULT_CHECKPOINT else checkpoint,
                      "--mirroring": "none" if side_notes else None,
                      "--rank": rank, "--alpha": 2 * rank if rank else None,
                      "-tr": None if rule.trainer == next_trainer(donor) else rule.trainer}, inverted, trust),
                  train_command(target.name, donor.configuration, used, plans="nnUNetDantePlans",
                                trainer=rule.trainer)))


def _training_cases(target: Target, fold: int | str | None) -> tuple[str, tuple[str, ...]]:
    """Return the fold and its training cases; without `fold`, it is 0, or "all" if there is only one case."""
    folds = target.folds()
    if str(fold) == "all" or (fold is None and not folds):
        return "all", tuple(target.labelled)
    number = int(fold or 0) if str(fold or 0).isdecimal() else len(folds)
    if number >= len(folds):
        raise ConfigurationError(f"--train-fold {fold} does not exist: {target.name} has {len(folds)} folds, counted "
                                 "from 0. Give one of these, or `all`.")
    cases = {*folds[number]["train"]}.intersection(target.labelled)  # the others are no help
    return str(number), tuple(sorted(cases))


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def gradient_ratio(gradients: dict[str, float]) -> float | None:
    """Mean over the encoder's groups (a transformer's blocks and stem) by the mean over the decoder's."""
    encoder = _mean([v for name, v in gradients.items() if name.startswith(("encoder", "block", "stem"))])
    decoder = _mean([v for name, v in gradients.items() if name.startswith("decoder")])
    return encoder / decoder if encoder and decoder else None


def _intensity(target: Target, plans: Plans, report: PlansReport) -> Iterator[str]:
    """Yield a line per channel: how far its foreground is from the donor's, in the donor's standard deviations."""
    own = target.fingerprint()[INTENSITY]
    for i, channel in enumerate(report.channels):
        if channel.statistics_from == "donor":
            theirs, mine = plans[INTENSITY][str(i)], own[str(i)]
            distance = (mine["mean"] - theirs["mean"]) / max(theirs["std"], 1e-8)
            fate = ("; the network sees this difference" if channel.scheme == "CTNormalization"
                    else f"; {channel.scheme} takes most of it away")
            yield f"{channel.name}: foreground mean {distance:+.2f} standard deviations from the donor's{fate}"
        else:
            yield f"{channel.name}: the donor has no statistics of a channel of this name"


def _has_rank(trainer: str) -> bool:
    return any(name in trainer for name in ("LoRA", "DoRA", "LPFT"))


def _predict_command(source: Path, donor: Donor) -> str:
    model = str(source) if (source / "plans.json").is_file() else "MODEL_FOLDER"
    command = ["nnUNetv2_predict_from_modelfolder", "-i", "IMAGES", "-o", "OUTPUT", "-m", model, "-f", donor.fold,
               "-chk", donor.checkpoint_name, *device_option()]
    return f"{shlex.join(command)}   # labels are numbered as in the donor's dataset.json"


def _transfer_command(target: Target, source: PathLike, options: Mapping[str, Any], inverted: Sequence[str],
                      trust: bool) -> str:
    given = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    given += [word for name in inverted for word in ("--invert", name)]
    return shlex.join(["nnunet-dante", "transfer", str(source), "-d", target.name, "--preprocess",
                       *given, *["--trust"] * trust])
