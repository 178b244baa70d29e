"""What a protocol compares, read from a TOML file and checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from ..datasets.shots import Fold, Shots
from ..errors import ConfigurationError
from ..files import read_text
from ..models.installed import find_donor
from ..types import PathLike

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ZERO_SHOT = "zero-shot"
_MAX_SIZE, _MAX_DOTS = 2**20, 100  # the parser's memory grows with the square of the dots in a key
Value = int | float | str | bool | list | dict
Tolerance = Annotated[int, Meta(gt=0)] | Annotated[float, Meta(gt=0, lt=1e6)]


class Experiment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One data set, fine-tuned from one donor.

    name: stands in tables, plots and file names.
    dataset: id or name below nnUNet_raw, with the shots.json that `nnunet-dante shots` wrote.
    donor: model folder, zip or checkpoint.
    configuration: needed where the donor holds several.
    donor_test: folder with imagesTr and labelsTr of the donor's own domain, to measure what fine-tuning forgets. Masks
        have the donor's numbering.
    simulated: the images are simulated; every table and plot says so.
    invert: channels whose bright and dark are exchanged against the donor's images, as in `nnunet-dante transfer`.
    geometry: whose spacing and patch size, donor's or target's, as in `nnunet-dante transfer`.
    """

    name: str
    dataset: int | str
    donor: str
    configuration: str | None = None
    donor_test: str | None = None
    simulated: bool = False
    invert: tuple[str, ...] = ()
    geometry: Literal["donor", "target"] = "donor"

    @property
    def plans_name(self) -> str:
        """Name of the plans that the transfer of this experiment writes."""
        return "nnUNetProtocol" + "".join(word.capitalize() for word in re.findall(r"[A-Za-z0-9]+", self.name))


class Entry(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One method of the protocol.

    name: stands in tables, plots and file names.
    trainer: class name, such as nnUNetTrainerLoRA; "" for zero-shot, which trains nothing.
    set: options of the trainer's method that differ from their defaults.
    """

    name: str
    trainer: str = ""
    set: dict[str, Value] = {}


METHODS = (
    Entry(name=ZERO_SHOT), Entry(name="scratch", trainer="nnUNetTrainerFromScratch"),
    Entry(name="full", trainer="nnUNetTrainerFineTune"), Entry(name="decoder", trainer="nnUNetTrainerDecoderOnly"),
    Entry(name="head", trainer="nnUNetTrainerHeadOnly"), Entry(name="norm", trainer="nnUNetTrainerNormAffine"),
    Entry(name="BitFit", trainer="nnUNetTrainerBitFit"), Entry(name="LoRA", trainer="nnUNetTrainerLoRA"),
    Entry(name="LoRA decoder", trainer="nnUNetTrainerLoRADecoder"),
    Entry(name="GU", trainer="nnUNetTrainerGradualUnfreezing"),
    Entry(name="GU Dante", trainer="nnUNetTrainerGradualUnfreezingDante"),
    Entry(name="LP-FT", trainer="nnUNetTrainerLPFT"), Entry(name="DoRA", trainer="nnUNetTrainerDoRA"))
"""What a protocol without [[methods]] compares."""


class Protocol(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every experiment with every method, number of training cases and draw.

    name: stands in messages.
    experiments, methods: what is compared.
    shots, seeds: which numbers of training cases and which draws of each shots.json; empty for all of them.
    training: overrides for every method (epochs, iterations, val_iterations, ...).
    tolerance_mm: tolerance of the surface Dice, in mm.
    mirroring: whether prediction averages over mirrored images.
    keep_checkpoints: whether checkpoints stay; otherwise only logs, masks and results do.
    """

    name: str
    experiments: tuple[Experiment, ...] = ()
    methods: tuple[Entry, ...] = METHODS
    shots: tuple[int | Literal["all"], ...] = ()
    seeds: tuple[int, ...] = ()
    training: dict[str, Value] = {}
    tolerance_mm: Tolerance = 1.0
    mirroring: bool = False
    keep_checkpoints: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of the protocol.

    shots: number of training cases. all: these are all there are. seed: of the draw. fold: None for zero-shot.
    """

    experiment: Experiment
    method: Entry
    shots: int = 0
    all: bool = False
    seed: int = 0
    fold: int | None = None

    @property
    def id(self) -> str:
        """File name of the run's result, without suffix; unique in a protocol."""
        return run_id(self.experiment.name, self.method.name, self.shots, self.seed)


def run_id(experiment: str, method: str, shots: int, seed: int) -> str:
    """Return `PlannedRun.id` of these names and numbers."""
    return "__".join([slug(experiment), slug(method), f"k{shots:03d}", f"s{seed}"])


def slug(name: str) -> str:
    """Return a name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def read_protocol(path: PathLike) -> Protocol:
    """Read a protocol file; relative donor paths start at its folder.

    Raises:
        ConfigurationError: no TOML, an unknown or missing key, a value of the wrong kind, or a name used twice.
    """
    path = Path(path)
    try:
        text = read_text(path)
        if len(text) > _MAX_SIZE or any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"more than {_MAX_SIZE} characters, or {_MAX_DOTS} dots in a line")
        content = tomllib.loads(text)
        protocol = msgspec.convert(content, Protocol)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path.name}: {error}, in {_value(str(error), content)}. {_allowed()}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML ({error}).") from error
    methods = protocol.methods or METHODS
    if all(m.name != ZERO_SHOT for m in methods):  # what fine-tuning is compared to, and what the donor could do before
        methods = (METHODS[0], *methods)
    _check(protocol, path)
    return msgspec.structs.replace(protocol, methods=methods,
                                   experiments=tuple(_located(e, path) for e in protocol.experiments))


def _value(message: str, content: Any) -> str:
    """Return the value that a message of msgspec is about, such as "Expected `int` - at `$.experiments[0].name`"."""
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", message.partition("`$")[2]):
        content = content[key or int(index)]
    return f"{content!r:.80}"


def _allowed() -> str:
    """Return a sentence for each kind of table that names its keys."""
    kinds = {"The protocol": Protocol, "An [[experiments]] table": Experiment, "A [[methods]] table": Entry}
    return " ".join(f"{name} may have {', '.join(kind.__struct_fields__)}." for name, kind in kinds.items())


def _located(experiment: Experiment, path: Path) -> Experiment:
    """Return the experiment with absolute paths, which must exist."""
    places = {}
    for key in ("donor", "donor_test"):
        if value := getattr(experiment, key):
            place = (path.parent / find_donor(value)).resolve()
            if not place.exists():
                raise ConfigurationError(f"{path.name}: {key} of experiment {experiment.name!r} is {place}, which does "
                                         "not exist; a relative path starts at the folder of the protocol file.")
            places[key] = str(place)
    return msgspec.structs.replace(experiment, **places)


def _check(protocol: Protocol, path: Path) -> None:
    if not protocol.experiments:
        raise ConfigurationError(f"{path.name} has no [[experiments]]; give at least one with name, dataset and donor.")
    for kind, names in (("experiments", [slug(e.name) for e in protocol.experiments]),
                        ("methods", [slug(m.name) for m in protocol.methods])):
        if twice := sorted({n for n in names if names.count(n) > 1 or not n}):
            raise ConfigurationError(f"{path.name}: two {kind} are named {twice[0]!r}, or one has no name.")
    if untrained := [m.name for m in protocol.methods if not m.trainer and m.name != ZERO_SHOT]:
        raise ConfigurationError(f"{path.name}: method {untrained[0]!r} names no trainer, such as nnUNetTrainerLoRA.")


def planned_runs(protocol: Protocol, shots: Mapping[str, Shots]) -> Iterator[PlannedRun]:
    """Yield all runs: zero-shot first, then draw by draw, so that whatever is done when it stops is balanced.

    shots: experiment name -> its shots.json.
    """
    for experiment in protocol.experiments:
        yield PlannedRun(experiment=experiment, method=next(m for m in protocol.methods if m.name == ZERO_SHOT))
    folds = [(f.seed, f.shots, n, e, f) for n, e in enumerate(protocol.experiments)
             for f in shots[e.name].folds if _wanted(protocol, f)]
    for seed, number, _, experiment, fold in sorted(folds, key=lambda row: row[:3]):
        for method in protocol.methods:
            if method.trainer:
                yield PlannedRun(experiment=experiment, method=method, shots=number, all=fold.all, seed=seed,
                                 fold=fold.fold)


def _wanted(protocol: Protocol, fold: Fold) -> bool:
    shots = not protocol.shots or fold.shots in protocol.shots or (fold.all and "all" in protocol.shots)
    return shots and (not protocol.seeds or fold.seed in protocol.seeds)


def settings_digest(run: PlannedRun, protocol: Protocol, cases: Mapping[str, Any]) -> str:
    """Return a hash of everything that decides a run's result, paths left out; `cases`: train, val and test.

    A run that keeps all that was learned, at the donor's geometry, has the hash that 0.1.0 wrote, which knew no other.
    """
    def without(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key not in names}

    strength = {**protocol.training, **run.method.set}.get("strength", "auto")
    content = {"experiment": without(msgspec.structs.asdict(run.experiment), "donor", "donor_test",
                                     *(["geometry"] if run.experiment.geometry == "donor" else [])),
               "method": msgspec.structs.asdict(run.method) | {"set": without(run.method.set, "strength")},
               "cases": cases, "seed": run.seed, "training": without(protocol.training, "strength"),
               "tolerance_mm": protocol.tolerance_mm, "mirroring": protocol.mirroring,
               **({} if strength == 1 else {"strength": strength})}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
