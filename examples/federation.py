"""A federation of three sites on one machine: SuperLink and SuperNodes over 127.0.0.1, with Flower.

    python examples/federation.py                            # boxes drawn for the tests, and a donor that knows nothing
    python examples/federation.py DONOR DATASET DATASET ...  # your donor and your data sets in nnUNet_raw

Everything is written into ./federation-example; the report is federation/run/report.html there. One site of the drawn
data has masks of one label only. It takes about four minutes on one CPU core.
"""

import os
import sys
from pathlib import Path

OUT = Path("federation-example").resolve()


def drawn_data() -> tuple[Path, list[str]]:
    """Write a donor with random weights and three data sets of boxes; return the donor and the names."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (OUT / name).mkdir(parents=True)
        os.environ[name] = str(OUT / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "OMP_NUM_THREADS": "1"}
    donor = tiny.write_model_folder(OUT / "nnUNet_results")
    raw, organ = OUT / "nnUNet_raw", {"background": 0, "organ": 1}
    return donor, [
        tiny.write_raw_dataset(raw, dataset_id=911, name="North", seed=1, labels=tiny.LABELS),
        tiny.write_raw_dataset(raw, dataset_id=921, name="South", seed=2, labels=tiny.LABELS, offset=2.0),
        tiny.write_raw_dataset(raw, dataset_id=931, name="West", seed=3, labels=organ, values=(1,))]


def main(donor: str | Path | None = None, *datasets: str) -> None:
    if (OUT / "federation").exists():
        raise SystemExit(f"{OUT} holds an earlier run; move it away.")
    overrides = {}
    if donor is None:
        donor, datasets = drawn_data()
        overrides = {"iterations": 10, "val_iterations": 2, "rank": 2, "lr": 0.01}

    from loopback import Loopback

    from nnunet_dante.federation.create import new_federation
    from nnunet_dante.federation.join import join_federation

    print(new_federation(OUT / "federation", donor, rounds=4, epochs=1, overrides=overrides))
    joined = [join_federation(OUT / "federation", name, site=name.split("_")[-1].lower()) for name in datasets]
    with Loopback(OUT / "flower") as flower:
        flower.start_link()
        for site in joined:
            flower.start_node(site.facts.site, site.dataset)
        print(f"The rounds run, minutes; the server writes into {OUT / 'flower' / 'run.log'}", flush=True)
        print(flower.run(OUT / "federation", seconds=3600, settings={"min-sites": len(joined)}))
    print(f"Report: {OUT / 'federation' / 'run' / 'report.html'}")


if __name__ == "__main__":  # nnU-Net starts processes that import this file again
    main(*sys.argv[1:])
