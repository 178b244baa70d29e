"""What a method costs: trained share, file, memory, time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .document import MISSING, Table, Value
from .results import RunResult
from .speed import median
from .study import Study


def cost_table(study: Study) -> Table:
    """Return the cost of every trained method, as medians over its runs."""
    full = study.special("full_fine_tuning")
    rows, records = [], []
    for method in study.methods:
        runs = [run for run in study.of(method) if not run.is_zero_shot]
        if not runs:
            continue
        facts: dict[str, float] = {
            "trained_parameters": _median(runs, "trained_parameters"),
            "total_parameters": _median(runs, "total_parameters"),
            "trained_share": median([_share(run) for run in runs]), "adapter_mib": _median(runs, "adapter_mib"),
            "peak_memory_mib": _median(runs, "peak_memory_mib"),
            "seconds_per_epoch": median([median(run.seconds) for run in runs]),
            "relative_seconds": median([_relative(run, study.partner(run, full)) for run in runs])}
        numbers: dict[str, Value] = {**facts}
        records.append({"experiment": study.name, "simulated": study.simulated, "method": method, "runs": len(runs),
                        **numbers})
        forms = {"trained_parameters": ",.0f", "trained_share": ".2%", "adapter_mib": ".2f", "peak_memory_mib": ",.0f",
                 "seconds_per_epoch": ".3g", "relative_seconds": ".2f"}
        rows.append([method, *(MISSING if math.isnan(facts[name]) else f"{facts[name]:{form}}"
                               for name, form in forms.items())])
    return Table(
        name="cost", title=study.title("Cost of training"), rows=rows, records=records,
        head=["method", "trained parameters", "share of the network", "adapter file, MiB", "peak memory, MiB",
              "seconds an epoch", f"time relative to {full or 'full fine-tuning'}"],
        notes=["Median over the runs; an epoch's time is the median over a run's epochs, set against the run of full "
               "fine-tuning with the same training cases and seed on the same machine."])


def _median(runs: Sequence[RunResult], name: str) -> float:
    return median([math.nan if (value := getattr(run, name)) is None else float(value) for run in runs])


def _share(run: RunResult) -> float:
    if run.trained_parameters is None or not run.total_parameters:
        return math.nan
    return run.trained_parameters / run.total_parameters


def _relative(run: RunResult, full: RunResult | None) -> float:
    if full is None or run.machine != full.machine:
        return math.nan
    theirs = median(full.seconds)
    return median(run.seconds) / theirs if theirs else math.nan
