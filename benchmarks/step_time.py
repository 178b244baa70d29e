"""Time of a training step and memory of the optimiser, by method and stage, as ratios to training everything.

    python benchmarks/step_time.py [--features 32 64 128 256] [--patch 32] [--rounds 10] [--out benchmarks/results]

All contenders take turns in every round of one process, so that noise of the machine hits all alike; the ratio is the
median over rounds of (contender / everything) in the same round.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from datetime import date
from pathlib import Path
from time import perf_counter

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_dante import DecoderOnly, FineTune, GradualUnfreezing, HeadOnly, LoRA

METHODS = {"everything": FineTune(), "LoRA r=8": LoRA(), "LoRA r=8, decoder": LoRA(encoder=False),
           "decoder": DecoderOnly(), "head": HeadOnly()}


def network(features: list[int]) -> nn.Module:
    n = len(features)
    return PlainConvUNet(1, n, features, nn.Conv3d, 3, [1] + [2] * (n - 1), 2, 3, 2, True, nn.InstanceNorm3d,
                         {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
                         deep_supervision=True)


class Contender:
    def __init__(self, base: nn.Module, method, epoch: int = 0, device: str = "cpu"):
        self.network = copy.deepcopy(base).to(device)
        method.adapt(self.network)
        self.plan = method.plan(self.network)
        self.plan.restrict(self.network)
        self.plan.set_stage(epoch)
        self.optimizer = torch.optim.AdamW(self.plan.optimiser_groups(), lr=1e-4)
        self.device = device

    def step(self, x: torch.Tensor) -> float:
        start = perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast(self.device, enabled=self.device == "cuda"):
            loss = sum(y.float().square().mean() for y in self.network(x))
        loss.backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)


def contenders(base: nn.Module, device: str) -> dict[str, Contender]:
    found = {name: Contender(base, method, device=device) for name, method in METHODS.items()}
    unfreezing = GradualUnfreezing(epochs=100)
    for number, stage in enumerate(unfreezing.plan(base).schedule.stages, start=1):
        found[f"gradual, stage {number}"] = Contender(base, unfreezing, stage.first_epoch, device)
    return found


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 0.35 * len(rows) + 1), layout="constrained")
    axis.barh([r["name"] for r in rows], [r["step_ratio"] for r in rows], color="#4477aa")
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("time of a training step, relative to training everything")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = network(options.features)
    racing = contenders(base, device)
    x = torch.rand(2, 1, *[options.patch] * 3, device=device)
    times: dict[str, list[float]] = {name: [] for name in racing}
    for _ in range(options.rounds + 1):
        for name, contender in racing.items():
            times[name].append(contender.step(x))
    everything = times["everything"]
    rows = [{"name": name, "trained_parameters": contender.trained,
             "step_s": round(statistics.median(times[name][1:]), 4),
             "step_ratio": round(statistics.median(t / e for t, e in zip(times[name][1:], everything[1:])), 3)}
            for name, contender in racing.items()]
    for row in rows:
        print(f"{row['name']:<22}{row['trained_parameters']:>12,}{row['step_s']:>9.3f} s{row['step_ratio']:>8.2f} x")
    machine = torch.cuda.get_device_name() if device == "cuda" else \
        f"{platform.machine()}, {torch.get_num_threads()} threads"
    stem = f"step_time_{device}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps(
        {"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__, "features": options.features,
         "patch": options.patch, "rounds": options.rounds, "rows": rows}, indent=1))
    plot(rows, options.out / f"{stem}.png")


if __name__ == "__main__":
    main()
