"""transfer.py: from a donor and a raw data set to files with which stock nnU-Net preprocesses and trains."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import pytest
import tiny
import torch
from arithmetic import tolerance
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunet_dante.errors import ConfigurationError, DanteError, DonorError, TransferError
from nnunet_dante.models.checkpoint import alias_sets, file_sha256, load_checkpoint_safely
from nnunet_dante.models.network import build_network
from nnunet_dante.models.settings import read_dante_block
from nnunet_dante.transfers.transfer import transfer

TARGET_LABELS = {"background": 0, "lesion": 1, "organ": 2, "vessel": 3}
REGIONS = {"background": 0, "whole": [1, 2], "lesion": 2}


@dataclasses.dataclass(frozen=True)
class Place:
    """nnU-Net's folders, with a target data set and its fingerprint in them."""

    paths: dict[str, Path]
    dataset: str

    @property
    def folder(self) -> Path:
        return self.paths["nnUNet_preprocessed"] / self.dataset

    def donor(self, **options) -> Path:
        return tiny.write_model_folder(self.paths["nnUNet_results"], **options)

    def plans(self, name="nnUNetDantePlans") -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())

    def start(self, configuration="3d_fullres") -> dict:
        return torch.load(self.folder / f"nnUNetDantePlans_{configuration}_start.pth", weights_only=True)


@pytest.fixture
def place(nnunet_paths):
    def make(*, channel_names=None, n_cases=5, shape=(20, 24, 18), **options) -> Place:
        dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], channel_names=channel_names, n_cases=n_cases,
                                         shape=shape, **options)
        place = Place(nnunet_paths, dataset)
        tiny.write_fingerprint(place.folder, n_cases=n_cases, channels=len(channel_names or "1"), shape=shape)
        return place

    return make


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"])
def test_start_weights_fit_the_network_of_the_written_plans(place, architecture, configuration):
    place = place(labels=TARGET_LABELS, values=(2, 1, 3), channel_names={"0": "T2", "1": "MRI"})
    report = transfer(place.donor(architecture=architecture, configuration=configuration), place.dataset)
    plans = place.plans()
    content = json.loads((place.folder / "dataset.json").read_text())
    network = build_network(plans, content, configuration)
    start = place.start(configuration)["network_weights"]
    assert list(start) == list(network.state_dict())
    assert alias_sets(start) == alias_sets(network.state_dict())
    network.load_state_dict(start)
    entry = read_dante_block(plans)["start_weights"][configuration]
    assert entry["sha256"] == file_sha256(place.folder / entry["file"]) == report.start_weights_sha256
    assert entry["label_map"] == {"background": "background", "lesion": "lesion", "organ": "organ", "vessel": None}
    assert entry["channel_map"] == {"T2": None, "MRI": "MRI"}
    assert report.previous_stage.matched == (("lesion", "organ") if "cascade" in configuration else ())


def test_same_labels_and_channels_copy_everything_and_predict_the_same(place):
    place = place()
    folder = place.donor()
    report = transfer(folder, place.dataset)
    assert report.weights_copied == 1.0
    donor = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    start = place.start()["network_weights"]
    assert all(torch.equal(start[k], donor[k]) for k in donor)


def test_an_inverted_channel_gives_the_donors_answer_to_the_negated_image(place):
    place = place()
    folder = place.donor()
    report = transfer(folder, place.dataset, invert=["MRI"])
    assert "bright and dark exchanged in MRI" in str(report)
    assert place.start()["dante"]["inverted_channels"] == ["MRI"]
    donor = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    network, x = tiny.plain_unet(), torch.randn(1, 1, 16, 16, 16)
    network.load_state_dict(donor)
    before = network(-x)[0]
    network.load_state_dict(place.start()["network_weights"])
    assert torch.equal(network(x)[0], before)


def test_only_channels_with_mean_zero_can_be_inverted(place):
    place = place(channel_names={"0": "CT"})
    with pytest.raises(ConfigurationError, match="normalised by CTNormalization"):
        transfer(place.donor(channel_names={"0": "CT"}, normalization="CTNormalization"), place.dataset, invert=["CT"])


def test_known_labels_keep_their_logits_and_new_ones_never_win(place):
    place = place(labels=TARGET_LABELS, values=(2, 1, 3))
    folder = place.donor()
    transfer(folder, place.dataset)
    before = tiny.plain_unet()
    before.load_state_dict(torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"])
    after = tiny.plain_unet(classes=4)
    after.load_state_dict(place.start()["network_weights"])
    x = torch.randn(1, 1, 16, 16, 16)
    for old, new in zip(before(x), after(x)):
        head = tolerance(5)  # four features and a bias
        assert torch.allclose(new[:, [0, 2, 1]], old, rtol=0, atol=head)
        assert (new[:, 3] <= old.amax(1) + head).all()


def test_softmax_donor_to_regions_and_back(place):
    place = place(labels=REGIONS, regions_class_order=[1, 2])
    report = transfer(place.donor(labels={"background": 0, "organ": 1, "lesion": 2}), place.dataset)
    assert (report.labels.matched, report.labels.new, report.labels.dropped) == (("lesion",), ("whole",), ("organ",))
    assert "sigmoid regions (donor: softmax labels" in str(report)
    assert place.start()["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 2


def test_share_of_copied_weights_counts_moved_rows_but_not_new_ones(place):
    swapped = place(labels={"background": 0, "lesion": 1, "organ": 2}, values=(2, 1))
    folder = swapped.donor()
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    for tensor in checkpoint["network_weights"].values():
        tensor.copy_(torch.randn_like(tensor))  # as after training: no two biases are equal
    torch.save(checkpoint, path)
    assert transfer(folder, swapped.dataset).weights_copied == 1.0
    content = json.loads((swapped.paths["nnUNet_raw"] / swapped.dataset / "dataset.json").read_text())
    content["labels"] = TARGET_LABELS
    (swapped.paths["nnUNet_raw"] / swapped.dataset / "dataset.json").write_text(json.dumps(content))
    heads, total = 2, sum(p.numel() for p in tiny.plain_unet(classes=4).parameters())
    new_rows = 8 + 4 + heads  # one row of 8 and one of 4 weights, one bias each
    assert transfer(folder, swapped.dataset).weights_copied == pytest.approx(1 - new_rows / total)


def test_donors_source_forms_give_the_same_start_weights(place):
    place = place()
    folder = place.donor()
    transfer(folder, place.dataset)
    first = place.start()["network_weights"]
    report = transfer(folder / "fold_0" / "checkpoint_final.pth", 901)
    assert all(torch.equal(first[k], v) for k, v in place.start()["network_weights"].items())
    assert report.donor["source"] == "checkpoint_final.pth"


def test_report_is_printed_saved_and_names_no_path(place):
    place = place(labels=TARGET_LABELS, values=(2, 1, 3), n_cases=3)
    report = transfer(place.donor(spacing_mm=(3.0, 1.0, 1.0)), place.dataset, overrides={"epochs": 3}, batch_size=4)
    text = (place.folder / "nnUNetDantePlans_3d_fullres_transfer.txt").read_text()
    data = json.loads((place.folder / "nnUNetDantePlans_3d_fullres_transfer.json").read_text())
    assert text == f"{report}\n"
    for part in ("matched: background, lesion, organ", "new: vessel", "sha256", "ratio 0.333 x 1 x 1", "batch 4",
                 "memory     about ", "GiB of a GPU for the network alone if every weight is trained, by nnU-Net's estimate",
                 "mirroring  axes 0, 1, 2", "ZScoreNormalization (donor's)", "epochs 3", "leave one case out",
                 "nnUNetv2_preprocess -d 901 -plans_name nnUNetDantePlans -c 3d_fullres",
                 "nnunet-dante train Dataset901_Tiny 3d_fullres 0 -p nnUNetDantePlans -tr nnUNetTrainerLoRA"):
        assert part in text
    assert data["labels"]["new"] == ["vessel"] and data["memory_gib"] == report.memory_gib > 0
    assert data["warnings"] == list(report.warnings)
    assert any("spacing" in w for w in report.warnings)
    for file in place.folder.glob("nnUNetDantePlans*"):
        assert str(place.paths["nnUNet_raw"].parent).encode() not in file.read_bytes()


def test_ct_to_mr_starts_from_the_ct_stem_with_mr_normalisation(place):
    place = place(channel_names={"0": "MR"})
    folder = place.donor(channel_names={"0": "CT"}, normalization="CTNormalization")
    report = transfer(folder, place.dataset)
    donor = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(place.start()["network_weights"][key], donor[key])
    assert report.plans.channels[0].scheme == "ZScoreNormalization"
    assert any("taken as another modality" in w for w in report.warnings)


@pytest.mark.parametrize(("intensity", "mean"), [("donor", 0.4), ("target", 9.0)])
def test_intensity_option(place, intensity, mean):
    place = place(channel_names={"0": "CT"})
    transfer(place.donor(channel_names={"0": "CT"}, normalization="CTNormalization"), place.dataset, intensity=intensity)
    assert place.plans()["foreground_intensity_properties_per_channel"]["0"]["mean"] == mean


def test_no_shared_label_is_a_warning_with_the_way_out(place):
    place = place(labels={"background": 0, "a": 1, "b": 2})
    report = transfer(place.donor(), place.dataset)
    assert any("give them the donor's names in dataset.json (organ, lesion)" in w for w in report.warnings)


def test_second_transfer_adds_a_configuration_and_keeps_the_first(place):
    place = place()
    transfer(place.donor(configuration="2d"), place.dataset, overrides={"epochs": 3})
    first = place.start("2d")
    transfer(place.donor(configuration="3d_fullres"), place.dataset)
    block = read_dante_block(place.plans())
    assert set(block["start_weights"]) == {"2d", "3d_fullres"}
    assert block["overrides"] == {"epochs": 3}
    assert all(torch.equal(v, place.start("2d")["network_weights"][k]) for k, v in first["network_weights"].items())


def test_overrides_that_a_repeated_transfer_removes_are_named(place):
    place = place()
    donor = place.donor()
    transfer(donor, place.dataset, overrides={"epochs": 3, "lr": 0.1, "l2_sp": 0.01})
    report = transfer(donor, place.dataset, overrides={"lr": 0.2})
    assert report.overrides == {"lr": 0.2}
    assert "! overrides removed: l2_sp 0.01, epochs 3." in str(report)
    assert "overrides removed" not in str(transfer(donor, place.dataset, overrides={"lr": 0.3}))


def test_a_renamed_label_is_pointed_out(place):
    place = place(labels={"background": 0, "Organs": 1, "vessel": 2})
    report = str(transfer(place.donor(), place.dataset))
    assert ("these labels may mean the same: your Organs and the donor's organ (similar names), your vessel and the "
            "donor's lesion (both have the number 2)") in report


def test_the_printed_command_names_the_trainer_that_was_asked_for(place):
    place = place()
    assert "-tr nnUNetTrainerDecoderOnly" in str(transfer(place.donor(), place.dataset, trainer="nnUNetTrainerDecoderOnly"))


def test_data_preprocessed_with_other_plans_are_reported(place):
    place = place()
    donor = place.donor()
    transfer(donor, place.dataset)
    (place.folder / "nnUNetDantePlans_3d_fullres").mkdir()
    assert not transfer(donor, place.dataset).notes
    plans = json.loads((donor / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    (donor / "plans.json").write_text(json.dumps(plans))
    assert "preprocess again" in transfer(donor, place.dataset).notes[0]


def test_one_case_is_told_to_train_fold_all(place):
    place = place(n_cases=1)
    text = str(transfer(place.donor(), place.dataset))
    assert "train with fold `all`" in text
    assert "nnunet-dante train Dataset901_Tiny 3d_fullres all -p" in text


def test_trainers_that_replace_the_network_are_named(place):
    place = place()
    folder = place.donor()
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    init = checkpoint["init_args"]
    network = build_network(init["plans"], init["dataset_json"], "3d_fullres", trainer_name="nnUNetTrainerBN")
    torch.save(checkpoint | {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainerBN"}, path)
    report = transfer(folder, place.dataset)
    assert "built by its trainer nnUNetTrainerBN" in str(report) and "-tr nnUNetTrainerLoRA" in str(report)
    assert place.plans()["dante"]["start_weights"]["3d_fullres"]["network_trainer"] == "nnUNetTrainerBN"


@pytest.mark.slow  # 23 million weights: nnU-Net's trainers fix the size
@pytest.mark.parametrize("trainer", ["nnUNet_Primus_S_Trainer", "nnUNet_PrimusV2S_Trainer"])
def test_primus_keeps_what_does_not_depend_on_the_labels(place, trainer):
    place = place(labels=TARGET_LABELS, values=(2, 1, 3), channel_names={"0": "T2", "1": "MRI"})
    folder = place.donor()
    path = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    init = checkpoint["init_args"]
    old = build_network(init["plans"], init["dataset_json"], "3d_fullres", trainer_name=trainer)
    torch.save(checkpoint | {"network_weights": old.state_dict(), "trainer_name": trainer}, path)
    report = transfer(folder, place.dataset)
    content = json.loads((place.folder / "dataset.json").read_text())
    new = build_network(place.plans(), content, "3d_fullres", trainer_name=trainer)
    new.load_state_dict(place.start()["network_weights"])
    assert all(name.startswith("up_projection") for name in report.reinitialised)
    assert 0.9 < report.weights_copied < 1.0
    old.eval(), new.eval()
    x = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        assert torch.allclose(old.down_projection(x[:, 1:]), new.down_projection(x), atol=1e-5)


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"configuration": "2d"}, DonorError, "trained for configuration '3d_fullres'; -c asks for '2d'"),
    ({"plans_name": "a__b"}, ConfigurationError, "must not be empty, and must not hold '__'"),
    ({"plans_name": "../x"}, ConfigurationError, "The plans name is '../x'"),
    ({"intensity": "both"}, ConfigurationError, "choose 'donor' or 'target'"),
    ({"invert": ["T2"]}, ConfigurationError, "has the channels MRI"),
    ({"overrides": {"epochs": 0}}, ConfigurationError, "a whole number of at least 1"),
    ({"checkpoint": "checkpoint_best.pth"}, DonorError, "it holds fold_0/checkpoint_final.pth"),
])
def test_bad_options_write_nothing(place, options, error, message):
    place = place()
    before = sorted(place.folder.iterdir())
    with pytest.raises(error, match=message):
        transfer(place.donor(), place.dataset, **options)
    assert sorted(place.folder.iterdir()) == before


def test_plans_of_nnunets_planner_are_never_overwritten(place):
    place = place()
    (place.folder / "nnUNetPlans.json").write_text(json.dumps(tiny.plans(place.dataset)))
    before = sorted(place.folder.iterdir())
    with pytest.raises(ConfigurationError, match="so they are not changed. Choose another name with -p"):
        transfer(place.donor(), place.dataset, plans_name="nnUNetPlans")
    assert sorted(place.folder.iterdir()) == before


@pytest.mark.parametrize("text", ["{", '"text"', "[" * 100_000])
def test_damaged_plans_of_the_same_name_are_named(place, text):
    place = place()
    (place.folder / "nnUNetDantePlans.json").write_text(text)
    with pytest.raises(ConfigurationError, match="exists and holds no plans"):
        transfer(place.donor(), place.dataset)


def test_two_dimensional_images_are_refused_for_a_three_dimensional_donor(place):
    place = place(shape=(20, 24, 1))
    with pytest.raises(TransferError, match="holds 2D images .* 3D with patch"):
        transfer(place.donor(), place.dataset)


def test_every_refusal_is_a_dante_error(place):
    place = place()
    folder = place.donor()
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DanteError, match="truncated, damaged or no torch file"):
        transfer(folder, place.dataset)


def test_stock_nnunet_takes_plans_data_and_start_weights(prepared):
    """The session's shared data set went through the real fingerprint extractor and nnU-Net's preprocessing."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    plans = json.loads((prepared.preprocessed / "nnUNetDantePlans.json").read_text())
    content = json.loads((prepared.preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans | {"continue_training": False}, "3d_fullres", 0, content, torch.device("cpu"))
    trainer.initialize()
    start = prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    load_pretrained_weights(trainer.network, str(start))
    weights = load_checkpoint_safely(start)["network_weights"]
    loaded = trainer.network.state_dict()
    assert all(torch.equal(loaded[k], weights[k]) for k in loaded if "seg_layers" not in k)
    train, _ = trainer.get_tr_and_val_datasets()
    data, seg, *_ = train.load_case(train.identifiers[0])
    assert data.shape[0] == 1
    assert sorted(set(seg[:].ravel().tolist()) - {-1}) == [0, 1, 2, 3]


def test_a_donor_of_the_same_number_is_told_apart_by_name_and_refused_by_number(place):
    place = place()
    donor = place.donor(dataset="Dataset901_Donor")
    before = sorted(place.folder.iterdir())
    with pytest.raises(TransferError, match="number 901 is used twice.*Dataset901_Donor"):
        transfer(donor, 901)
    assert sorted(place.folder.iterdir()) == before
    text = str(transfer(donor, place.dataset))
    assert "again, with --preprocess: nnUNetv2_preprocess takes a number" in text
    assert f"nnunet-dante train {place.dataset} 3d_fullres" in text


def test_preprocessing_goes_by_name_where_a_number_would_not_do(place):
    place = place(n_cases=2)
    transfer(place.donor(dataset="Dataset901_Donor"), place.dataset, preprocess=True, num_processes=1)
    assert {p.name for p in (place.folder / "gt_segmentations").iterdir()} == {"case_000.nii.gz", "case_001.nii.gz"}
    assert len(list((place.folder / "nnUNetDantePlans_3d_fullres").glob("*.pkl"))) == 2


def test_images_stored_another_way_than_the_donors_are_named(place):
    place = place()
    folder = place.donor()
    (folder / "fold_0" / "validation").mkdir()
    raw = place.paths["nnUNet_raw"] / place.dataset
    image = nibabel.load(raw / "imagesTr" / "case_000_0000.nii.gz")
    nibabel.save(image, folder / "fold_0" / "validation" / "x.nii.gz")
    assert not transfer(folder, place.dataset).notes
    written = (place.folder / "dataset_fingerprint.json").stat().st_mtime
    for path in (raw / "imagesTr" / "case_001_0000.nii.gz", raw / "labelsTr" / "case_001.nii.gz"):
        nibabel.save(nibabel.load(path).as_reoriented([[0, -1], [1, 1], [2, 1]]), path)
        os.utime(path, (written, written))
    report = transfer(folder, place.dataset)
    assert report.orientation.startswith("your images RAS (4 cases), LAS (1 case); the donor's images RAS")
    assert any("1 of 5 cases" in note and "case_001 (LAS)" in note for note in report.notes)


def test_a_damaged_split_is_refused_before_anything_is_written(place):
    place = place()
    (place.folder / "splits_final.json").write_text("[1]")
    before = sorted(place.folder.iterdir())
    with pytest.raises(TransferError, match=r"splits_final\.json"):
        transfer(place.donor(), place.dataset)
    assert sorted(place.folder.iterdir()) == before


def test_data_preprocessed_before_the_images_changed_are_reported(place):
    place = place()
    donor = place.donor()
    transfer(donor, place.dataset)
    data = place.folder / "nnUNetDantePlans_3d_fullres"
    data.mkdir()
    (data / "case_000.pkl").write_bytes(b"")
    assert not transfer(donor, place.dataset).notes
    os.utime(data / "case_000.pkl", (1e9, 1e9))
    assert "before images or masks were changed: preprocess again" in transfer(donor, place.dataset).notes[0]


@pytest.mark.slow
def test_nnunets_own_command_preprocesses_with_the_printed_line(place):
    place = place(labels=TARGET_LABELS, values=(2, 1, 3))
    report = transfer(place.donor(configuration="3d_cascade_fullres"), place.dataset)
    name, *arguments = report.preprocess.split()
    subprocess.run([str(Path(sys.executable).with_name(name)), *arguments], check=True, env=os.environ)
    assert {p.name for p in place.folder.iterdir() if p.is_dir()} == {
        "nnUNetDantePlans_3d_fullres", "nnUNetDantePlans_3d_lowres", "gt_segmentations"}
