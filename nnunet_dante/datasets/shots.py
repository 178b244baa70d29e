"""K-shot folds: nested training subsets of K cases, several draws of each, and one validation set for all of them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConfigurationError
from ..files import parse_json, read_json, read_text, write_text_atomically
from ..types import PathLike
from .annotated import foreground
from .checks import shorten
from .dataset import Target, open_target

ALL = "all"
_VALIDATION_SHARE = 0.2  # nnU-Net's own: one fold of its five
_REDRAWS = 200


class Fold(msgspec.Struct, frozen=True, kw_only=True):
    """One draw: `shots` training cases; `all` says that they are the whole pool."""

    fold: int
    shots: int
    all: bool
    seed: int
    train: tuple[str, ...]


class Shots(msgspec.Struct, frozen=True, kw_only=True):
    """All folds; val, test and pool share no case and no group (unless there is only one case: see `notes`).

    The content of shots.json is `msgspec.to_builtins(shots)`; `read_shots` reads it back.
    """

    format: int = 1
    dataset: str
    seed_count: int
    val: tuple[str, ...]
    test: tuple[str, ...]
    pool: tuple[str, ...]
    folds: tuple[Fold, ...]
    notes: tuple[str, ...] = ()

    def splits(self) -> list[dict[str, list[str]]]:
        """Return the content of splits_final.json; nnU-Net reads no other keys."""
        return [{"train": list(f.train), "val": list(self.val)} for f in self.folds]

    def __str__(self) -> str:
        lines = [f"{self.dataset}: validation on {len(self.val)} ({shorten(self.val)}), drawn from a pool of "
                 f"{len(self.pool)}, kept for the test {len(self.test)}", "fold  shots  seed  training cases"]
        lines += [f"{f.fold:>4}  {f.shots:>5}  {f.seed:>4}  {shorten(f.train)}{'  (the whole pool)' if f.all else ''}"
                  for f in self.folds]
        return "\n".join([*lines, *(f"Note: {note}." for note in self.notes)])


def draw_shots(cases: Iterable[str], shots: Sequence[int | str], *, dataset: str = "", seeds: int = 3,
               groups: Mapping[str, Sequence[str]] | None = None, test: Sequence[str] = (),
               val: int | None = None) -> Shots:
    """Draw the folds; equal arguments give equal folds on every machine and in every version of Python.

    The validation set is drawn by whole groups and depends only on cases, groups, test and val. For one seed the
    smaller training sets are contained in the larger ones, and no draw depends on which others are asked for.

    Args:
        cases: all cases of the data set.
        shots: numbers of training cases, or "all" for the whole pool.
        dataset: name that goes into the table.
        seeds: draws for each number of shots; equal draws are written once.
        groups: group (such as a patient) -> its cases; a case that is in none is a group of its own.
        test: cases that neither training nor validation may see.
        val: number of validation cases, met as nearly as whole groups allow; default: a fifth, at least one.

    Raises:
        ConfigurationError: a number is out of range, a case is unknown or named twice, or a group would be split.
    """
    names = sorted(set(cases))
    membership = _membership(names, groups or {})
    rest = _without_test(names, test, membership)
    held_out = _validation(rest, membership, val)
    pool = tuple(c for c in rest if c not in held_out) or rest
    notes = []
    if held_out == pool:
        notes.append(f"{pool[0]} is the only case, so validation is on the training case and says little about others")
    sizes = _sizes(shots, pool, f"{len(names)} cases, {len(held_out)} for validation, {len(test)} for the test")
    orders = _orders(pool, seeds)
    folds: list[Fold] = []
    for k in sizes:
        drawn: dict[frozenset[str], int] = {}
        for seed, order in enumerate(orders):
            drawn.setdefault(frozenset(order[:k]), seed)
        if len(drawn) < seeds:
            notes.append(f"{k} of a pool of {len(pool)}: {seeds} seeds give only {len(drawn)} different, each "
                         "written once")
        folds += [Fold(fold=len(folds) + i, shots=k, all=k == len(pool), seed=seed,
                       train=tuple(sorted(orders[seed][:k]))) for i, seed in enumerate(drawn.values())]
    return Shots(dataset=dataset, seed_count=seeds, val=held_out, test=tuple(sorted(set(test))), pool=pool,
                 folds=tuple(folds), notes=tuple(notes))


def write_shots(dataset: str | int, shots: Sequence[int | str], *, seeds: int = 3, groups: PathLike | None = None,
                test: PathLike | None = None, val: int | None = None, force: bool = False) -> Shots:
    """Draw folds of a raw data set and write them as splits_final.json, with shots.json, the table of them, beside it.

    Args:
        dataset: id or name below nnUNet_raw.
        shots, seeds, val: as in `draw_shots`.
        groups: JSON file {group: [cases]}, or CSV file with the columns case,group.
        test: text file with one case a line, or a JSON list.
        force: replace a splits_final.json that says something else.

    Raises:
        ConfigurationError: as `draw_shots`; a file cannot be read; another splits_final.json is there.
        TransferError: the data set is not found or not in order.
    """
    target = open_target(dataset)
    drawn = draw_shots(target.labelled, shots, dataset=target.name, seeds=seeds, val=val,
                       groups=read_groups(groups) if groups else {}, test=read_cases(test) if test else ())
    drawn = msgspec.structs.replace(drawn, notes=(*drawn.notes, *_undrawn(drawn, target)))
    path = target.preprocessed / "splits_final.json"
    if path.is_file() and not force and _content(path) != drawn.splits():
        raise ConfigurationError(f"{path} exists and holds other folds; nnU-Net writes one when the first training "
                                 "starts. Networks that were trained with it were trained on its cases. To replace it "
                                 "nevertheless, give --force (Python: force=True), or move it away.")
    write_text_atomically(json.dumps(drawn.splits(), indent=2), path)
    write_text_atomically(json.dumps(msgspec.to_builtins(drawn), indent=2), path.with_name("shots.json"))
    return drawn


def _undrawn(shots: Shots, target: Target) -> Iterator[str]:
    """Yield a note for each label that was drawn in no case of a fold's training, or of the validation."""
    if left_out := len(target.cases) - len(target.labelled):
        yield f"{left_out} cases are left out: no label was drawn in them, or they are rehearsed for a donor"
    for label in foreground(target.dataset_json):
        without = {case for case, labels in target.undrawn.items() if label in labels}
        if set(shots.val) <= without:
            yield f"{label} was drawn in no validation case, so it cannot be scored"
        if folds := [str(fold.fold) for fold in shots.folds if set(fold.train) <= without]:
            yield f"{label} was drawn in no training case of the folds {', '.join(folds)}"


def read_shots(path: PathLike) -> Shots:
    """Read a shots.json.

    Raises:
        ConfigurationError: the file is missing, damaged or of a newer format.
    """
    try:
        found = msgspec.convert(read_json(path), Shots)
    except (OSError, ValueError) as error:  # msgspec.ValidationError is a ValueError
        raise ConfigurationError(f"{path} is no table of `nnunet-dante shots` ({error}). Run that command again, or "
                                 "delete the file.") from error
    if found.format != 1:
        raise ConfigurationError(f"{path} has format {found.format}; this version reads format 1. Install a newer "
                                 "nnunet-dante.")
    return found


def read_groups(path: PathLike) -> dict[str, list[str]]:
    """Return group -> cases from a JSON file {group: [cases]} or a CSV file case,group; a header is skipped.

    Raises:
        ConfigurationError: the file is missing or of another form.
    """
    path, groups = Path(path), {}
    text = _text(path, "--groups")
    if path.suffix.lower() == ".json":
        groups = _json(text)
        if isinstance(groups, dict) and all(isinstance(v, list) for v in groups.values()):
            return {str(group): list(map(str, cases)) for group, cases in groups.items()}
        raise ConfigurationError(f'--groups {path.name} must hold {{"group": ["case", ...], ...}}.')
    for row in _rows(text, path):
        cells = [cell.strip() for cell in row]
        if any(cells) and (len(cells) != 2 or not all(cells)):
            raise ConfigurationError(f"--groups {path.name} holds the line {','.join(row)!r}; each must be case,group. "
                                     "(A JSON file must be named .json.)")
        if any(cells) and [c.lower() for c in cells] != ["case", "group"]:
            groups.setdefault(cells[1], []).append(cells[0])
    return groups


def read_cases(path: PathLike) -> list[str]:
    """Return the cases of a text file with one case per line, or of a JSON list.

    Raises:
        ConfigurationError: the file is missing or holds other JSON.
    """
    path = Path(path)
    text = _text(path, "--test")
    if path.suffix.lower() != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    cases = _json(text)
    if isinstance(cases, list) and all(isinstance(c, str) for c in cases):
        return cases
    raise ConfigurationError(f'--test {path.name} must hold a list of cases: ["case", ...].')


def _rows(text: str, path: Path) -> list[list[str]]:
    try:
        return list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise ConfigurationError(f"--groups {path.name} is no CSV file ({error}); each line must be "
                                 "case,group.") from error


def _text(path: Path, option: str) -> str:
    try:
        return read_text(path, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{option}: {path} cannot be read ({error}); give a text, CSV or JSON "
                                 "file.") from error


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None


def _membership(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, str]:
    membership: dict[str, str] = {}
    for group, members in groups.items():
        for case in members:
            if membership.setdefault(case, f"group {group}") != f"group {group}":
                raise ConfigurationError(f"--groups: case {case} is in {membership[case]} and in group {group}; a case "
                                         "has one group.")
    _check_known(membership, names, "--groups")
    return {case: membership.get(case, f"case {case}") for case in names}


def _without_test(names: Sequence[str], test: Sequence[str], membership: Mapping[str, str]) -> tuple[str, ...]:
    _check_known(test, names, "--test")
    reserved = {membership[case]: case for case in test}
    rest = tuple(case for case in names if case not in set(test))
    if split := next((case for case in rest if membership[case] in reserved), None):
        raise ConfigurationError(f"--test names {reserved[membership[split]]} but not {split}, which is of the same "
                                 f"{membership[split]}. Add it to the test cases, or take both out.")
    if not rest:
        raise ConfigurationError(f"--test names all {len(names)} cases; at least one must be left to train on.")
    return rest


def _validation(rest: tuple[str, ...], membership: Mapping[str, str], wanted: int | None) -> tuple[str, ...]:
    if len(rest) == 1:
        return rest
    if wanted is not None and not 1 <= wanted < len(rest):
        raise ConfigurationError(f"--val is {wanted}; of {len(rest)} cases outside the test, 1 to {len(rest) - 1} can "
                                 "validate.")
    groups: dict[str, list[str]] = {}
    for case in rest:
        groups.setdefault(membership[case], []).append(case)
    if len(groups) == 1:
        raise ConfigurationError(f"--groups: all {len(rest)} cases outside the test are of one {next(iter(groups))}, "
                                 "so none can validate. Leave out --groups if a score on the same patient is enough.")
    number, chosen = wanted or max(1, round(_VALIDATION_SHARE * len(rest))), list[str]()
    for group in _shuffled(groups, "validation"):
        if len(chosen) + len(groups[group]) <= number:
            chosen += groups[group]
    return tuple(sorted(chosen or min((len(g), g) for g in groups.values())[1]))


def _sizes(shots: Sequence[int | str], pool: Sequence[str], origin: str) -> list[int]:
    for k in shots:
        if k != ALL and not (isinstance(k, int) and 1 <= k <= len(pool)):
            raise ConfigurationError(f"-k {k} is not possible: the pool has {len(pool)} cases ({origin}). Give 1 to "
                                     f"{len(pool)}, or the word {ALL}.")
    if not shots:
        raise ConfigurationError(f"-k names no number of shots; give for instance 1,2,4,{ALL}.")
    return sorted({len(pool) if k == ALL else int(k) for k in shots})


def _orders(pool: Sequence[str], seeds: int) -> list[list[str]]:
    """One order of the pool for each seed, drawn anew while a beginning of it holds the same cases as another's."""
    if seeds < 1:
        raise ConfigurationError(f"--seeds is {seeds}; at least one draw is needed.")
    orders: list[list[str]] = []
    for seed in range(seeds):
        redraws = (_shuffled(pool, f"{seed}.{attempt}") for attempt in range(_REDRAWS))
        orders.append(min(redraws, key=lambda order: sum(_equal_draws(order, other) for other in orders)))
    return orders


def _equal_draws(order: Sequence[str], other: Sequence[str]) -> int:
    """Count the K below the size of the pool for which both orders begin with the same K cases."""
    place = {case: i for i, case in enumerate(other)}
    furthest = accumulate((place[case] for case in order), max)
    return sum(reached == i for i, reached in enumerate(furthest)) - 1


def _shuffled(names: Iterable[str], seed: str) -> list[str]:
    # Ordered by hash: the shuffles of random and numpy may change with their versions, and folds must not.
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}|{name}".encode()).digest())


def _check_known(given: Iterable[str], names: Sequence[str], option: str) -> None:
    if unknown := sorted(set(given) - set(names)):
        raise ConfigurationError(f"{option} names {shorten(unknown)}, which imagesTr does not hold; a case is named "
                                 f"without channel and ending, such as {names[0]}.")


def _content(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None  # not what we would write either, so it is not replaced unasked
