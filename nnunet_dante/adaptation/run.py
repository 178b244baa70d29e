"""From labelled images and a pretrained network to an adapted one, in one call that can be stopped anywhere.

What was done stands in OUT/adapt.json; the same call goes on from there. Every training and prediction is one of the
commands that a user would type, and the report shows them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from ..adapters.strength import kept_strength
from ..advise.suggest import suggest
from ..datasets.dataset import open_target
from ..errors import ConfigurationError, DanteError
from ..files import counted, read_json, write_text_atomically
from ..models.archive import without_records
from ..models.checkpoint import load_checkpoint_safely, save_atomically
from ..models.donor import Donor, open_donor
from ..models.installed import find_donor
from ..models.memory import memory_advice
from ..models.settings import read_dante_block, with_overrides
from ..training.launch import best_device
from ..training.strength import start_of
from ..transfers.complete import readable_channels
from ..types import PathLike
from .budget import Length, faster_rate, length_for, memory_in_words, minutes_for
from .data import put_data, write_folds
from .report import write_adapt_report
from .running import RECORD, claimed
from .steps import Steps, say

PLANS, SCRATCH = "nnUNetDantePlans", "nnUNetTrainerFromScratch"
_FINAL, _DONOR = "checkpoint_final.pth", "checkpoint_donor.pth"
_PROCESSES = 8  # at most; each imports torch before it reads an image
_MEASURE = "import sys; from nnunet_dante.adaptation.budget import measure; measure(*sys.argv[1:])"


@dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """What an adaptation achieved and wrote.

    dice: mean Dice on cases that the scored network was not trained on, of "adapted", "donor", and "from scratch" where
        it was asked for; nan where no case was left unseen.
    strength: how much of what was learned the adapted network keeps, from 0 (the donor) to 1.
    report: report.html. model: zip for stock nnU-Net. adapter: safetensors file, None for methods without one.
    dafne: `.model` file, None where Dafne cannot run the network.
    """

    dice: Mapping[str, float]
    strength: float
    report: Path
    model: Path
    adapter: Path | None
    dafne: Path | None

    def __str__(self) -> str:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in self.dice.items() if not math.isnan(value))
        kept = ("Training helped on none of the unseen cases, so this is the donor itself." if self.strength == 0 else
                f"It keeps {100 * self.strength:.0f} % of what was learned.")
        return (f"Dice on unseen cases: {scores or 'no case is left unseen'}. {kept}\n"
                f"Model: {self.model}\nReport: {self.report}")


def adapt(model: PathLike, source: PathLike, out: PathLike, *, name: str | None = None,
          configuration: str | None = None, trainer: str | None = None, budget_minutes: float = 60.0,
          baseline: bool = False, keep_labels: Sequence[str] = (), geometry: str = "donor",
          labels: Sequence[str] = (), channels: Sequence[str] = (), groups: PathLike | None = None,
          overrides: Mapping[str, Any] | None = None, device: str | None = None, memory_gib: float | None = None,
          trust: bool = False) -> AdaptResult:
    """Adapt a pretrained network to labelled images, and write a model, a report and the commands that did it.

    The way: data set, measurement and advice (`suggest`), transfer, one training per fold, one on all cases that keeps
    the mean of what the folds chose, scores on unseen cases against the donor, report. Where the folds choose to keep
    nothing, the result is the donor. Stopped at any moment, the same call goes on.

    Args:
        model: model folder, zip or checkpoint of the donor.
        source: labelled images, in nnU-Net's format or in any layout that `nnunet-dante dataset` recognises.
        out: folder of everything that is written.
        name: of the data set, such as Dataset123_Mine; default: the name of `source`.
        configuration: needed where the donor holds several.
        trainer: instead of the one that `suggest` advises.
        budget_minutes: time for all trainings together; the length of a training follows from a measured step.
        baseline: also train from scratch, for comparison; this takes half of the budget.
        keep_labels: labels of the donor to keep although nobody drew them, as in `transfer`.
        geometry: "donor" or "target", as in `transfer`.
        labels: what the values in the masks mean, such as "liver=1", where `source` is not in nnU-Net's format.
        channels: names of the channels in their order, such as CT, where `source` is not in nnU-Net's format. They
            are matched with the donor's by name.
        groups: file that says which cases are of one patient, as for `nnunet-dante shots --groups`.
        overrides: options of the trainings, such as {"lr": 0.01}.
        device: cuda, mps or cpu; default: the best there is.
        memory_gib: of the GPU; what would make a training fit it is then printed with the plan.
        trust: read a checkpoint that executes code; only if you know its author.

    Raises:
        ConfigurationError: `out` holds an adaptation that was asked for otherwise, or the budget is too short.
        DanteError: donor, data and options do not go together, or a command failed; names its log.

    Example:
        >>> print(adapt("MODEL", "Dataset123_Mine", "OUT", budget_minutes=30))  # doctest: +SKIP
    """
    asked = {"model": str(find_donor(model).resolve()), "source": str(Path(source).resolve()), "name": name,
             "configuration": configuration, "trainer": trainer, "budget_minutes": budget_minutes,
             "baseline": baseline, "keep_labels": list(keep_labels), "geometry": geometry, "labels": list(labels),
             "channels": list(channels), "groups": None if groups is None else str(groups),
             "overrides": dict(overrides or {}), "device": device or best_device()}
    work = _Work(Path(out).resolve(), asked, memory_gib=memory_gib, trust=trust)
    with claimed(work.out), work.steps.nnunet_folders():
        try:
            return work.do()
        except KeyboardInterrupt:
            say("Stopped. The same command goes on from here; nothing that is finished is done twice.")
            raise


class _Work:
    """One adaptation: its folder, what was asked, and what has been done."""

    def __init__(self, out: Path, asked: dict[str, Any], *, memory_gib: float | None = None, trust: bool):
        self.out, self.asked, self.memory_gib, self.trust = out, asked, memory_gib, trust
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / RECORD
        self.record: dict[str, Any] = {"format": 1, "asked": asked, "begun": [], "done": {}}
        if self.file.is_file():
            self.record = {"begun": []} | read_json(self.file)
        if not self.record["done"]:  # nothing is lost if it is asked for otherwise
            self.record["asked"] = asked
            self._save()
        usual = {name: option.default for name, option in signature(adapt).parameters.items()}
        before = usual | self.record["asked"]  # an earlier version had fewer options
        if changed := [key for key in asked if (before[key] or None) != (asked[key] or None)]:
            raise ConfigurationError(
                f"{out} holds an adaptation with {changed[0]} {before[changed[0]]!r}, and now {asked[changed[0]]!r} is "
                "asked for. Give another folder with -o, or delete this one.")
        self.steps = Steps(out, total=0, own_folders=False)

    def once(self, name: str, title: str, work: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        """Do a step unless it is done, and return its facts, which must be JSON values."""
        done = self.record["done"]
        if name not in done:
            self.steps.announce(title)
            began, before = time.monotonic(), len(self.steps.commands)
            facts = work() or {}
            done[name] = {**facts, "seconds": round(time.monotonic() - began, 1),
                          "commands": self.steps.commands[before:]}
            self._save()
        return done[name]

    def _save(self) -> None:
        write_text_atomically(json.dumps(self.record, indent=1) + "\n", self.file)

    def do(self) -> AdaptResult:
        """Go the whole way."""
        asked = self.asked
        donor = open_donor(asked["model"], configuration=asked["configuration"], trust=self.trust)
        self.configuration = donor.configuration
        self.steps.total = 8  # and the trainings, as soon as the folds are known
        self.dataset = self.once("data", "Read the data set", lambda: put_data(
            Path(asked["source"]), self.steps.folder("nnUNet_raw"), asked["name"], asked["labels"], asked["groups"],
            channels=asked["channels"], say=say))["dataset"]
        advice = self.once("advice", "Measure how the donor does on the cases", lambda: self._advise(donor))
        self.trainer = asked["trainer"] or advice["trainer"]
        self.trainers = (self.trainer, *((SCRATCH,) if asked["baseline"] else ()))
        self.dataset = self.once("transfer", f"Make the donor the start of {self.trainer}",
                                 lambda: self._transfer(advice["transfer"]))["dataset"]
        folds = self.once("folds", "Divide the cases into folds", lambda: write_folds(
            open_target(self.dataset), asked["groups"]))["folds"]
        trainings = [(trainer, fold) for trainer in self.trainers for fold in folds]
        self.steps.total += len(trainings) + 1
        cost = self.once("cost", "Measure a training step", lambda: self._measure(folds, len(trainings) + 1))
        self.length = Length(**{name: cost[name] for name in Length.__dataclass_fields__})
        self._set_length(cost)
        self._say_plan(cost, len(trainings) + 1, advice["reason"])
        for trainer, fold in trainings:
            self._train(trainer, fold)
        kept = [kept_strength(self._checkpoint(self.trainer, fold)) for fold in folds]
        if kept and not any(kept):
            final = folds[0]  # every fold chose to keep nothing, so each is the donor
        else:
            self._train(self.trainer, "all")
            final = "all"
        self._say_taken()
        self.once("donor", "Predict the cases with the donor as it is", lambda: self._predict_with_donor(final))
        dice = self.once("report", "Score the unseen cases and write the report", lambda: write_adapt_report(
            self.out, self.record, [(self._model(trainer) / f"fold_{fold}") for trainer, fold in trainings],
            self._model(self.trainer) / f"fold_{final}", advice))["dice"]
        files = self.once("files", "Write the model", lambda: self._write_model(final))
        paths = {key: name and self.out / name for key, name in files.items() if key in ("model", "adapter", "dafne")}
        strength = kept_strength(self._checkpoint(self.trainer, final))
        return AdaptResult(dice=dice, strength=strength, report=self.out / "report.html", **paths)

    def _model(self, trainer: str) -> Path:
        """Return the folder in which nnU-Net keeps the folds of a trainer."""
        return self.steps.folder("nnUNet_results", self.dataset, f"{trainer}__{PLANS}__{self.configuration}")

    def _checkpoint(self, trainer: str, fold: str) -> dict[str, Any]:
        return load_checkpoint_safely(self._model(trainer) / f"fold_{fold}" / _FINAL)

    def _advise(self, donor: Donor) -> dict[str, Any]:
        if self.asked["keep_labels"]:
            readable_channels(donor, open_target(self.dataset))
        found = suggest(self.asked["model"], self.dataset, configuration=self.configuration, trust=self.trust,
                        num_processes=min(_PROCESSES, os.cpu_count() or 1))
        say(str(found))
        return {"trainer": found.rule.trainer, "reason": found.rule.reason, "text": str(found),
                "transfer": next(c for c in found.commands if c.startswith("nnunet-dante transfer"))}

    def _transfer(self, command: str) -> dict[str, Any]:
        """Run the command that `suggest` printed; return the data set to train on, which may be a completed one."""
        options = [("--set", f"{key}={value}") for key, value in self.asked["overrides"].items()]
        options += [("--keep-labels", name) for name in self.asked["keep_labels"]]
        options += [("--geometry", self.asked["geometry"])] * (self.asked["geometry"] != "donor")
        program, *words = shlex.split(command)
        if not self.asked["keep_labels"]:  # else the trainings are those of another data set
            self._refuse_others()
        said = self.steps.run(program, *words, *(word for option in options for word in option))
        found = re.search(r"^Transfer to (.+), configuration ", said, re.MULTILINE)
        self.dataset = found[1] if found else self.dataset
        self._refuse_others()
        return {"dataset": self.dataset}

    def _refuse_others(self, fold: str = "*") -> None:
        """Refuse trainings that this adaptation did not begin: it would continue them, or score them as its own."""
        for trainer in self.trainers:
            for file in sorted(self._model(trainer).glob(f"fold_{fold}/checkpoint_*.pth")):
                if f"{trainer} {file.parent.name.removeprefix('fold_')}" not in self.record["begun"]:
                    raise ConfigurationError(
                        f"{file.parent} holds an earlier training, which this adaptation did not begin. Move "
                        f"{file.parents[1]} away, or give the data set another name with -n, and another folder "
                        "with -o.")

    def _measure(self, folds: list[str], trainings: int) -> dict[str, Any]:
        """Return what a training step costs, and the length of the trainings that follows from it."""
        began = time.monotonic()
        said = self.steps.python(_MEASURE, self.dataset, self.configuration, PLANS, self.trainer,
                                 *(folds[:1] or ["all"]), self.asked["device"], name="measure")
        # Libraries may print below it as they end.
        cost = json.loads(next(line for line in reversed(said.splitlines()) if line.startswith('{"step_seconds"')))
        times = {"step_seconds": cost["step_seconds"], "start_seconds": time.monotonic() - began}
        given = {name: value for name, value in self.asked["overrides"].items() if name in Length.__dataclass_fields__}
        if len(given) < len(Length.__dataclass_fields__):
            given = asdict(length_for(self.asked["budget_minutes"], trainings, **times)) | given
        length = Length(**given)
        minutes, usual = minutes_for(length, trainings, **times), cost.pop("lr")
        if "lr" not in self.asked["overrides"] and (rate := faster_rate(length)) > usual:
            cost["lr"] = rate
        planned = self._transfer_report()["memory_gib"]
        return cost | given | {"minutes": round(minutes, 1),
                               "gib": planned if cost["mib"] is None else round(cost["mib"] / 1024, 2)}

    def _transfer_report(self) -> dict[str, Any]:
        return read_json(self.steps.folder("nnUNet_preprocessed", self.dataset,
                                           f"{PLANS}_{self.configuration}_transfer.json"))

    def _set_length(self, cost: dict[str, Any]) -> None:
        """Write the length of the trainings, and what follows from it, into the plans; the user's own numbers stay."""
        file = self.steps.folder("nnUNet_preprocessed", self.dataset, f"{PLANS}.json")
        plans = read_json(file)
        block = read_dante_block(plans)
        plans["dante"] = with_overrides(block, block["overrides"] | asdict(self.length) | self.asked["overrides"]
                                        | ({"lr": cost["lr"]} if "lr" in cost else {}))
        write_text_atomically(json.dumps(plans, indent=2), file)

    def _say_plan(self, cost: dict[str, Any], trainings: int, reason: str) -> None:
        length, report = self.length, self._transfer_report()
        say(
            f"Plan: {counted(trainings, 'training')} with {self.trainer} of {counted(length.epochs, 'epoch')} with "
            f"{length.iterations} steps, so {trainings * length.epochs * length.iterations} steps of "
            f"{cost['step_seconds']:.2g} s on {self.asked['device']}: about {math.ceil(cost['minutes'])} min in "
            f"all{memory_in_words([cost])}. Reason: {reason}.")
        if "lr" in cost:
            say(f"The learning rate is {cost['lr']:.2g}, because the trainings are short; --set lr=0.001 "
                "takes another.")
        for warning in report["warnings"]:
            say(f"! {warning}")
        if self.memory_gib:
            say(memory_advice(report["memory_gib"], self.memory_gib, report["batch_size"]))

    def _say_taken(self) -> None:
        """Say what the trainings took, as the plan said before them."""
        trained = [self.record["done"][name] for name in self.record["begun"]]
        minutes = sum(entry["seconds"] for entry in trained) / 60
        say(f"Taken: {counted(len(trained), 'training')} with "
             f"{sum(entry['epochs'] for entry in trained) * self.length.iterations} steps, {minutes:.0f} min"
             f"{memory_in_words(trained)}.")

    def _train(self, trainer: str, fold: str) -> None:
        name = f"{trainer} {fold}"

        def train() -> dict[str, Any]:
            self._refuse_others(fold)
            going_on = any((self._model(trainer) / f"fold_{fold}").glob("checkpoint_*.pth"))
            if name not in self.record["begun"]:
                self.record["begun"].append(name)
                self._save()
            self.steps.run("nnunet-dante", "train", self.dataset, self.configuration, fold, "-p", PLANS, "-tr", trainer,
                           "-device", self.asked["device"], *(["--c"] if going_on else []), epochs=self.length.epochs)
            content = self._checkpoint(trainer, fold)
            mib = (content.get("dante") or {}).get("peak_memory_mib")
            return {"epochs": content["current_epoch"], "gib": None if mib is None else round(mib / 1024, 2)}

        where = "all cases" if fold == "all" else f"fold {fold}"
        self.once(name, f"Train {trainer.removeprefix('nnUNetTrainer')} on {where}", train)

    def _predict_with_donor(self, fold: str) -> None:
        """Predict all cases with the start weights of the training, as its checkpoint with strength 0 would."""
        folder, checkpoint = self._model(self.trainer) / f"fold_{fold}", self._checkpoint(self.trainer, fold)
        start = start_of(checkpoint, fold=folder, folder=lambda: self.steps.folder("nnUNet_preprocessed", self.dataset))
        save_atomically({**checkpoint, "network_weights": start}, folder / _DONOR)
        self.steps.run(
            "nnUNetv2_predict", "-i", self.steps.folder("nnUNet_raw", self.dataset, "imagesTr"), "-o",
            Path("predictions", "donor"), "-d", self.dataset, "-c", self.configuration, "-f", fold, "-p", PLANS, "-tr",
            self.trainer, "-chk", _DONOR, "-device", self.asked["device"], "-npp", 1, "-nps", 1,
            "--disable_progress_bar")
        (folder / _DONOR).unlink()

    def _write_model(self, fold: str) -> dict[str, Any]:
        """Write the model for stock nnU-Net, as an adapter and for Dafne; return the names of the files."""
        folder = self._model(self.trainer)
        self.steps.run("nnUNetv2_export_model_to_zip", "-d", self.dataset, "-o", "model.zip", "-c", self.configuration,
                       "-tr", self.trainer, "-p", PLANS, "-f", fold)
        without_records(self.out / "model.zip")
        names: dict[str, Any] = {"model": "model.zip", "adapter": None, "dafne": None, "fold": fold,
                                 "folder": os.path.relpath(folder, self.out)}
        if (adapter := folder / f"fold_{fold}" / "adapter.safetensors").is_file():
            shutil.copy(adapter, self.out)
            names["adapter"] = adapter.name
        dafne = f"{self.dataset.partition('_')[2]}.model"
        try:
            self.steps.run("nnunet-dante", "export", folder, "-o", dafne, "--fold", fold)
            names["dafne"] = dafne
        except DanteError as error:  # not every network runs in Dafne; the model is there
            say(f"No .model for Dafne: {str(error).splitlines()[-1]}")
        return names
