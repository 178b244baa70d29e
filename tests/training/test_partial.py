"""partial.py: labels that were not drawn in a case give no gradient there and are not scored; rehearsed cases."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from running import build, threads_for_pools, train

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import strength
from nnunet_dante.training.partial import MarginalLoss, drawn_summary, mixed
from nnunet_dante.training.strength import of_drawn
from nnunet_dante.training.trainers import nnUNetTrainerFineTune, nnUNetTrainerLoRA


def stock(*, batch_dice=False, ignore=None):
    return DC_and_CE_loss({"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
                          ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


def marginal(undrawn, **options) -> MarginalLoss:
    loss = MarginalLoss(stock(**options))
    loss.undrawn = torch.tensor(undrawn)
    return loss


def gradient(loss, logits, target) -> torch.Tensor:
    logits = logits.clone().requires_grad_(True)
    loss(logits, target).backward()
    return logits.grad


@pytest.fixture
def logits():
    return torch.randn(2, 4, 5, 6, 4)


@pytest.fixture
def target():
    return torch.randint(0, 4, (2, 1, 5, 6, 4)).float()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_with_everything_drawn_it_is_nnunets_loss(logits, target, batch_dice):
    expected = stock(batch_dice=batch_dice)(logits, target)
    assert torch.equal(marginal([[False] * 4] * 2, batch_dice=batch_dice)(logits, target), expected)
    assert torch.equal(MarginalLoss(stock(batch_dice=batch_dice))(logits, target), expected)


def test_the_cross_entropy_is_of_the_summed_probability(logits):
    """Voxels of background cost -log(p_0 + p_3) where label 3 was not drawn, drawn labels -log(p_k)."""
    target = torch.randint(0, 3, (2, 1, 5, 6, 4)).float()
    loss = marginal([[False, False, False, True]] * 2)
    loss.loss.weight_dice = 0
    p = logits.softmax(1)
    p = torch.stack([p[:, 0] + p[:, 3], p[:, 1], p[:, 2]], 1)
    expected = -p.gather(1, target.long()).log().mean()
    assert torch.allclose(loss(logits, target), expected, atol=1e-6)


def test_the_network_is_free_to_find_an_undrawn_label_in_the_background(logits):
    """Moving probability between background and undrawn labels does not change the loss."""
    target = torch.randint(0, 2, (2, 1, 5, 6, 4)).float()
    loss = marginal([[False, False, True, True]] * 2)
    p = logits.softmax(1)
    moved = torch.stack([p[:, 0] / 3, p[:, 1], p[:, 2] + p[:, 0] / 3, p[:, 3] + p[:, 0] / 3], 1)
    assert torch.allclose(loss(logits, target), loss(moved.log(), target), atol=1e-5)


def test_each_sample_has_its_own_undrawn_labels(logits, target):
    both = gradient(marginal([[False] * 4, [False, False, True, False]]), logits, target.clamp(max=1))
    alone = gradient(stock(), logits, target.clamp(max=1))
    assert torch.allclose(both[0], alone[0], atol=1e-7)
    assert not torch.allclose(both[1], alone[1], atol=1e-7)


def test_voxels_of_undrawn_labels_count_as_background(logits, target):
    loss = marginal([[False, False, False, True]] * 2)
    assert torch.equal(loss(logits, target), loss(logits, torch.where(target == 3, 0, target)))


def test_ignored_voxels_stay_ignored(logits, target):
    target[:, :, :2] = 4
    loss = marginal([[False, False, False, True]] * 2, ignore=4)
    assert not gradient(loss, logits, target)[:, :, :2].any()


@pytest.mark.parametrize("ignore", [False, True])
def test_an_undrawn_region_gives_no_gradient_and_the_others_theirs(ignore):
    def loss():
        return DC_and_BCE_loss({}, {"batch_dice": False, "smooth": 1e-5, "do_bg": True, "ddp": False},
                               use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)

    logits, target = torch.randn(1, 3, 5, 6), torch.rand(1, 3 + ignore, 5, 6) > 0.5
    partial = MarginalLoss(loss(), regions=True)
    partial.undrawn = torch.tensor([[False, True, False]])
    found, expected = gradient(partial, logits, target), gradient(loss(), logits, target)
    assert not found[:, 1].any() and torch.allclose(found[:, ::2], expected[:, ::2], atol=1e-7)


@pytest.mark.parametrize(("own", "rehearsed", "share"), [(1, 100, 0.25), (9, 3, 0.25), (100, 3, 0.5), (4, 6, 0.1)])
def test_rehearsed_cases_have_their_share_of_the_draws(own, rehearsed, share):
    drawn = Counter(mixed([f"o{i}" for i in range(own)], [f"r{i}" for i in range(rehearsed)], share))
    assert len(drawn) == own + rehearsed and len({n for c, n in drawn.items() if c[0] == "r"}) == 1
    found = sum(n for case, n in drawn.items() if case[0] == "r") / drawn.total()
    assert found == pytest.approx(share, abs=0.2 * share) or (own, rehearsed) == (1, 100)


def test_scores_leave_out_what_was_not_drawn():
    dice = of_drawn([0.5, 0.7, 0.9], {"labels": {"background": 0, "a": 1, "b": 2, "c": 3}}, {"b"})
    assert dice[0] == 0.5 and np.isnan(dice[1]) and dice[2] == 0.9


@pytest.fixture
def annotated(prepared, tmp_path, monkeypatch):
    """A preprocessed data set in which the vessel was not drawn in case_000, which fold 0 validates, and case_001."""
    copy = prepared.copy_to(tmp_path).activate(monkeypatch)
    change(copy, annotated={f"case_00{i}": ["lesion", "organ"] for i in range(2)})
    return copy


def change(prepared, **entries) -> None:
    file = prepared.preprocessed / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_summary_leaves_out_what_was_not_drawn():
    one, two = {"Dice": 0.5, "n_ref": 3}, {"Dice": 1.0, "n_ref": 5}
    cases = [{"reference_file": f"/x/{name}.nii.gz", "metrics": {1: one, (1, 2): two}} for name in ("a", "b")]
    found = drawn_summary({"metric_per_case": cases, "mean": {1: one, (1, 2): two}, "foreground_mean": one},
                          {"a": [1], "b": [1, (1, 2)]}, ".nii.gz")
    assert np.isnan(found["mean"][1]["Dice"]) and found["mean"][(1, 2)] == two
    assert found["foreground_mean"] == two and found["metric_per_case"][0]["metrics"][(1, 2)] == two


def test_a_training_learns_and_scores_only_what_was_drawn(annotated, monkeypatch):
    threads_for_pools(monkeypatch)
    built = train(nnUNetTrainerFineTune, annotated)
    built.perform_actual_validation()
    assert built.do_split()[1] == ["case_000"] and built.foreground_names == ["lesion", "organ", "vessel"]
    for dice in built.logger.get_value("dice_per_class_or_region", step=None):
        assert np.isnan(dice).tolist() == [False, False, True]
    summary = json.loads(Path(built.output_folder, "validation", "summary.json").read_text())
    (case,) = summary["metric_per_case"]
    assert np.isnan(case["metrics"]["3"]["Dice"]) and case["metrics"]["2"]["n_ref"] > 0
    assert not np.isnan(summary["foreground_mean"]["Dice"])
    final = load_checkpoint_safely(Path(built.output_folder, "checkpoint_final.pth"))
    assert "annotated" not in final["init_args"]["dataset_json"] and "case_001" not in json.dumps(final["dante"]["cases"])
    assert "annotated" not in json.loads(Path(built.output_folder_base, "dataset.json").read_text())


@pytest.mark.parametrize(("record", "expected"), [(None, 0.525), ({"case_000": ["lesion"]}, 0.325), ({}, 0.4)])
def test_labels_that_the_donor_completed_do_not_outweigh_those_that_were_drawn(prepared, tmp_path, monkeypatch, record, expected):
    """Their masks are its own predictions, so that many of them would make every training look worse than none."""
    copy = prepared.copy_to(tmp_path).activate(monkeypatch)
    change(copy, completed=["lesion", "organ"])
    if record is not None:
        raw = copy.root / "nnUNet_raw" / copy.dataset
        raw.mkdir(parents=True, exist_ok=True)
        (raw / "completed.json").write_text(json.dumps({"format": 1, "completed": record}))
    monkeypatch.setattr(strength, "dice_of_labels", lambda *_: [0.1, 0.2, 0.9])
    kept = load_checkpoint_safely(Path(train(nnUNetTrainerFineTune, copy).output_folder, "checkpoint_final.pth"))
    assert [dice for _, dice in kept["dante"]["strength"]["curve"]] == pytest.approx([expected] * 7)


def test_undrawn_labels_give_the_head_no_pull_towards_background(annotated):
    """With only undrawn vessels in the batch, the gradient of the vessel's row is what background's is, in its share."""
    built = build(nnUNetTrainerFineTune, annotated)
    built.initialize()
    built._hide(built.marginal_loss, ["case_000", "case_001"])
    logits = torch.randn(2, 4, 16, 16, 16, requires_grad=True)
    loss = built.loss.loss if hasattr(built.loss, "weight_factors") else built.loss
    loss(logits, torch.zeros(2, 1, 16, 16, 16)).backward()
    row = ["background", *built.foreground_names].index("vessel")
    p = logits.softmax(1).detach()
    ratio = logits.grad[:, row] / logits.grad[:, 0]
    assert torch.allclose(ratio, p[:, row] / p[:, 0], rtol=1e-3)
    assert (logits.grad[:, row] <= 0).all()  # never pushed away from the vessel


def test_a_training_is_not_continued_with_other_drawn_labels(annotated, monkeypatch):
    from running import keep_checkpoint

    monkeypatch.setattr(nnUNetTrainerLoRA, "on_epoch_end", keep_checkpoint(nnUNetTrainerLoRA.on_epoch_end))
    built = train(nnUNetTrainerLoRA, annotated)
    folder = Path(built.output_folder)
    (folder / "kept.pth").rename(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final.pth").unlink()
    change(annotated, annotated={})
    with pytest.raises(ConfigurationError, match="the partly drawn cases were 2"):
        build(nnUNetTrainerLoRA, annotated, resume=True)


def test_rehearsed_cases_are_trained_on_and_never_validated(prepared, tmp_path, monkeypatch):
    copy = prepared.copy_to(tmp_path).activate(monkeypatch)
    change(copy, rehearsed={"share": 0.5, "cases": ["case_000", "case_003"]})
    built = build(nnUNetTrainerFineTune, copy, fold="all")
    built.initialize()
    training, validation = built.do_split()
    assert set(training) == set(validation) == {"case_001", "case_002", "case_004"}
    drawn = Counter(built.get_tr_and_val_datasets()[0].identifiers)
    assert set(drawn) == {f"case_00{i}" for i in range(5)}
    assert drawn["case_000"] + drawn["case_003"] == drawn.total() / 2
