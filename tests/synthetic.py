"""Results of a protocol that never ran: 13 methods, 5 numbers of training cases, 3 draws, 13 test cases, 2 labels."""

from __future__ import annotations

import math

import numpy as np

from nnunet_dante.compare.results import RunResult

SHOTS, SEEDS, CASES, LABELS = (1, 2, 4, 8, 16), (0, 1, 2), 13, ("anterior", "posterior")
EPOCHS, TOTAL = 30, 2_000_000
# method: (trainer, Dice reached with many cases, learning per doubling of cases, share trained, speed of learning)
METHODS = {
    "zero-shot": ("", 0.55, 0.0, 0.0, 0.0), "scratch": ("nnUNetTrainerFromScratch", 0.84, 0.9, 1.0, 0.08),
    "full": ("nnUNetTrainerFineTune", 0.87, 0.35, 1.0, 0.3), "decoder": ("nnUNetTrainerDecoderOnly", 0.86, 0.3, 0.42, 0.3),
    "head": ("nnUNetTrainerHeadOnly", 0.70, 0.1, 0.0002, 0.6), "norm": ("nnUNetTrainerNormAffine", 0.79, 0.2, 0.001, 0.4),
    "BitFit": ("nnUNetTrainerBitFit", 0.77, 0.2, 0.0005, 0.4), "LoRA": ("nnUNetTrainerLoRA", 0.865, 0.25, 0.06, 0.35),
    "LoRA decoder": ("nnUNetTrainerLoRADecoder", 0.85, 0.25, 0.03, 0.35),
    "GU": ("nnUNetTrainerGradualUnfreezing", 0.868, 0.3, 1.0, 0.25),
    "GU Dante": ("nnUNetTrainerGradualUnfreezingDante", 0.866, 0.32, 1.0, 0.25),
    "LP-FT": ("nnUNetTrainerLPFT", 0.872, 0.33, 1.0, 0.3), "DoRA": ("nnUNetTrainerDoRA", 0.863, 0.26, 0.062, 0.33)}
GROUPS = ("head", "decoder.0", "decoder.1", "bottleneck", "encoder.1", "encoder.0")


def dice_of(method: str, shots: int) -> float:
    """What a method reaches: from the zero-shot level (scratch: from 0.2) towards its best."""
    _, best, need, _, _ = METHODS[method]
    start = 0.2 if method == "scratch" else 0.55
    return start if method == "zero-shot" else best - (best - start) * need * math.exp(-math.log2(2 * shots) * 0.55)


def result(method: str, shots: int, seed: int, *, experiment: str = "virtual scanner", number: int = CASES,
           **changes) -> RunResult:
    trainer, _, _, share, speed = METHODS[method]
    rng = np.random.default_rng([list(METHODS).index(method), shots, seed])
    reach = dice_of(method, shots)
    zero_shot = method == "zero-shot"
    start = 0.02 if method == "scratch" else 0.5
    epochs = np.arange(1, EPOCHS + 1)
    curve = start + (reach + 0.03 - start) * (1 - np.exp(-speed * epochs)) + rng.normal(0, 0.012, EPOCHS)
    stages = [(0, GROUPS)]
    if method.startswith("GU"):
        stages = [(3 * n, GROUPS[:n + 1]) for n in range(len(GROUPS))]
    elif method in ("decoder", "LoRA decoder"):
        stages = [(0, GROUPS[:3])]
    elif method == "head":
        stages = [(0, GROUPS[:1])]
    facts = {
        "experiment": experiment, "simulated": experiment == "virtual scanner", "donor": "CT", "method": method,
        "trainer": trainer, "shots": 0 if zero_shot else shots, "seed": seed, "tolerance_mm": 1.0,
        "cases": _cases(rng, reach, number), "machine": "2 threads", "date": "2026-01-01",
        "donor_cases": {} if method == "scratch" else _cases(rng, 0.9 if zero_shot else 0.9 - 0.1 * share ** 0.3, 5),
        "donor_before": {} if method == "scratch" else _cases(np.random.default_rng(7), 0.9, 5)}
    if not zero_shot:
        facts |= {"start_dice": start, "curve": curve.tolist(), "seconds": (20 + 10 * share + rng.random(EPOCHS)).tolist(),
                  "trained_parameters": int(share * TOTAL), "total_parameters": TOTAL, "peak_memory_mib": 900 + 400 * share,
                  "adapter_mib": share * 4 if "oRA" in method else None, "iterations_per_epoch": 50, "stages": stages}
    return RunResult(**(facts | changes))


def _cases(rng: np.random.Generator, reach: float, number: int) -> dict:
    hard = np.random.default_rng(3).normal(0, 0.03, number)  # a hard case is hard for every method
    scores: dict = {}
    for n in range(number):
        for label, harder in zip(LABELS, (0.0, -0.04)):
            value = float(np.clip(reach + harder + hard[n] + rng.normal(0, 0.015), 0, 1))
            lost = value < 0.42 and n == 3
            scores.setdefault(f"case_{n:02d}", {})[label] = {
                "dice": 0.0 if lost else value, "hd95_mm": math.inf if lost else 12 * (1 - value),
                "surface_dice": 0.0 if lost else min(1.0, value + 0.05)}
    return scores


def results(*, experiment: str = "virtual scanner", number: int = CASES, shots=SHOTS, seeds=SEEDS) -> list[RunResult]:
    """The whole protocol."""
    made = [result("zero-shot", 0, 0, experiment=experiment, number=number)]
    return made + [result(m, k, s, experiment=experiment, number=number)
                   for m in METHODS if m != "zero-shot" for k in shots for s in seeds]
