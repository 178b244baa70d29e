"""The rows that `nnunet-dante suggest` rests on, from the results of the hippocampus benchmark.

    python benchmarks/hippocampus/evidence.py benchmarks/results/hippocampus/{protocol,inverted}/runs.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from nnunet_dante.advise.evidence import FILE
from nnunet_dante.compare.evidence import evidence_rows
from nnunet_dante.compare.results import read_results

NEW_LABELS = {"task shift"}  # the donor knows neither Anterior nor Posterior


def main() -> None:
    results = [run for file in sys.argv[1:] for run in read_results(Path(file))]
    rows = [{key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
            | {"dice_interval": [round(bound, 4) for bound in row["dice_interval"]],
               "new_labels": row["experiment"] in NEW_LABELS, "source": "docs/few-shot.md"}
            for row in evidence_rows(results)]
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(rows)} rows in {FILE.name}")


if __name__ == "__main__":
    main()
