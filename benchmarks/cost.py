"""Time and memory of a training step, by method, as ratios to full fine-tuning of the same network.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--dims 2 3] [--patches 128 32] [--rounds 2] [--only NAME ...]
    python benchmarks/cost.py --device cuda --amp [--compile]

A step is forward, mean square of all outputs, backward, clipping and AdamW, as in a training here. Time: all contenders
take turns in one process, and full fine-tuning has another turn after every third; a ratio is the median over rounds of
(contender / mean of the turns of full fine-tuning right before and after it). On a CPU it is the processor time of the
process, which others on the machine disturb least; that equals wall time with one thread only. Memory: the peak of a
step with the optimiser's state in place, in a process of its own, above what was there before the network was made:
resident memory, or CUDA's allocator.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from reference_layers import add_branches, add_second_convolutions
from torch import Tensor, nn

from nnunet_dante import methods
from nnunet_dante.methods import FineTune, GradualUnfreezing, LoRA
from nnunet_dante.methods.groups import stages
from nnunet_dante.models.memory import PeakMemory
from nnunet_dante.peft.recompute import recompute

FULL, FORWARD = "full fine-tuning", "forward alone"
METHODS: dict[str, Any] = {
    FULL: FineTune(), **{name: getattr(methods, name)() for name in (
        "LoRA", "DoRA", "DecoderOnly", "ConvAdapter", "NormAffine", "BitFit", "AdaptFormer", "SpatialAdapter",
        "HeadOnly")},
    "LoRA, flat": LoRA(factorisation="flat"), "LoRA, decoder": LoRA(encoder=False),
    f"{FULL}, recompute": FineTune(recompute=True), "LoRA, recompute": LoRA(recompute=True),
    "LoRA, decoder, recompute": LoRA(encoder=False, recompute=True), FORWARD: FineTune()}
REFERENCES: dict[str, Callable[[nn.Module], None]] = {
    "two convolutions (Dante's layer)": add_second_convolutions, "parallel branch (PEFT's layer)": add_branches}
SCHEDULES = {"GU": GradualUnfreezing()}


def unet(dim: int, features: list[int], residual: bool = False) -> nn.Module:
    n = len(features)
    kind: Any = ResidualEncoderUNet if residual else PlainConvUNet
    blocks, in_decoder = ([1, 3, 4, *[6] * n][:n], [1] * (n - 1)) if residual else (2, 2)
    return kind(1, n, features, getattr(nn, f"Conv{dim}d"), 3, [1] + [2] * (n - 1), blocks, 3, in_decoder, True,
                getattr(nn, f"InstanceNorm{dim}d"), {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU,
                {"inplace": True}, deep_supervision=True)


def names(base: nn.Module, only: list[str]) -> list[str]:
    """The contenders; a schedule's last stage trains everything and is full fine-tuning."""
    stages = [f"{name}, stage {number}" for name, method in SCHEDULES.items()
              for number in range(1, len(method.plan(base).schedule.stages))]
    return [name for name in (*METHODS, *REFERENCES, *stages) if not only or name in (FULL, *only)]


class Contender:
    def __init__(self, name: str, base: nn.Module, *, device: str, amp: bool, compiled: bool):
        self.network, self.device, self.amp = copy.deepcopy(base).to(device), device, amp
        self.forward_only = name == FORWARD
        if name in REFERENCES:
            REFERENCES[name](self.network)
            groups = [{"params": [p for p in self.network.parameters() if p.requires_grad]}]
        else:
            kind, _, number = name.partition(", stage ")
            method = (METHODS | SCHEDULES)[kind]
            method.adapt(self.network)
            plan = method.plan(self.network)
            plan.restrict(self.network)
            if method.recompute:
                recompute(stages(self.network))
            plan.set_stage(plan.schedule.stages[int(number or 1) - 1].first_epoch)
            groups = plan.optimiser_groups()
        self.trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)
        self.scaler = torch.amp.GradScaler(device, enabled=amp and device == "cuda")
        # From the ninth network on torch would run the others uncompiled; fullgraph turns that into an error.
        torch._dynamo.config.cache_size_limit = 1000
        self.run = torch.compile(self.network, fullgraph=True) if compiled else self.network

    def step(self, x: Tensor) -> None:
        with torch.autocast(self.device, enabled=self.amp), torch.set_grad_enabled(not self.forward_only):
            outputs = self.run(x)
        if self.forward_only:
            return
        self.optimizer.zero_grad()
        self.scaler.scale(sum(y.float().square().mean() for y in outputs)).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def timed(self, x: Tensor) -> float:
        clock = perf_counter if self.device == "cuda" else process_time
        start = clock()
        self.step(x)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def peak_mib(name: str, dim: int, network: dict[str, Any], size: tuple[int, ...],
             options: dict[str, Any]) -> float | None:
    """Run in a process of its own."""
    if sys.platform == "linux":  # else freed activations stay in glibc's heap, some of them, and count
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: 1 MiB, and no adapting of it
    peak = PeakMemory(torch.device(options["device"]))
    contender = Contender(name, unet(dim, **network), **options)
    x = torch.rand(size, device=options["device"])
    contender.step(x if options["compiled"] else x[(..., *[slice(16)] * dim)])  # compiled for one size only
    contender.step(x)
    return peak.peak_mib()


def peaks_mib(contenders: list[str], *arguments: Any) -> dict[str, float | None]:
    """Return the peaks; forked, so call it before this process uses a GPU."""
    # What libraries import and allocate at the first step: once, and not in every child's time and memory.
    peak_mib(FULL, 3, {"features": [8, 8]}, (1, 1, 16, 16, 16), {"device": "cpu", "amp": False, "compiled": False})
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return {name: pool.apply(peak_mib, (name, *arguments)) for name in contenders}


def times_s(racing: dict[str, Contender], x: Tensor, rounds: int) -> Iterator[dict[str, list[tuple[float, float]]]]:
    """Yield, after each round, contender -> (its time, that of full fine-tuning beside it) in seconds of each round."""
    full, order = racing[FULL], [name for name in racing if name != FULL]
    for contender in racing.values() if full.device == "cuda" or full.run is not full.network else [full]:
        contender.step(x)  # warm up: libraries choose their kernels, torch.compile compiles
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in racing}
    before = full.timed(x)
    for number in range(rounds):
        for first in range(0, len(order), 3):
            own = {name: racing[name].timed(x) for name in order[first:first + 3]}
            after = full.timed(x)
            for name, seconds in own.items():
                found[name].append((seconds, (before + after) / 2))
            found[FULL].append((after, after))
            before = after
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        yield found


def rows(base: nn.Module, racing: dict[str, Contender], memory: dict[str, float | None],
         found: dict[str, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    table = [{"name": name, "trained_parameters": racing[name].trained,
              "step_s": round(statistics.median(own for own, _ in pairs), 4),
              "time_ratio": round(statistics.median(own / full for own, full in pairs), 3),
              "time_ratios": [round(own / full, 3) for own, full in pairs] if name != FULL else [],
              "peak_mib": (peak := memory[name]) and round(peak),
              "memory_ratio": peak and round(peak / (memory[FULL] or 1), 3)}
             for name, pairs in found.items()]
    return table + [mean_over(name, base, table) for name in SCHEDULES if f"{name}, stage 1" in racing]


def mean_over(name: str, base: nn.Module, table: list[dict]) -> dict:
    """Return the row of a whole training: mean time by the stages' shares of the epochs, largest memory."""
    method, by_name = SCHEDULES[name], {row["name"]: row for row in table}
    starts = [stage.first_epoch for stage in method.plan(base).schedule.stages]
    stages = [by_name.get(f"{name}, stage {n}", by_name[FULL]) for n in range(1, len(starts) + 1)]
    shares = [(end - start) / method.epochs for start, end in zip(starts, [*starts[1:], method.epochs])]
    return {"name": f"{name}, whole training",
            "time_ratio": round(sum(s * stage["time_ratio"] for s, stage in zip(shares, stages)), 3),
            "memory_ratio": max((stage["memory_ratio"] or 0 for stage in stages), default=None)}


def markdown(results: dict[str, list[dict]]) -> str:
    dims = list(results)
    lines = [f"| method | time {' / '.join(dims)} | memory {' / '.join(dims)} |", "|---|---|---|"]
    for group in zip(*results.values()):
        cells = [" / ".join(f"{row[key]:.2f}" if row[key] else "?" for row in group)
                 for key in ("time_ratio", "memory_ratio")]
        lines.append(f"| {group[0]['name']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    longest = max(map(len, results.values()))
    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 0.3 * longest + 1), squeeze=False,
                                   sharey=True, layout="constrained")
    for axis, (dim, table) in zip(axes[0], results.items()):
        places = range(len(table))
        axis.barh([p - 0.2 for p in places], [r["time_ratio"] for r in table], 0.4, color="#4477aa", label="time")
        axis.barh([p + 0.2 for p in places], [r["memory_ratio"] or 0 for r in table], 0.4, color="#ccbb44",
                  label="memory")
        axis.set_yticks(places, [r["name"] for r in table])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=dim, xlabel="relative to full fine-tuning")
    axes[0, 0].invert_yaxis()
    axes[0, -1].legend(loc="lower right")
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=[3, 2])
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--patches", type=int, nargs=2, default=[128, 32], metavar=("2D", "3D"))
    parser.add_argument("--batches", type=int, nargs=2, default=[8, 2], metavar=("2D", "3D"))
    parser.add_argument("--residual", action="store_true", help="a ResidualEncoderUNet with the blocks of nnU-Net's L")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders besides full fine-tuning")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--amp", action="store_true", help="autocast as nnU-Net's on a GPU; bfloat16 on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    options = {"device": given.device, "amp": given.amp, "compiled": given.compile}
    sizes = {dim: (given.batches[dim - 2], 1, *[given.patches[dim - 2]] * dim) for dim in given.dims}
    network = {"features": given.features, "residual": given.residual}
    memory = {dim: peaks_mib(names(unet(dim, **network), given.only), dim, network, size, options)
              for dim, size in sizes.items()}
    print(memory, file=sys.stderr, flush=True)
    machine = torch.cuda.get_device_name() if given.device == "cuda" else \
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    stem = "_".join(["cost", given.device, *["amp"] * given.amp, *["compile"] * given.compile])
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    facts = {"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__, **options, **network,
             "inputs": {f"{dim}d": size for dim, size in sizes.items()}, "rounds": given.rounds, "results": results}
    try:
        for dim, size in sizes.items():
            base = unet(dim, **network)
            racing = {name: Contender(name, base, **options) for name in memory[dim]}
            for found in times_s(racing, torch.rand(size, device=given.device), given.rounds):
                results[f"{dim}d"] = rows(base, racing, memory[dim], found)
                (given.out / f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")
            del racing
    finally:
        if results:
            print(markdown(results), flush=True)
            plot(results, given.out / f"{stem}.png")


if __name__ == "__main__":
    main()
