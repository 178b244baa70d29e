"""Injection, gradient audit and adapter files of large networks: time and memory against the number of weights.

    OMP_NUM_THREADS=1 python benchmarks/presets.py [--out benchmarks/results]

nnU-Net's presets ResEncM, L and XL have the same blocks a stage and features (nnUNetPlannerResEncM, L and XL, all from
ResEncUNetPlanner); larger patches can bring a stage more. So the rows differ in stages. The audit runs on the smallest
patch that the network takes, because it is a forward and backward pass, whose cost is that of a training step. Each row
is measured in a process of its own; time is processor time, memory the peak of resident memory above the start.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from time import process_time
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnunet_dante import LoRA
from nnunet_dante.adapters.adapter import apply, extract
from nnunet_dante.models.checkpoint import save_atomically, weights_sha256
from nnunet_dante.models.memory import PeakMemory
from nnunet_dante.peft.audit import audit_on_small_patch
from nnunet_dante.peft.inject import adapted, factors, original, settings

FEATURES, BLOCKS = (32, 64, 128, 256, 320, 320, 320), (1, 3, 4, 6, 6, 6, 6)
ROWS = {"default (PlainConvUNet), 6 stages": (PlainConvUNet, 6), "ResEnc, 5 stages": (ResidualEncoderUNet, 5),
        "ResEncM / L / XL, 6 stages": (ResidualEncoderUNet, 6), "ResEncM / L / XL, 7 stages": (ResidualEncoderUNet, 7)}


def unet(kind: Any, stages: int) -> nn.Module:
    plain = kind is PlainConvUNet
    strides = [[1, 1, 1], *[[2, 2, 2]] * min(5, stages - 1), *[[1, 1, 2]] * (stages - 6)]
    return kind(1, stages, FEATURES[:stages], nn.Conv3d, 3, strides, 2 if plain else BLOCKS[:stages], 3,
                2 if plain else [1] * (stages - 1), True, nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None,
                nn.LeakyReLU, {"inplace": True}, deep_supervision=True)


def measured(step: Callable[[], Any]) -> dict[str, Any]:
    peak, start = PeakMemory(torch.device("cpu")), process_time()
    step()
    mib = peak.peak_mib()
    return {"s": round(process_time() - start, 2), "peak_mib": None if mib is None else round(mib)}


def checkpoint(network: nn.Module, base: dict[str, Any], base_sha256: str) -> dict[str, Any]:
    """What a trainer of this package writes, as far as adapters need it."""
    adapter = {"base": base, "updates": settings(network), "factors": factors(network)}
    dante = {"version": "0", "method": "LoRA", "options": {}, "base_sha256": base_sha256, "donor": None,
             "label_map": {}, "start_dice": {}, "adapter": adapter}
    plans = {"dataset_name": "Dataset001_Example"}
    init = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": {"labels": {"background": 0}}}
    return {"network_weights": network.state_dict(), "init_args": init, "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": (0, 1, 2), "dante": dante}


def row(name: str) -> dict[str, Any]:
    kind, stages = ROWS[name]
    torch.manual_seed(0)
    network = unet(kind, stages)
    weights = sum(p.numel() for p in network.parameters())
    base = {"network_weights": copy.deepcopy(network.state_dict())}
    found: dict[str, Any] = {"name": name, "weights": weights}
    found["inject"] = measured(lambda: LoRA().adapt(network))
    LoRA().plan(network).restrict(network)
    found["factors"] = sum(t.numel() for t in factors(network).values())
    found["audit"] = measured(lambda: audit_on_small_patch(network, 1, (128, 128, 128)))
    with tempfile.TemporaryDirectory() as folder:
        trained, start, adapter, result = (Path(folder, n) for n in ("trained.pth", "start.pth", "a.safetensors", "r"))
        save_atomically(base, start)
        sha256 = weights_sha256(base["network_weights"])
        del base
        full = {k: p.detach() for k, p in network.named_parameters() if p.requires_grad and "parametrizations" not in k}
        frozen = {name: original(module).detach() for name, module in adapted(network).items()}
        save_atomically(checkpoint(network, frozen | full, sha256), trained)
        found["extract"] = measured(lambda: extract(trained, adapter))
        found["apply"] = measured(lambda: apply(start, adapter, result))
        found["adapter_mib"] = round(adapter.stat().st_size / 2**20, 1)
    return found


def warm_up() -> None:
    """Import what is imported at first use, once and not in the first measurement of each row."""
    small = PlainConvUNet(1, 2, [8, 8], nn.Conv3d, 3, [1, 2], 1, 3, 1, True, nn.InstanceNorm3d, {"affine": True}, None,
                          None, nn.LeakyReLU, {}, deep_supervision=True)
    LoRA(rank=1).adapt(small)
    audit_on_small_patch(small, 1, (16, 16, 16))
    assert adapted(small)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    out = parser.parse_args().out
    warm_up()
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(row, (name,)) for name in ROWS]
    parts = ("inject", "audit", "extract", "apply")
    print("| network | weights | " + " | ".join(parts) + " | adapter |\n|---|---|" + "---|" * (len(parts) + 1))
    for r in rows:
        cells = [f"{r[part]['s']:.1f} s, {r[part]['peak_mib']} MiB" for part in parts]
        print(f"| {r['name']} | {r['weights'] / 1e6:.1f} M, {r['weights'] * 4 / 2**20:.0f} MiB | " + " | ".join(cells)
              + f" | {r['adapter_mib']} MiB |")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    out.mkdir(parents=True, exist_ok=True)
    (out / "presets.json").write_text(json.dumps({"date": date.today().isoformat(), "machine": machine,
                                                  "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
