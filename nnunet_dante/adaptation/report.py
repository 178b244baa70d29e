"""The report of an adaptation: compare's report on the unseen cases, with what was done around it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..compare.report import Block, Code, Heading, Text, write_report
from ..compare.results import RunResult
from ..compare.sources import Source, read_fold, score_masks
from ..compare.study import mean_score
from ..compare.tables import Table
from ..datasets.annotated import read_completed
from ..files import nnunet_folder, read_json

NAMES = {"donor": "donor", "adapted": "adapted", "scratch": "from scratch"}


def write_adapt_report(out: Path, record: Mapping[str, Any], folds: Sequence[Path], final: Path,
                       advice: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.html and what belongs to it into `out`; return the mean Dice on unseen cases by name.

    Args:
        out: folder of the adaptation; predictions/donor holds the donor's masks.
        record: what was asked and done.
        folds: fold folders of the trainings, each scored on the cases that it did not see.
        final: fold folder of the adapted network.
        advice: what `suggest` said.
    """
    sources = [_named(read_fold(fold)) for fold in folds]
    if sources:
        sources.insert(0, _donor(sources[0], sources, out / "predictions" / "donor", final))
    folder = nnunet_folder("nnUNet_raw", sources[0].result.experiment) if sources else None
    completed = read_completed(folder).get("completed", {})
    dice = {name: mean.value for name in NAMES.values()
            if (runs := [_without(completed, s.result) for s in sources if s.result.method == name])
            and (mean := mean_score(runs))}
    before, after = _before(record, dice, completed), _after(record, advice, final)
    if sources:
        write_report(sources, out, title="Adaptation", before=before, after=after)
    return {"dice": dice}


def _named(source: Source) -> Source:
    name = NAMES["scratch" if source.result.is_scratch else "adapted"]
    return Source(result=msgspec.structs.replace(source.result, method=name), masks=source.masks, files=source.files)


def _without(completed: Mapping[str, Collection[str]], result: RunResult) -> RunResult:
    """Return a result without the labels that the donor completed: their masks are the donor's own predictions."""
    return msgspec.structs.replace(result, cases={
        case: {label: scored for label, scored in labels.items() if label not in completed.get(case, ())}
        for case, labels in result.cases.items()})


def _donor(example: Source, sources: Sequence[Source], masks: Path, final: Path) -> Source:
    """Return the donor's scores on the cases that the folds did not see."""
    assert example.files is not None
    plans = read_json(final.parent / "plans.json")
    scores = score_masks(masks, example.files, plans, tolerance_mm=example.result.tolerance_mm)
    seen = {case for source in sources for case in source.result.cases}
    result = msgspec.structs.replace(
        example.result, method=NAMES["donor"], trainer="", shots=0, seed=0, all=False, curve=[], seconds=[], stages=(),
        strength=None, strength_curve=[], trained_parameters=None, adapter_mib=None, against_donor={},
        peak_memory_mib=None, cases={case: labels for case, labels in scores.items() if case in seen})
    return Source(result=result, masks=masks, files=example.files)


def _before(record: Mapping[str, Any], dice: Mapping[str, float], completed: Mapping[str, Any]) -> list[Block]:
    asked = record["asked"]
    kept = (" Labels that the donor completed do not count in these means, because their masks are its own "
            "predictions: see \"Old and new labels\" below.") if any(completed.values()) else ""
    rows = [[name, f"{entry['seconds'] / 60:.1f}", "" if entry.get("gib") is None else f"{entry['gib']:.2g}"]
            for name, entry in record["done"].items()]
    total = sum(entry["seconds"] for entry in record["done"].values()) / 60
    return [
        Text(f"The network {Path(asked['model']).name} was adapted to {Path(asked['source']).name}. Mean Dice on cases "
             f"that the scored network was not trained on: {', '.join(f'{n} {d:.3f}' for n, d in dice.items())}. Each "
             "case was predicted by the fold that had not seen it. How much of the training is kept was chosen on the "
             f"same cases, so that the adapted network's number is a little too good.{kept}"),
        Table(name="time", title=f"Where the time went: {total:.0f} of {asked['budget_minutes']:g} minutes", records=[],
              head=["step", "minutes", "memory in GiB"], rows=rows)]


def _after(record: Mapping[str, Any], advice: Mapping[str, Any], final: Path) -> list[Block]:
    trainer, plans, configuration = final.parent.name.split("__")
    elsewhere = ["nnUNetv2_install_pretrained_model_from_zip model.zip",
                 f"nnUNetv2_predict -i IMAGES -o MASKS -d {final.parents[1].name} -c {configuration} "
                 f"-f {final.name.removeprefix('fold_')} -p {plans} -tr {trainer}"]
    commands = [command for entry in record["done"].values() for command in entry["commands"]]
    return [Heading("What the measurement said"), Code(advice["text"]), Heading("The commands"),
            Code("\n".join(commands)),
            Text("All run in the folder of this report, with nnUNet_raw, nnUNet_preprocessed and nnUNet_results set to "
                 "the folders of these names. The number of epochs and steps stands in the plans."),
            Heading("Predict on another machine"), Code("\n".join(elsewhere)),
            Text("This needs nnU-Net and nnUNet_results, and not this package. Files in IMAGES end in _0000 for the "
                 "first channel, such as P01_0000.nii.gz. Without a CUDA GPU, add -device cpu.")]
