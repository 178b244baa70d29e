"""runs.py: a fold folder and its checkpoint as one record."""

from __future__ import annotations

from nnunet_dante.compare.runs import read_run

LOG = ("2026-01-01 00:00:00.1: Epoch 0\n2026-01-01 00:00:00.1: Pseudo dice [0.5]\n"
       "2026-01-01 00:00:00.1: Epoch time: 2.0 s\n")


def test_the_cost_comes_from_the_checkpoint_and_is_unknown_for_a_stock_one(tmp_path):
    (tmp_path / "training_log_2026.txt").write_text(LOG)
    ours = read_run("LoRA", tmp_path, {"dante": {"trainable_parameters": 7, "total_parameters": 70}})
    assert (ours.name, ours.trained, ours.total, ours.log.mean_dice.tolist()) == ("LoRA", 7, 70, [0.5])
    stock = read_run("stock", tmp_path, {"network_weights": {}})
    assert (stock.trained, stock.total) == (None, None)
