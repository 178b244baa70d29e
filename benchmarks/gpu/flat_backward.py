"""The short backward pass of flat LoRA that was left out on the CPU (docs/cost-notes.md), measured on a device.

    python benchmarks/gpu/flat_backward.py --device cuda --out OUT [--tiny]

A layer computes y = conv(x, W + s A B) with A (out, r) and B (r, in * K). torch's backward makes the gradient of the
whole kernel, (out, in * K), and multiplies it by A and B. The short one never makes it: it takes A's part of the
output's gradient first, which leaves convolutions with r channels. Both give the same gradients. Times are of forward
and backward of one layer, relative to a layer that is trained in full; median of ROUNDS. Writes OUT/flat_backward.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

RANK, SCALE, ROUNDS = 8, 2.0, 20
LAYERS = ((32, 128), (64, 64), (128, 32), (256, 16), (320, 8))  # channels, voxels along an axis


class Short(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        merged = (weight + SCALE * (a @ b).reshape(weight.shape)).to(x.dtype)
        ctx.save_for_backward(x, merged, a, b)
        return functional.conv3d(x, merged, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        options = (None, [1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)
        backward = torch.ops.aten.convolution_backward
        kernel = b.to(x.dtype).reshape(len(b), *merged.shape[1:])  # (r, in, 3, 3, 3)
        of_x = backward(gradient, x, merged, *options, [True, False, False])[0]
        projected = torch.einsum("or,bozyx->brzyx", a.to(x.dtype), gradient)  # (batch, r, *space)
        of_b = SCALE * backward(projected, x, kernel, *options, [False, True, False])[1].reshape(b.shape)
        inner = functional.conv3d(x, kernel, padding=1)  # (batch, r, *space)
        of_a = SCALE * torch.einsum("bozyx,brzyx->or", gradient, inner)
        return of_x, None, of_a.to(a.dtype), of_b.to(b.dtype)


def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return functional.conv3d(x, (weight + SCALE * (a @ b).reshape(weight.shape)).to(x.dtype), padding=1)


def full(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return functional.conv3d(x, weight.to(x.dtype), padding=1)


def apart(channels: int = 6) -> float:
    """Return the largest difference of the two backward passes in float64."""
    tensors = [torch.rand(shape, dtype=torch.float64, requires_grad=grad) for shape, grad in
               (((2, channels, 5, 6, 7), True), ((channels, channels, 3, 3, 3), False), ((channels, RANK), True),
                ((RANK, channels * 27), True))]
    gradients = [torch.autograd.grad(run(*tensors).square().sum(), [t for t in tensors if t.requires_grad])
                 for run in (plain, Short.apply)]
    return max(float(((one - other).abs() / one.abs().max()).max()) for one, other in zip(*gradients))


def seconds(run: Callable[..., Tensor], tensors: list[Tensor], wanted: list[Tensor]) -> float:
    start = perf_counter()
    torch.autograd.grad(run(*tensors).float().square().mean(), wanted)
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return perf_counter() - start


def row(channels: int, size: int, device: str) -> dict[str, Any]:
    dtype = torch.float16 if device == "cuda" else torch.float32
    x = torch.rand(2, channels, *[size] * 3, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.rand(channels, channels, 3, 3, 3, device=device) / channels).requires_grad_()
    a = torch.rand(channels, RANK, device=device, requires_grad=True)
    b = torch.zeros(RANK, channels * 27, device=device, requires_grad=True)
    frozen = weight.detach()
    contenders = {"full": (full, [x, weight, a, b], [x, weight]), "plain": (plain, [x, frozen, a, b], [x, a, b]),
                  "short": (Short.apply, [x, frozen, a, b], [x, a, b])}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 3):
        for name, contender in contenders.items():
            if number < 3:  # libraries choose their kernels
                seconds(*contender)
            else:
                times[name].append(seconds(*contender))
    usual = {name: statistics.median(of) for name, of in times.items()}
    return {"channels": channels, "size": size, "full_ms": round(1000 * usual["full"], 3),
            **{name: round(usual[name] / usual["full"], 3) for name in ("plain", "short")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # as nnU-Net does
    difference = apart()
    assert difference < 1e-12, f"the two backward passes differ by {difference}"
    rows = [row(channels, size, given.device) for channels, size in ([(8, 8)] if given.tiny else LAYERS)]
    given.out.mkdir(parents=True, exist_ok=True)
    content = {"torch": torch.__version__, "rows": rows}
    (given.out / "flat_backward.json").write_text(json.dumps(content, indent=1) + "\n")
    print("| channels | full, ms | flat LoRA | with the short backward |\n|---|---|---|---|")
    for one in rows:
        print(f"| {one['channels']} at {one['size']}^3 | {one['full_ms']} | {one['plain']} | {one['short']} |")


if __name__ == "__main__":
    main()
