"""Many cases for every reader, and the counts: python -m fuzz.campaign --seconds 1200 (in tests/; Linux)."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from random import Random

_SHOWN = 20
SHORT = {  # the attacks of the short form: each way to run code, fill memory, take for ever or write elsewhere, once
    "checkpoint, bytes": ("pickle in a zip: BUILD", "plain pickle: GLOBAL REDUCE", "old format: STACK_GLOBAL",
                          "code as network_weights, old format", "pickle in a zip: bytearray of 2 GB",
                          "storage of 2147483647"),
    "checkpoint, content": ("expanded as network_weights", "10**12 words as init_args"),
    "zip of a model, bytes": ("entry 'a/../../plans.json'", "many bombs", "one entry under many names", "link as folder"),
    "plans.json of a donor": ("subprocess.Popen as nonlin", "subprocess.call as network", "stages 10**6", "deep lists",
                              "name of a configuration with folders", "image_reader_writer os"),
    "adapter, content": ("deep objects",), "PEFT folder": ("a pattern that takes for ever", "rank 10**9"),
    "Dafne model, content": ("code as weights", "storage: GLOBAL REDUCE", "source: code before",
                             "source: '-' a million times", "settings: plans: features 10**9"),
    "inspect, Dafne model": ("code as init_model_function",), "target data set": ("dataset.json: surrogate",),
    "images of the target": ("imagesTr/case_000_0000.nii.gz: size that its end confirms",
                             "labelsTr/case_000.nii.gz: voxels nan"),
    "finished fold": ("reader os", "mask: 32767 voxels an axis"), "protocol": ("inline tables",),
    "groups.json": ("deep lists",)}


@dataclass
class Count:
    """What became of a reader's cases. skipped: damage that could not be written as a file of its kind."""

    reader: str
    cases: int = 0
    errors: int = 0
    correct: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, kind: str, detail: str, name: str) -> None:
        self.cases += kind != "skipped"
        self.skipped += kind == "skipped"
        self.errors += kind == "error"
        self.correct += kind == "read"
        if kind == "failure":
            self.failures.append(f"{name}: {detail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one random case for each reader, and the worst attacks")
    parser.add_argument("--seconds", type=float, default=60, help="attacks and random damage in turns, until then")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--case", help="one random case by its number, or one attack by its name: show what happens")
    parser.add_argument("--json", type=Path, help="write the counts here")
    options = parser.parse_args()
    counts = run(**{k: v for k, v in vars(options).items() if k != "json"})
    print(table(counts))
    if options.json:
        options.json.write_text(json.dumps([asdict(c) for c in counts]))
    sys.exit(any(c.failures for c in counts))


def run(*, short: bool = False, seconds: float = 60, seed: str = "0", only: str = "", case: str | None = None) -> list[Count]:
    """Warm up once, so that a case costs a fork and no imports; then one process a case."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    import torch  # after these are set

    torch.set_num_threads(1)
    from .isolation import run_case
    from .reader import Place
    from .readers import READERS
    from .samples import write_samples

    readers = {r.name: r for r in READERS if only in r.name}
    counts = {name: Count(name) for name in readers}
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        (work / "samples").mkdir()
        write_samples(work / "samples")
        place = Place(samples=work / "samples", case=work / "case", out=work / "out", canary=work / "CANARY")
        expected = {name: _warm(reader, place) for name, reader in readers.items()}
        gc.freeze()  # collecting in a child would copy every page
        deadline = time.monotonic() + seconds
        for name, attack, number in _cases(readers, place, short, case, seed):
            if time.monotonic() > deadline and not (short or case):
                break
            outcome = run_case(readers[name], work, attack, f"{seed}/{name}/{number}", expected[name])
            counts[name].add(outcome.kind, outcome.detail, attack or f"case {number}")
            if case:
                print(f"{outcome.kind}: {outcome.detail}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return list(counts.values())


def _cases(readers: dict, place, short: bool, case: str | None, seed: str) -> Iterator[tuple[str, str | None, str]]:
    """(reader, attack, "") or (reader, None, number) of each case, attacks in an order of the seed; damage has no end."""
    if case:
        yield from ((name, *((None, case) if case.isdigit() else (case, ""))) for name in readers)
        return
    attacks = {name: list(SHORT.get(name, ()) if short else reader.attacks(place)) for name, reader in readers.items()}
    for name in () if short else attacks:
        Random(f"{seed}/{name}").shuffle(attacks[name])
    for number in range(max(map(len, attacks.values()))) if short else count():
        for name in readers:  # readers take turns, so that all of them are read in whatever time there is
            if number < len(attacks[name]):
                yield name, attacks[name][number], ""
            if not short or number == 0:
                yield name, None, str(number)


def _warm(reader, place) -> str | None:
    """Read the undamaged sample, which every reader must; return what it holds, for formats with checksums."""
    for folder in (place.case, place.out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if reader.name.startswith("inspect"):  # it takes whatever one file there is
        return None
    shutil.copytree(place.samples, place.case, dirs_exist_ok=True)
    shutil.copytree(next((place.samples / "models").glob("*/nnUNetTrainer*")), place.case / "model")
    before = dict(os.environ)
    found = reader.read(place)
    os.environ.update(before)
    return found if reader.exact else None


def table(counts: list[Count]) -> str:
    """Return the counts in lines, failures below."""
    lines = [f"{'reader':<28}{'cases':>7}{'errors':>8}{'correct':>9}{'failures':>10}"]
    lines += [f"{c.reader:<28}{c.cases:>7}{c.errors:>8}{c.correct:>9}{len(c.failures):>10}" for c in counts]
    lines.append(f"{'all':<28}{sum(c.cases for c in counts):>7}{sum(c.errors for c in counts):>8}"
                 f"{sum(c.correct for c in counts):>9}{sum(len(c.failures) for c in counts):>10}")
    return "\n".join([*lines, *(f"\n{c.reader}, {failure}" for c in counts for failure in c.failures[:_SHOWN])])


if __name__ == "__main__":
    main()
