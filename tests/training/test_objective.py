"""The options l2_sp, ewc and size_prior in a whole training: each does what it says, and nothing when it is 0."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from running import build, equal, keep_checkpoint, prepare, train, with_overrides

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.peft.regularisation import ExtendedLoss
from nnunet_dante.training import objective, trainers


@pytest.fixture
def unlabelled(prepared):
    """Two images without masks in imagesTs."""
    folder = prepared.root / "nnUNet_raw" / prepared.dataset
    shutil.rmtree(folder / "imagesTs", ignore_errors=True)
    (folder / "imagesTs").mkdir()
    for i in range(2):
        shutil.copy(folder / "imagesTr" / f"case_00{i}_0000.nii.gz", folder / "imagesTs" / f"test_{i}_0000.nii.gz")
    yield prepared
    shutil.rmtree(folder / "imagesTs")


def seed():
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(0)


def run(prepared, trainer=trainers.nnUNetTrainerFineTune, **overrides):
    seed()
    return train(trainer, prepared, plans=with_overrides(prepared, **overrides))


def final(trainer) -> dict:
    return load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_final.pth"))


def distance(trainer) -> float:
    start = load_checkpoint_safely(Path(trainer.preprocessed_dataset_folder_base, trainer.start_entry["file"]))
    return sum(float((a - b).square().sum()) for a, b in
               zip(final(trainer)["network_weights"].values(), start["network_weights"].values())) ** 0.5


def test_with_all_options_0_nothing_is_wrapped_and_the_weights_are_those_of_nnunets_own_steps(prepared, monkeypatch):
    """The mixin without its overrides is the training of today: the same weights, bit for bit."""
    with_mixin = run(prepared)
    assert not isinstance(with_mixin.loss, ExtendedLoss)
    assert final(with_mixin)["dante"]["penalty"] is None
    weights = final(with_mixin)["network_weights"]
    for name in ("on_train_start", "on_train_epoch_start", "train_step", "on_train_epoch_end"):
        monkeypatch.delattr(objective.ObjectiveMixin, name)
    assert equal(final(run(prepared))["network_weights"], weights)


@pytest.mark.parametrize("name", ["nnUNetTrainerFineTune", "nnUNetTrainerLoRA"])
@pytest.mark.parametrize("option", ["l2_sp", "ewc"])
def test_penalties_keep_the_weights_near_the_start(prepared, name, option):
    cls = getattr(trainers, name)
    free = distance(run(prepared, cls, lr=0.01))  # now: the next run writes the same files
    held = run(prepared, cls, lr=0.01, **{option: 10.0})
    assert distance(held) < 0.7 * free
    log = "".join(f.read_text() for f in Path(held.output_folder).glob("training_log*"))
    assert "Penalty on the distance from the start weights:" in log
    assert ("Fisher information of the start weights on 1 batches" in log) == (option == "ewc")


def test_the_logged_losses_are_nnunets_own(prepared):
    """One step from the same weights on the same patches: a huge penalty shows in no loss."""
    losses = [run(prepared, epochs=1, iterations=1, l2_sp=l2_sp).logger.get_value("train_losses", None)
              for l2_sp in (0.0, 1e6)]
    assert losses[0] == losses[1]


def test_l2_sp_takes_the_place_of_weight_decay(prepared):
    for l2_sp, decay in ((0.0, 1e-4), (0.1, 0.0)):
        trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=with_overrides(prepared, l2_sp=l2_sp))
        trainer.initialize()
        assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {decay}


def test_rows_of_new_labels_are_pulled_to_zero_and_known_ones_to_the_donors(prepared):
    """Rows: background, lesion, organ, vessel; the donor knows all but vessel."""
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=with_overrides(prepared, l2_sp=0.1))
    trainer.on_train_start()
    assert trainer.known_rows == [0, 1, 2]
    head = dict(trainer.bare_network.named_parameters())["decoder.seg_layers.1.weight"]
    start = trainer.start_penalty.start["decoder.seg_layers.1.weight"]
    assert torch.equal(start[:3], head[:3]) and torch.all(start[3] == 0) and not torch.all(head[3] == 0)
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.start_penalty.start[stem], dict(trainer.bare_network.named_parameters())[stem])


def test_after_pretrained_weights_those_are_the_start_and_no_head_row_is_known(prepared, tmp_path):
    start = load_checkpoint_safely(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")["network_weights"]
    torch.save({"network_weights": {k: v + 0.25 for k, v in start.items()}}, tmp_path / "other.pth")
    plans = with_overrides(prepared, l2_sp=0.1)
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=plans, pretrained=tmp_path / "other.pth")
    trainer.on_train_start()
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.start_penalty.start[stem], start[stem] + 0.25)
    del plans["dante"]["start_weights"]["3d_fullres"]
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=plans, pretrained=tmp_path / "other.pth")
    trainer.on_train_start()
    assert trainer.known_rows == []
    assert torch.all(trainer.start_penalty.start["decoder.seg_layers.1.weight"] == 0)


def test_a_random_start_is_not_held_and_says_what_it_ignores(prepared, capsys):
    trainer = build(trainers.nnUNetTrainerFromScratch, prepared, plans=with_overrides(prepared, l2_sp=0.1, ewc=1.0))
    trainer.initialize()
    said = capsys.readouterr().out
    assert (trainer.run_method.l2_sp, trainer.run_method.ewc) == (0, 0)
    used, ignored = said.split("Overrides in the plans:")[1].split("ignored:")
    assert "'epochs': 3" in used and "'l2_sp'" not in used and "'l2_sp': 0.1" in ignored and "'rank': 2" in ignored


@pytest.mark.parametrize(("name", "overrides"), [
    ("nnUNetTrainerFineTune", {"l2_sp": 0.5}), ("nnUNetTrainerLoRA", {"ewc": 3.0, "l2_sp": 0.1}),
    ("nnUNetTrainerGradualUnfreezing", {"ewc": 1.0, "size_prior": 5.0})])
def test_resuming_equals_never_having_stopped(unlabelled, monkeypatch, name, overrides):
    cls = getattr(trainers, name)
    monkeypatch.setattr(cls, "on_epoch_end", keep_checkpoint(cls.on_epoch_end, after=2))
    plans = with_overrides(unlabelled, epochs=4, iterations=3, **overrides)
    seed()
    whole = train(cls, unlabelled, plans=copy.deepcopy(plans))
    expected, folder = final(whole), Path(whole.output_folder)
    (folder / "kept.pth").rename(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final.pth").unlink()
    torch.manual_seed(77)
    resumed = build(cls, unlabelled, plans=copy.deepcopy(plans), resume=True)
    assert resumed.current_epoch == 2
    resumed.run_training()
    assert equal(final(resumed)["network_weights"], expected["network_weights"])
    for part, values in expected["dante"]["penalty"].items():
        assert equal(final(resumed)["dante"]["penalty"][part], values)
    assert bool(expected["dante"]["penalty"]["fisher"]) == ("ewc" in overrides)


def test_ewc_is_refused_where_the_donor_knows_nothing(prepared):
    plans = with_overrides(prepared, ewc=1.0)
    labels = plans["dante"]["start_weights"]["3d_fullres"]["label_map"]
    plans["dante"]["start_weights"]["3d_fullres"]["label_map"] = dict.fromkeys(labels)
    with pytest.raises(ConfigurationError, match="the donor knows none of these labels"):
        train(trainers.nnUNetTrainerFineTune, prepared, plans=plans)


def test_size_prior_acts_in_the_second_half_only(unlabelled):
    expected = run(unlabelled, epochs=4)
    trainer = run(unlabelled, epochs=4, size_prior=10.0)
    losses = [t.logger.get_value("train_losses", None) for t in (expected, trainer)]
    # The third epoch's first loss is still that of equal weights; its second one is not.
    assert losses[0][:2] == losses[1][:2] and losses[0][3] != losses[1][3]
    log = "".join(f.read_text() for f in Path(trainer.output_folder).glob("training_log*"))
    assert "Size prior: 2 images of" in log and log.count("Predicted / expected size") == 2
    assert "'lesion'" in log.split("expected sizes in ml")[1].splitlines()[0]


@pytest.mark.parametrize("factor", [1000.0, 0.2])
def test_size_prior_moves_the_predicted_size_the_right_way(unlabelled, monkeypatch, factor):
    """Expected sizes far above or below the predicted ones: organs together grow or shrink, against no prior."""
    sizes = objective.ObjectiveMixin._expected_sizes
    monkeypatch.setattr(objective.ObjectiveMixin, "_expected_sizes",
                        lambda self: {row: factor * size for row, size in sizes(self).items()})
    predicted = []
    for weight in (1e-9, 30.0):
        trainer = run(unlabelled, epochs=2, iterations=6, lr=0.01, size_prior=weight)
        assert all((ratio < 0.7) == (factor > 1) for ratio in trainer.size_ratios[0])
        predicted.append(sum(r * s for r, s in zip(trainer.size_ratios[-1], trainer.size_prior.sizes_mm3.values())))
    assert predicted[1] > predicted[0] if factor > 1 else predicted[1] < predicted[0]


def test_expected_sizes_are_the_mean_of_the_training_masks(unlabelled):
    trainer = build(trainers.nnUNetTrainerFineTune, unlabelled, plans=with_overrides(unlabelled, size_prior=0.1))
    trainer.on_train_start()
    cases, _ = trainer.do_split()
    masks = [np.asarray(trainer.dataset_class(trainer.preprocessed_dataset_folder, [c]).load_case(c)[1][:]) for c in cases]
    for row, size in trainer.size_prior.sizes_mm3.items():
        assert size == pytest.approx(np.mean([(mask == row).sum() for mask in masks]))  # voxels of 1 mm^3
    assert [v.name for v in trainer.size_prior.volumes] == ["test_0", "test_1"]
    assert all(v.data.shape == (1, 18, 24, 20) and v.voxel_mm3 == 1 for v in trainer.size_prior.volumes)


def test_size_prior_without_images_is_refused_before_the_first_step(prepared, tmp_path):
    for folder in ("imagesTs", str(tmp_path)):
        plans = with_overrides(prepared, size_prior=0.1, size_images=folder)
        with pytest.raises(ConfigurationError, match="holds no CASE_0000.nii.gz; put them there"):
            train(trainers.nnUNetTrainerFineTune, prepared, plans=plans)


@pytest.mark.slow
def test_regions_have_sizes_and_fisher_information_too(tmp_path, monkeypatch):
    labels = {"background": 0, "whole": [1, 2], "organ": [2], "vessel": 3}
    (tmp_path / "nnUNet").mkdir()
    prepared = prepare(tmp_path / "nnUNet", labels=labels, values=(1, 2, 3), regions_class_order=[1, 2, 3]).activate(monkeypatch)
    images = prepared.root / "nnUNet_raw" / prepared.dataset / "imagesTr"
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, plans=with_overrides(
        prepared, size_prior=0.1, size_images=str(images), ewc=1.0))
    trainer.on_train_start()
    assert trainer.known_rows == [1] and list(trainer.size_prior.sizes_mm3) == [0, 1, 2]
    masks = [np.asarray(trainer.dataset_class(trainer.preprocessed_dataset_folder, [c]).load_case(c)[1][:])
             for c in trainer.do_split()[0]]
    expected = [np.mean([np.isin(m, values).sum() for m in masks]) for values in ([1, 2], [2], [3])]
    assert list(trainer.size_prior.sizes_mm3.values()) == pytest.approx(expected)
    assert torch.all(trainer.start_penalty.fisher["decoder.seg_layers.1.weight"][[0, 2]] == 0)


@pytest.mark.slow
def test_a_2d_configuration_counts_slices_with_their_own_distance(tmp_path, monkeypatch):
    (tmp_path / "nnUNet").mkdir()
    prepared = prepare(tmp_path / "nnUNet", configuration="2d", spacing_mm=(1.0, 1.0, 2.5)).activate(monkeypatch)
    images = prepared.root / "nnUNet_raw" / prepared.dataset / "imagesTr"
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, configuration="2d", plans=with_overrides(
        prepared, size_prior=0.1, size_images=str(images)))
    trainer.on_train_start()
    raw = [np.isin(np.asarray(tiny.nibabel.load(images.parent / "labelsTr" / f"{c}.nii.gz").dataobj), [1]).sum() * 2.5
           for c in trainer.do_split()[0]]
    assert all(v.voxel_mm3 == 2.5 for v in trainer.size_prior.volumes)
    assert trainer.size_prior.sizes_mm3[1] == pytest.approx(np.mean(raw))
    ratios, gradient = trainer.size_prior.measure(trainer.bare_network, trainer.size_prior.volumes[0])
    assert len(ratios) == 3 and gradient


def test_what_a_training_with_options_leaves_is_a_stock_checkpoint(unlabelled):
    checkpoint = final(run(unlabelled, l2_sp=0.1, ewc=0.1, size_prior=0.1, stop_patience=20))
    stock = build("nnUNetTrainer", unlabelled)
    stock.initialize()
    stock.network.load_state_dict(checkpoint["network_weights"], strict=True)
    assert json.dumps(checkpoint["dante"]["options"])
