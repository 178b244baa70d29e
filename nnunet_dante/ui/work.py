"""What other processes do for the page: a run, or answers to the questions of `ask`."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DanteError
from ..files import read_json
from .runs import RECORD, read_run, title_of


def donors(folders: Sequence[str]) -> list[dict[str, Any]]:
    """Return the models on this machine that can be donors, and the damaged ones with their problem."""
    from ..models.installed import installed_models

    found = [model for models in installed_models([Path(f) for f in folders]).values() for model in models]
    return [asdict(model) | {"name": title_of(model.donor) if Path(model.donor).is_dir() else model.name}
            for model in {model.donor: model for model in found}.values()]


def findings() -> list[dict[str, Any]]:
    """Return what `doctor` sees."""
    from ..command.doctor import diagnose

    return [asdict(check) for check in diagnose()]


def look(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `nnunet-dante dataset --dry-run` recognises in a folder, and what is wrong.

    options: as for `gather`.
    """
    from ..datasets.gather.examine import Facts
    from ..datasets.gather.gather import gather

    lines, cases = list[str](), list[Facts]()
    answer: dict[str, Any] = {"problem": "", "labels": [], "channels": []}
    with tempfile.TemporaryDirectory() as place:
        try:
            found = gather(folder, 1, "Look", output=place, dry_run=True, say=lines.append, show=cases.extend,
                           **options)
            answer["labels"] = [name for name in found.dataset_json["labels"] if name != "background"]
            answer["channels"] = list(found.dataset_json["channel_names"].values())
        except DanteError as error:
            answer["problem"] = str(error)
        lines = [line.replace(f"{place}/", "").replace("Dataset001_Look: ", "") for line in lines]
    if not cases and "whole numbers" in answer["problem"]:
        answer["values"] = _values(Path(folder), options)
    return answer | {"lines": lines, "cases": [
        {"name": f.case.name, "patient": f.case.patient, "masks": bool(f.case.masks), "voxels": f.volumes,
         "shape": list(f.header.size) if f.header else [], "spacing": list(f.header.spacing_mm) if f.header else [],
         "faults": f.faults, "warnings": f.warnings,
         "picture": base64.b64encode(f.picture).decode()} for f in cases]}


def _values(folder: Path, options: dict[str, Any]) -> list[int]:
    """Return the whole numbers in the first masks of a folder, for the user to name."""
    import numpy as np
    import SimpleITK

    from ..datasets.gather.found import INTEGERS, files_below
    from ..datasets.gather.pairs import find_pairs

    layout = find_pairs(list(files_below(folder)), masks=options.get("masks", ()), labels=[])
    masks = [case.masks[INTEGERS] for case in layout.cases if INTEGERS in case.masks][:5] if layout else []
    found: set[int] = set()
    for mask in masks:
        found |= {int(v) for v in np.unique(SimpleITK.GetArrayFromImage(mask.load())) if float(v).is_integer()}
    return sorted(found - {0})[:60]


def write_dataset(folder: str, place: str, options: dict[str, Any]) -> str:
    """Make a data set of a folder, and return where it lies; options as for `gather`."""
    from ..datasets.gather.gather import gather

    return str(gather(folder, 1, "Mine", output=place, say=len, **options).folder)


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Return the options of trainings in texts such as "lr=0.01", after their checks."""
    from ..models.overrides import parse_overrides as parse

    return parse(texts)


def adapt(out: str) -> None:
    """Do the adaptation that the record in `out` asks for, or go on with it."""
    from ..adaptation.run import adapt as run

    asked = dict(read_json(Path(out) / RECORD)["asked"])
    print(run(asked.pop("model"), asked.pop("source"), out, **asked))


def strengths(folds: Sequence[str]) -> list[dict[str, Any]]:
    """Return of each fold folder how much it keeps of what was learned, and Dice by strength."""
    from ..compare.training_log import training_facts
    from ..models.checkpoint import load_checkpoint_safely

    found = []
    for fold in folds:
        facts = training_facts(load_checkpoint_safely(Path(fold) / "checkpoint_final.pth"))
        found.append({"strength": facts["strength"], "curve": facts["strength_curve"]})
    return found


def keep(out: str, strength: float) -> None:
    """Put the network of a finished adaptation at another strength, and write its files again."""
    from ..adaptation.running import claimed
    from ..adaptation.steps import Steps
    from ..command.strength import set_strength

    run = read_run(Path(out))
    with claimed(run.folder):
        steps = Steps(run.folder, total=1, own_folders=False)
        with steps.nnunet_folders():
            set_strength(run.final, strength)
            for command in run.done["files"]["commands"]:
                program, *words = shlex.split(command)
                steps.run(program, *words)
        if (adapter := run.final / "adapter.safetensors").is_file():
            shutil.copy(adapter, run.folder)


def predict(out: str, images: str, masks: str) -> dict[str, Any]:
    """Segment the images in a folder with the network of an adaptation; cases to look at first come first."""
    from ..adaptation.predict import predict as run

    done = run(out, images, masks, overlays=True)
    return {"said": str(done), "cases": [[case, "" if value != value else f"{value:.2f}"] for case, value in
                                         done.confidence.items()],
            "pictures": [str(file) for file in sorted((done.masks / "overlays").glob("*.png"))]}


def report(folds: Sequence[str], out: str) -> str:
    """Compare fold folders, and return the path of the page that shows it."""
    from ..compare.report import compare

    return str(compare(folds, out).with_suffix(".html"))


def send_to_dafne(fold: str, folder: str) -> str:
    """Write the network of a fold folder into the models folder of a Dafne client; return what was written.

    Not that of model.zip: the masks of nnU-Net's validation, which lie in the fold folder, say how the training files
    are stored. From a zip, RAS would be assumed, and a network of other files would get turned images from Dafne.
    """
    if not Path(folder).is_dir():
        raise ConfigurationError(f"{folder} is no folder. Give the models folder of Dafne.")
    from ..dafne.export import export_model

    return str(export_model(Path(fold).parent, folder, fold=Path(fold).name.removeprefix("fold_")))


_ANSWERS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (
        donors, findings, look, write_dataset, parse_overrides, strengths, keep, predict, report, send_to_dafne)}


def answer_questions() -> None:
    """Read a question per line, [function, arguments], and write an answer per line, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            content = {"answer": _ANSWERS[name](*arguments)}
        except DanteError as error:
            content = {"error": str(error)}
        except Exception as error:  # of a library; the page shows it
            content = {"error": f"{name.replace('_', ' ')} failed. {type(error).__name__}: {error}"}
        answers.write(json.dumps(content) + "\n")
        answers.flush()


def main(*words: str) -> int:
    """Be the process: `adapt OUT`, whose output is its log; without words, answer questions."""
    if not words:
        answer_questions()
        return 0
    try:
        adapt(words[1])
    except (DanteError, OSError) as error:  # the page shows lines from "Error: " on
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
