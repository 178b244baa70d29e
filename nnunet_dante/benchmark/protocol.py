"""What a protocol compares, read from a TOML file and checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from ..files import read_text
from ..types import PathLike

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ZERO_SHOT = "zero-shot"
_MAX_SIZE, _MAX_DOTS = 2**20, 100  # the parser's memory grows with the square of the dots in a key
Value = int | float | str | bool | list | dict


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One data set fine-tuned from one donor.

    dataset: id or name below nnUNet_raw, with the shots.json of `nnunet-dante shots`. donor: model folder, zip or
    checkpoint. donor_test: folder with imagesTr and labelsTr of the donor's own domain, to see what it forgets.
    simulated: the images are; every table and plot says so. invert: channels whose contrast is inverted (see transfer).
    """

    name: str
    dataset: int | str
    donor: str
    configuration: str | None = None
    donor_test: str | None = None
    simulated: bool = False
    invert: tuple[str, ...] = ()

    @property
    def plans_name(self) -> str:
        """Name of the plans that the transfer of this experiment writes."""
        return "nnUNetProtocol" + "".join(word.capitalize() for word in re.findall(r"[A-Za-z0-9]+", self.name))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method of the protocol: display name, trainer ("" for zero-shot) and overrides of the trainer's numbers."""

    name: str
    trainer: str = ""
    set: Mapping[str, Value] = field(default_factory=dict)


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


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Experiments x methods x shots x draws. shots, seeds: which of each data set's shots.json; () for all of them.

    training: overrides for every method (epochs, iterations, val_iterations, ...). tolerance_mm: of the surface Dice.
    mirroring: average over mirrored images at prediction. keep_checkpoints: else only logs, masks and results stay.
    """

    name: str
    experiments: tuple[Experiment, ...]
    methods: tuple[Entry, ...] = METHODS
    shots: tuple[int | str, ...] = ()
    seeds: tuple[int, ...] = ()
    training: Mapping[str, Value] = field(default_factory=dict)
    tolerance_mm: float = 1.0
    mirroring: bool = False
    keep_checkpoints: bool = False


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One cell of the protocol; fold None is zero-shot."""

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
    """Read a protocol file; relative donor paths are relative to it.

    Raises:
        ConfigurationError: no TOML, an unknown or missing key, a value of the wrong kind, or a name used twice.
    """
    path = Path(path)
    try:
        text = read_text(path)
        if len(text) > _MAX_SIZE or any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"more than {_MAX_SIZE} characters, or {_MAX_DOTS} dots in a line")
        content = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path} cannot be read as TOML ({error}).") from error
    experiments = tuple(_located(_entry(Experiment, _with_tuples(e, "invert"), path), path)
                        for e in _tables(content, "experiments", path))
    methods = tuple(_entry(Entry, m, path) for m in _tables(content, "methods", path)) or METHODS
    if all(m.name != ZERO_SHOT for m in methods):  # what fine-tuning is compared to, and what the donor could do before
        methods = (METHODS[0], *methods)
    others = {key: value for key, value in content.items() if key not in ("experiments", "methods")}
    protocol = _entry(Protocol, _with_tuples(others, "shots", "seeds") | {"experiments": experiments,
                                                                          "methods": methods}, path)
    _check(protocol, path)
    return protocol


def _with_tuples(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {k: tuple(v) if k in names and isinstance(v, list) else v for k, v in values.items()}


def _tables(content: Mapping[str, Any], key: str, path: Path) -> list[dict]:
    found = content.get(key, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise ConfigurationError(f"{path.name}: {key} must be written as [[{key}]] tables.")
    return found


def _entry(kind: type, values: Mapping[str, Any], path: Path) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if wrong := [*(k for k in values if k not in known), *(n for n in needed if n not in values)]:
        raise ConfigurationError(f"{path.name}: {wrong[0]!r} is unknown or missing in {kind.__name__.lower()} "
                                 f"{values.get('name', '')!r}; it knows {', '.join(known)} and needs "
                                 f"{', '.join(needed)}.")
    entry = kind(**values)
    for name, value in values.items():
        if not _fits(value, getattr(kind(**{n: values[n] for n in needed}), name), name):
            raise ConfigurationError(f"{path.name}: {name} of {kind.__name__.lower()} {values.get('name', '')!r} is "
                                     f"{value!r}, which is of the wrong kind.")
    return entry


def _fits(value: object, default: object, name: str) -> bool:
    """Whether a value is of the kind of its default; without one it is a text, and a data set may be a number."""
    if name == "dataset":
        return isinstance(value, int | str) and not isinstance(value, bool)
    if name in ("shots", "seeds"):
        return isinstance(value, tuple) and all((isinstance(v, int) and not isinstance(v, bool))
                                                or (name == "shots" and v == "all") for v in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and 0 < value < float("inf")
    return isinstance(value, str if default is None else Mapping if isinstance(default, Mapping) else type(default))


def _located(experiment: Experiment, path: Path) -> Experiment:
    places: dict[str, Any] = {key: str((path.parent / Path(value).expanduser()).resolve())
              for key, value in (("donor", experiment.donor), ("donor_test", experiment.donor_test)) if value}
    for key, place in places.items():
        if not Path(place).exists():
            raise ConfigurationError(f"{path.name}: {key} of experiment {experiment.name!r} is {place}, which does not "
                                     f"exist; a relative path starts at the folder of the protocol file.")
    return dataclasses.replace(experiment, **places)


def _check(protocol: Protocol, path: Path) -> None:
    if not protocol.experiments:
        raise ConfigurationError(f"{path.name} has no [[experiments]]; give at least one with name, dataset and donor.")
    for kind, names in (("experiments", [slug(e.name) for e in protocol.experiments]),
                        ("methods", [slug(m.name) for m in protocol.methods])):
        if twice := sorted({n for n in names if names.count(n) > 1 or not n}):
            raise ConfigurationError(f"{path.name}: two {kind} are named {twice[0]!r}, or one has no name.")
    if untrained := [m.name for m in protocol.methods if not m.trainer and m.name != ZERO_SHOT]:
        raise ConfigurationError(f"{path.name}: method {untrained[0]!r} names no trainer, such as nnUNetTrainerLoRA.")


def planned_runs(protocol: Protocol, tables: Mapping[str, Mapping[str, Any]]) -> Iterator[PlannedRun]:
    """Yield all runs: zero-shot first, then draw by draw, so that whatever is done when it stops is balanced.

    tables: experiment name -> content of its shots.json.
    """
    for experiment in protocol.experiments:
        yield PlannedRun(experiment=experiment, method=next(m for m in protocol.methods if m.name == ZERO_SHOT))
    folds = [(f["seed"], f["shots"], n, e, f) for n, e in enumerate(protocol.experiments)
             for f in tables[e.name]["folds"] if _wanted(protocol, f)]
    for seed, shots, _, experiment, fold in sorted(folds, key=lambda row: row[:3]):
        for method in protocol.methods:
            if method.trainer:
                yield PlannedRun(experiment=experiment, method=method, shots=shots, all=fold["all"], seed=seed,
                                 fold=fold["fold"])


def _wanted(protocol: Protocol, fold: Mapping[str, Any]) -> bool:
    shots = not protocol.shots or fold["shots"] in protocol.shots or (fold["all"] and "all" in protocol.shots)
    return shots and (not protocol.seeds or fold["seed"] in protocol.seeds)


def settings_digest(run: PlannedRun, protocol: Protocol, cases: Mapping[str, Any]) -> str:
    """Return a hash of everything that decides a run's result, paths left out; `cases`: train, val and test."""
    experiment = {k: v for k, v in dataclasses.asdict(run.experiment).items() if k not in ("donor", "donor_test")}
    content = {"experiment": experiment, "method": dataclasses.asdict(run.method), "cases": cases,
               "seed": run.seed, "training": dict(protocol.training), "tolerance_mm": protocol.tolerance_mm,
               "mirroring": protocol.mirroring}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
