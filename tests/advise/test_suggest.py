"""suggest.py: on a donor that can do its task, each kind of change of the data set leads to another suggestion."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK
import tiny
import torch
from click.testing import CliRunner
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_dante.advise import suggest as module
from nnunet_dante.advise.probe import _loss, cut_patches
from nnunet_dante.advise.rules import choose
from nnunet_dante.advise.suggest import suggest
from nnunet_dante.cli import main
from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.errors import ConfigurationError, TransferError
from nnunet_dante.models.network import build_network
from nnunet_dante.transfers.transfer import fit


@pytest.fixture(scope="session")
def skilled_donor(tmp_path_factory):
    """A model folder whose network segments tiny.py's boxes: trained for 60 steps on eight other cases."""
    root = tmp_path_factory.mktemp("skilled")
    folder = tiny.write_model_folder(root / "results")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed"):
            patch.setenv(name, str(root / name))
        (root / "nnUNet_raw").mkdir()
        target = open_target(tiny.write_raw_dataset(root / "nnUNet_raw", n_cases=8, seed=7))
    plans = json.loads((folder / "plans.json").read_text())
    patches = cut_patches(list(target.cases.values()), plans, "3d_fullres", target.dataset_json, ["organ", "lesion"])
    network = build_network(plans, target.dataset_json, "3d_fullres")
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    network.load_state_dict(checkpoint["network_weights"])
    images, labels = (torch.cat([getattr(p, part) for p in patches]) for part in ("image", "labels"))
    optimiser, loss = torch.optim.AdamW(network.parameters(), 1e-2), _loss(target.dataset_json, False)
    for _ in range(60):
        optimiser.zero_grad()
        loss(network(images)[0], labels).backward()
        optimiser.step()
    torch.save(checkpoint | {"network_weights": network.state_dict()}, folder / "fold_0" / "checkpoint_final.pth")
    return folder


@pytest.fixture
def data(nnunet_paths):
    """Return a function that writes a raw data set, and a fingerprint, which nnU-Net would start processes for."""
    def write(*, change=lambda image: image, change_mask=lambda mask: mask, splits=None, **options):
        dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], **({"n_cases": 3, "seed": 1} | options))
        for part, edit in (("imagesTr", change), ("labelsTr", change_mask)):
            for file in (nnunet_paths["nnUNet_raw"] / dataset / part).iterdir():
                old = SimpleITK.ReadImage(str(file))
                voxels = SimpleITK.GetArrayFromImage(old)
                new = SimpleITK.GetImageFromArray(edit(voxels).astype(voxels.dtype))
                new.CopyInformation(old)
                SimpleITK.WriteImage(new, str(file))
        n = options.get("n_cases", 3)
        statistics = {"mean": 1.0, "median": 1.0, "std": 0.3, "min": 0.0, "max": 3.0, "percentile_00_5": 0.0,
                      "percentile_99_5": 2.5}
        folder = nnunet_paths["nnUNet_preprocessed"] / dataset
        folder.mkdir()
        (folder / "dataset_fingerprint.json").write_text(json.dumps({
            "spacings": [[1.0, 1.0, 1.0]] * n, "shapes_after_crop": [[18, 24, 20]] * n,
            "median_relative_size_after_cropping": 1.0, "foreground_intensity_properties_per_channel": {
                str(channel): statistics for channel in range(len(options.get("channel_names", "1")))}}))
        if splits:
            (folder / "splits_final.json").write_text(json.dumps(splits))
        return folder
    return write


def noisy(image):
    return image + np.random.default_rng(0).normal(0, 1.5, image.shape)


def narrowed(mask):
    from scipy import ndimage

    return mask * ndimage.binary_erosion(mask > 0, iterations=2)


def test_the_same_domain_keeps_the_donor_and_writes_nothing(data, skilled_donor):
    folder = data()
    found = suggest(skilled_donor, 901)
    assert found.rule.keep and found.rule.trainer == "nnUNetTrainerHeadOnly" and found.situation.zero_shot > 0.9
    said = str(found)
    assert "Use the donor as it is, or train" in said and "nnUNetv2_predict_from_modelfolder" in found.commands[0]
    assert "the donor does well, so there is little to explain" in said
    assert "never ends worse than the donor" in said
    assert [file.name for file in folder.iterdir()] == ["dataset_fingerprint.json"]


def test_inverted_contrast_is_found_and_trains_norms_and_stem(data, skilled_donor):
    data(change=lambda image: -image)
    found = suggest(skilled_donor, 901)
    assert found.situation.zero_shot < 0.1 and found.situation.zero_shot_inverted > 0.9 and not found.rule.keep
    assert (found.rule.trainer, found.rule.order, found.rule.rank) == ("nnUNetTrainerLoRA", "input_first", 16)
    assert "--invert" in found.commands[0] and "rank 16, alpha 32" in str(found)


def test_gradients_tell_changed_images_from_changed_labels(data, skilled_donor):
    data(change=noisy, dataset_id=901)
    data(change_mask=narrowed, dataset_id=902)
    images, labels = suggest(skilled_donor, 901), suggest(skilled_donor, 902)
    assert images.situation.gradient_ratio > 1.3 * labels.situation.gradient_ratio
    assert labels.rule.trainer == "nnUNetTrainerDecoderOnly" and "the labels changed" in str(labels)


def test_new_labels_train_the_decoder(data, skilled_donor):
    data(labels={"background": 0, "organ": 1, "vessel": 2})
    found = suggest(skilled_donor, 901)
    assert found.situation.new == ("vessel",) and found.rule.trainer == "nnUNetTrainerDecoderOnly"
    assert "known to the donor: organ; new: vessel" in str(found)
    assert "your vessel and the donor's lesion (both have the number 2)" in str(found)
    assert all("-tr nnUNetTrainerDecoderOnly" in command for command in found.commands), "transfer prints the same trainer"


def test_a_new_channel_trains_the_layer_that_reads_it(data, skilled_donor):
    """It starts with zero kernels; a trainer that freezes the stem could never use it."""
    data(channel_names={"0": "MRI", "1": "T2"})
    found = suggest(skilled_donor, 901)
    assert found.situation.holds and found.situation.new_channels == ("T2",)
    assert found.rule.trainer == "nnUNetTrainerLoRA" and not found.rule.keep


def test_no_known_label_cannot_be_scored(data, skilled_donor):
    data(labels={"background": 0, "a": 1, "b": 2})
    found = suggest(skilled_donor, 901)
    assert found.situation.zero_shot is None and found.situation.gradient_ratio is None
    assert "cannot be measured: the donor knows none of your labels" in str(found)


def test_one_case_is_trained_with_fold_all(data, skilled_donor):
    data(n_cases=1)
    found = suggest(skilled_donor, 901)
    assert (found.situation.cases, found.fold, found.probed) == (1, "all", ("case_000",))
    assert " Dataset901_Tiny 3d_fullres all " in found.commands[-1]


SPLITS = [{"train": ["case_001"], "val": ["case_000"]}, {"train": ["case_001", "case_002"], "val": ["case_000"]}]


def test_only_training_cases_of_the_fold_are_looked_at(data, skilled_donor):
    data(splits=SPLITS)
    assert suggest(skilled_donor, 901).probed == ("case_001",)
    found = suggest(skilled_donor, 901, train_fold=1)
    assert found.probed == ("case_001", "case_002") and found.situation.cases == 2 and " 1 -p" in found.commands[-1]
    assert suggest(skilled_donor, 901, train_fold="all").situation.cases == 3
    with pytest.raises(ConfigurationError, match="--train-fold 2 does not exist: Dataset901_Tiny has 2 folds"):
        suggest(skilled_donor, 901, train_fold=2)


def test_without_a_split_the_training_cases_are_those_that_the_training_will_have(data, skilled_donor):
    """nnU-Net makes the split when the first training starts, always the same one; transfer with few cases."""
    data(n_cases=5)
    (validation,) = generate_crossval_split([f"case_{n:03d}" for n in range(5)])[0]["val"]
    found = suggest(skilled_donor, 901)
    assert found.situation.cases == 4 and validation not in found.probed
    data(n_cases=3, dataset_id=902)
    assert suggest(skilled_donor, 902).probed == ("case_001", "case_002")


def test_a_fold_with_a_case_that_is_gone(data, skilled_donor):
    data(splits=[{"train": ["case_007"], "val": ["case_000"]}])
    with pytest.raises(TransferError, match="names cases that imagesTr does not hold: case_007"):
        suggest(skilled_donor, 901)


@pytest.mark.parametrize("text", ["{", "3", '[{"val": []}]', '[{"train": 3}]', '[{"train": [["case_000"]]}]', "[[]]"])
def test_damaged_folds_are_named(data, skilled_donor, text):
    (data() / "splits_final.json").write_text(text)
    with pytest.raises(TransferError, match=r"splits_final.json"):
        suggest(skilled_donor, 901)


def test_invert_is_not_advised_where_transfer_would_refuse_it(data, skilled_donor, monkeypatch):
    def as_ct(*arguments, **options):
        plans, report, *rest = fit(*arguments, **options)
        return plans, replace(report, channels=tuple(replace(c, scheme="CTNormalization") for c in report.channels)), *rest

    monkeypatch.setattr(module, "fit", as_ct)
    data(change=lambda image: -image)
    found = suggest(skilled_donor, 901)
    assert found.situation.inverted and not any("--invert" in command for command in found.commands)
    assert "exchange them in your image files, as --invert cannot with CTNormalization" in str(found)


def test_command_line_prints_commands_that_parse(data, skilled_donor):
    data(change=lambda image: -image)
    done = CliRunner().invoke(main, ["suggest", "-d", "901", "--from", str(skilled_donor), "-c", "3d_fullres"])
    assert done.exit_code == 0, done.output
    transfer = shlex.split(done.output.splitlines()[-2])
    assert transfer == ["nnunet-dante", "transfer", str(skilled_donor), "-d", "Dataset901_Tiny", "--preprocess", "-c",
                        "3d_fullres", "--rank", "16", "--alpha", "32", "--invert", "MRI"]
    assert main.commands["transfer"].make_context("transfer", transfer[2:])
    assert "spacing    1.00 x 1.00 x 1.00 times the donor's" in done.output
    assert "MRI: foreground mean +2.00 standard deviations from the donor's; ZScoreNormalization takes" in done.output


def test_no_table_of_other_data_overrules_what_was_measured_on_the_own_cases(data, skilled_donor):
    data(change=lambda image: image * 1.1, n_cases=5)
    found = suggest(skilled_donor, 901)
    assert found.rule.trainer == choose(found.situation).trainer
    assert "inverted contrast" not in str(found).replace("with inverted contrast", "") and "simulated" not in str(found)
