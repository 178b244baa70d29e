"""The report of a transfer: what donor and target have in common, what is new, and warnings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .. import __version__
from ..training.launch import train_command
from .complete import Completion
from .geometry import DonorGeometry
from .match import NameReport
from .plans import PlansReport

MAX_SPACING_RATIO = 1.5
MIN_COVERAGE = 0.1


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """What `transfer` did. `str(report)` is the text that it prints, `to_json()` the same as JSON.

    weights_copied: share of the target network's numbers that are copied from the donor.
    encoder_only: whether the donor has no decoder, so that the target's starts at random.
    reinitialised: names of tensors that start at random.
    orientation: how the images of target and donor are stored.
    memory_gib: GPU memory of a training that trains every weight, by nnU-Net's estimate; None where it has none.
    trainer: the trainer that the printed command names.
    fold: the first fold that can be trained; "all" if there is only one case.
    preprocess: the command for preprocessing; "" if the data are ready.
    notes: warnings that do not come from `plans`, `labels` or `channels`.
    completion: how the masks of the data set were completed; None if they are as the user drew them.
    """

    donor: dict[str, str]
    dataset: str
    configuration: str
    plans_name: str
    plans_file: str
    start_weights: str
    start_weights_sha256: str
    labels: NameReport
    label_kind: str
    channels: NameReport
    previous_stage: NameReport
    plans: PlansReport
    intensity: str
    reader: str
    orientation: str
    batch_size: int
    memory_gib: float | None
    mirroring_axes: tuple[int, ...] | None
    mirroring: str
    weights_copied: float
    encoder_only: bool
    reinitialised: tuple[str, ...]
    cases: int
    split: str
    trainer: str
    fold: str
    overrides: dict[str, int | float]
    preprocess: str
    notes: tuple[str, ...]
    completion: Completion | None = None

    def to_json(self) -> str:
        """Return the report as JSON, with the version of this package and the warnings."""
        return json.dumps({"version": __version__, **asdict(self), "warnings": list(self.warnings)}, indent=2)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about everything that may make fine-tuning work badly, one sentence each."""
        names = _encoder_warnings() if self.encoder_only else _name_warnings(self)
        return (*self.notes, *_plans_warnings(self.plans), *names)

    def __str__(self) -> str:
        return "\n".join([*self._head(), *_names("labels", self.labels), *_names("channels", self.channels),
                          *(_names("cascade", self.previous_stage) if any(
                              (self.previous_stage.matched, self.previous_stage.new, self.previous_stage.dropped))
                            else ()), *self._plans(), *self._tail()])

    def _head(self) -> Iterator[str]:
        donor = self.donor
        yield f"Transfer to {self.dataset}, configuration {self.configuration}"
        yield _row("donor", f"{donor['source']} ({donor['dataset']}, {donor['trainer']}, fold {donor['fold']}, "
                            f"{donor['checkpoint']})")
        yield _row("", f"sha256 {donor['sha256']}")
        yield _row("weights", f"{self.weights_copied:.2%} copied unchanged"
                   + (f"; new at random: {', '.join(self.reinitialised)}" if self.reinitialised else "")
                   + ("; the donor is an encoder, so the whole decoder is random" if self.encoder_only else ""))
        yield _row("head", self.label_kind)

    def _plans(self) -> Iterator[str]:
        plans = self.plans
        for channel in plans.channels:
            yield _row("intensity", f"{channel.name}: {channel.scheme} ({channel.scheme_from}'s)"
                       + (", inside the nonzero mask" if channel.use_mask else "")
                       + (f", {channel.statistics_from}'s statistics" if channel.scheme == "CTNormalization" else ""))
        whose = "target's own" if plans.donor else "donor"
        yield _row("spacing", f"{_numbers(plans.plans_spacing_mm)} mm ({whose}); target median "
                              f"{_numbers(plans.target_spacing_mm)} mm; ratio {_numbers(plans.spacing_ratio)}")
        yield _row("patch", f"{_numbers(plans.patch_size)} voxels, batch {self.batch_size}; median image after "
                            f"resampling {_numbers(plans.median_shape)}")
        if self.memory_gib is not None:
            yield _row("memory", f"about {self.memory_gib:.2g} GiB of a GPU for the network alone if every weight is "
                                 "trained, by nnU-Net's estimate; less with methods that train few weights. What "
                                 "PyTorch itself takes of a GPU comes on top")
        if plans.donor:
            yield from _changes(plans, plans.donor)
        yield _row("mirroring", self.mirroring)
        yield _row("reader", self.reader)
        yield _row("stored as", self.orientation)

    def _tail(self) -> Iterator[str]:
        for number, line in enumerate(self.completion.lines() if self.completion else ()):
            yield _row("completed" if number == 0 else "", line)
        yield _row("cases", f"{self.cases}; {self.split}")
        if self.overrides:
            yield _row("overrides", ", ".join(f"{name} {value}" for name, value in self.overrides.items()))
        yield _row("written", f"{self.plans_file}, {self.start_weights}")
        yield from (f"  ! {warning}" for warning in self.warnings)
        yield "Next:"
        if self.preprocess:
            yield f"  {self.preprocess}"
        command = train_command(self.dataset, self.configuration, self.fold, plans=self.plans_name,
                                trainer=self.trainer)
        yield f"  {command}"


def _row(name: str, text: str) -> str:
    return f"  {name:<11}{text}"


def _numbers(values: Sequence[float]) -> str:
    return " x ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values)


def _names(kind: str, names: NameReport) -> Iterator[str]:
    yield _row(kind, f"matched: {', '.join(names.matched) or 'none'}")
    if names.new:
        yield _row("", f"new: {', '.join(names.new)} ({names.rule})")
    if names.dropped:
        yield _row("", f"dropped: {', '.join(names.dropped)}")


def _millimetres(voxels: Sequence[int], spacing_mm: Sequence[float]) -> str:
    return f"{_numbers([n * mm for n, mm in zip(voxels, spacing_mm)])} mm"


def _changes(plans: PlansReport, donor: DonorGeometry) -> Iterator[str]:
    """What the target's own geometry changes for the network, against what the donor learned with."""
    field, kernel, theirs = "", "", "nothing says at which spacing the donor was trained"
    if donor.spacing_mm:
        field, kernel = (f" (donor: {_millimetres(n, donor.spacing_mm)})" for n in (donor.patch_size, donor.kernel))
        theirs = (f"the donor: spacing {_numbers(donor.spacing_mm)} mm, patch {_numbers(donor.patch_size)}, batch "
                  f"{donor.batch_size}")
    yield _row("", f"chosen by nnU-Net's {donor.planner} for the donor's network; {theirs}")
    yield _row("sees", f"a patch shows {_millimetres(plans.patch_size, plans.plans_spacing_mm)}{field}; the first "
                       f"kernel covers {_millimetres(donor.kernel, plans.plans_spacing_mm)}{kernel}")


def _coarse_axis(spacing_mm: Sequence[float]) -> int | None:
    """Return the axis along which voxels are clearly larger than along all others, or None."""
    axis = max(range(len(spacing_mm)), key=lambda i: spacing_mm[i])
    others = max(mm for i, mm in enumerate(spacing_mm) if i != axis)
    return axis if spacing_mm[axis] > MAX_SPACING_RATIO * others else None


def _geometry_warnings(plans: PlansReport, donor: DonorGeometry) -> Iterator[str]:
    size = [theirs / mine for theirs, mine in zip(donor.spacing_mm, plans.plans_spacing_mm)]
    if any(not 1 / MAX_SPACING_RATIO <= s <= MAX_SPACING_RATIO for s in size):
        yield (f"structures are {_numbers(size)} times as large in voxels as the donor saw them: its weights fit less "
               "well than at its own spacing (--geometry donor), and more has to be trained")
    mine, theirs = _coarse_axis(plans.plans_spacing_mm), _coarse_axis(donor.spacing_mm)
    if mine is not None and mine != theirs:
        yield (f"your images are coarse along axis {mine} of the plans, and the donor's "
               + ("along none" if theirs is None else f"along axis {theirs}")
               + ": its kernels and strides stay as they are")


def _plans_warnings(plans: PlansReport) -> Iterator[str]:
    if plans.donor and plans.donor.spacing_mm:
        yield from _geometry_warnings(plans, plans.donor)
    far = [r for r in plans.spacing_ratio if not 1 / MAX_SPACING_RATIO <= r <= MAX_SPACING_RATIO]
    if far and not plans.donor:
        yield (f"the target's spacing is {_numbers(plans.spacing_ratio)} times the donor's, to which images are "
               "resampled: they look blurred (ratio above 1) or lose detail (below 1)")
    if any(p > n for p, n in zip(plans.patch_size, plans.median_shape)):
        yield (f"the patch {_numbers(plans.patch_size)} is larger than the median image "
               f"{_numbers(plans.median_shape)}: images are padded")
    coverage = 1.0
    for patch, size in zip(plans.patch_size, plans.median_shape):
        coverage *= min(1.0, patch / max(size, 1))
    if coverage < MIN_COVERAGE:
        yield (f"the patch covers {coverage:.1%} of the median image, so the network sees little of a case at once and "
               "needs many patches for it")


def _encoder_warnings() -> Iterator[str]:
    yield ("the decoder is random: it segments nothing before training, and needs more steps than a donor's. Every "
           "method trains it in full from the first epoch on; those that train less of it (HeadOnly, LoRADecoder, "
           "SpatialAdapter, AdaptFormer) are refused")


def _name_warnings(report: TransferReport) -> Iterator[str]:
    yield from report.labels.hint("labels")
    yield from report.channels.hint("channels")
    if not set(report.labels.matched) - {"background"}:
        yield ("the donor has none of your labels by name, so the head does not start from what it learned. If labels "
               "mean the same, give them the donor's names in dataset.json "
               f"({', '.join(report.labels.dropped) or 'none'})")
    if not report.channels.matched:
        yield (f"the donor has none of your channels by name; it has {', '.join(report.channels.dropped)}. Your images "
               "are taken as another modality. If they are the same, give the channel the donor's name: with "
               "--channels of `dataset` or `adapt`, or in dataset.json")
    elif report.channels.dropped:
        yield (f"the donor also read {', '.join(report.channels.dropped)}, which your data set does not have: expect "
               "a weak start")
