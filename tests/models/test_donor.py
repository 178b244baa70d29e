"""donor.py: a model folder, its zip and its bare checkpoint are the same donor; what cannot be one is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from nnunet_dante.errors import DonorError, UntrustedFileError
from nnunet_dante.models.archive import find_models, unpack, without_records
from nnunet_dante.models.checkpoint import file_sha256, unique_tensors, weights_sha256
from nnunet_dante.models.donor import open_donor


def checkpoint_of(folder: Path) -> Path:
    return next(folder.glob("fold_*/*.pth"))


def edit_checkpoint(path: Path, edit) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_cascade_fullres"])
def test_folder_zip_and_checkpoint_are_the_same_donor(tmp_path, architecture, configuration):
    folder = tiny.write_model_folder(tmp_path / "results", architecture=architecture, configuration=configuration)
    donors = [open_donor(folder), open_donor(tiny.zip_folder(tmp_path / "results", tmp_path / "m.zip")),
              open_donor(checkpoint_of(folder))]
    assert len({weights_sha256(d.weights) for d in donors}) == 1
    for donor in donors:
        assert donor.plans == donors[0].plans
        assert donor.dataset_json == donors[0].dataset_json
        assert donor.sha256 == file_sha256(checkpoint_of(folder))
        assert (donor.configuration, donor.fold, donor.trainer_name) == (configuration, "0", "nnUNetTrainer")
        assert donor.mirroring_axes == ((0, 1) if configuration == "2d" else (0, 1, 2))
        assert donor.dataset_name == "Dataset900_Donor"
    assert [d.source for d in donors] == [folder.name, "m.zip", "checkpoint_final.pth"]


def test_provenance_names_no_path_of_this_machine(tmp_path):
    donor = open_donor(tiny.write_model_folder(tmp_path))
    assert str(tmp_path) not in json.dumps(donor.provenance())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compile_are_stripped(tmp_path, prefix):
    folder = tiny.write_model_folder(tmp_path)
    before = weights_sha256(open_donor(folder).weights)
    edit_checkpoint(checkpoint_of(folder),
                    lambda c: c.update(network_weights={prefix + k: v for k, v in c["network_weights"].items()}))
    assert weights_sha256(open_donor(folder).weights) == before


def test_split_aliases_are_joined_and_contradicting_ones_refused(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    whole = open_donor(folder).weights
    edit_checkpoint(checkpoint_of(folder), lambda c: c.update(
        network_weights={k: v.clone() for k, v in c["network_weights"].items()}))
    joined = open_donor(folder).weights
    assert list(joined) == list(whole)
    assert list(unique_tensors(joined)) == list(unique_tensors(whole))
    key = "encoder.stages.0.0.convs.0.all_modules.0.weight"
    edit_checkpoint(checkpoint_of(folder), lambda c: c["network_weights"][key].add_(1))
    with pytest.raises(DonorError, match="two values: encoder.*differ"):
        open_donor(folder)


def test_fold_all_is_preferred_then_the_lowest_and_the_option_wins(tmp_path):
    folder = tiny.write_model_folder(tmp_path, fold=3)
    for fold in ("1", "all"):
        shutil.copytree(folder / "fold_3", folder / f"fold_{fold}")
        edit_checkpoint(folder / f"fold_{fold}" / "checkpoint_final.pth",
                        lambda c, fold=fold: c["init_args"].update(fold=fold))
    assert open_donor(folder).fold == "all"
    assert open_donor(folder, fold=3).fold == "3"
    shutil.rmtree(folder / "fold_all")
    assert open_donor(folder).fold == "1"


def test_a_folder_of_models_needs_a_configuration(tmp_path):
    tiny.write_model_folder(tmp_path, configuration="2d")
    tiny.write_model_folder(tmp_path, configuration="3d_fullres")
    assert open_donor(tmp_path, configuration="2d").configuration == "2d"
    with pytest.raises(DonorError, match=r"holds 2 models.*__2d.*__3d_fullres.*-c"):
        open_donor(tmp_path)


def test_the_trainers_network_is_tried_when_that_of_the_plans_does_not_fit(tmp_path):
    from nnunet_dante.models.network import build_network

    folder = tiny.write_model_folder(tmp_path)
    plans, content = (json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json"))
    network = build_network(plans, content, "3d_fullres", trainer_name="nnUNetTrainerBN")
    edit_checkpoint(checkpoint_of(folder), lambda c: c.update(network_weights=network.state_dict(),
                                                              trainer_name="nnUNetTrainerBN"))
    donor = open_donor(folder)
    assert donor.network_trainer == "nnUNetTrainerBN"
    assert "encoder.stages.0.0.convs.0.norm.running_mean" in donor.weights


def test_a_two_dimensional_donor_is_refused_for_a_three_dimensional_configuration(tmp_path):
    folder = tiny.write_model_folder(tmp_path, configuration="2d")
    with pytest.raises(DonorError, match=r"trained for configuration '2d'; -c asks for '3d_fullres'"):
        open_donor(folder, configuration="3d_fullres")


@pytest.mark.parametrize(("edit", "message"), [
    (lambda c: c["network_weights"].popitem(), r"disagree \(1 differences; first: decoder.*missing"),
    (lambda c: c["network_weights"].update(extra=torch.ones(1)), "extra is not part of the network"),
    (lambda c: c["network_weights"].update({"decoder.seg_layers.0.bias": torch.ones(7)}), r"\(7,\), the network \(3,\)"),
    (lambda c: c["network_weights"]["decoder.seg_layers.0.bias"].fill_(float("nan")), "NaN or infinite"),
    (lambda c: c.pop("network_weights"), "holds no 'network_weights'"),
    (lambda c: c.update(network_weights={"a": 1}), "holds no 'network_weights'"),
])
def test_damaged_weights_are_refused(tmp_path, edit, message):
    folder = tiny.write_model_folder(tmp_path)
    edit_checkpoint(checkpoint_of(folder), edit)
    with pytest.raises(DonorError, match=message):
        open_donor(folder)


def test_unknown_architecture_is_named(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "my_package.MyNet"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(DonorError, match=r"my_package\.MyNet.*cannot be built"):
        open_donor(folder)


def test_bare_checkpoint_without_plans_is_refused(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    edit_checkpoint(checkpoint_of(folder), lambda c: c.pop("init_args"))
    alone = Path(shutil.copy(checkpoint_of(folder), tmp_path / "alone.pth"))
    with pytest.raises(DonorError, match="no 'init_args'.*Give the model folder"):
        open_donor(alone)


def test_sources_that_are_no_model(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    with pytest.raises(DonorError, match="does not exist; give an nnU-Net model folder"):
        open_donor(tmp_path / "nothing")
    with pytest.raises(DonorError, match="one fold of a model; give the folder above it and --fold 0"):
        open_donor(folder / "fold_0")
    with pytest.raises(DonorError, match="holds fold_0/checkpoint_final.pth|it holds fold_0/checkpoint_final.pth"):
        open_donor(folder, checkpoint="checkpoint_best.pth")
    with pytest.raises(DonorError, match="in fold_4 of"):
        open_donor(folder, fold=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DonorError, match="holds no nnU-Net model"):
        open_donor(tmp_path / "empty")
    (folder / "plans.json").write_text("{")
    with pytest.raises(DonorError, match=r"plans\.json of the model cannot be read"):
        open_donor(folder)


@pytest.mark.parametrize("name", ["../../plans.json", "/tmp/plans.json", "a\\..\\..\\plans.json", "C:plans.json",
                                  "C:/a/plans.json", "//server/share/plans.json"])
def test_zip_entries_that_leave_the_archive_are_refused(tmp_path, name):
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "{}")
    with pytest.raises(DonorError, match="leads out of the archive"):
        open_donor(path)


def test_truncated_zip_and_zip_bomb(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "results")
    path = tiny.zip_folder(folder, tmp_path / "m.zip")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DonorError, match=r"m\.zip \(2000 bytes\) is truncated"):
        open_donor(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("plans.json", b"0" * (300 << 20))
    with pytest.raises(DonorError, match="absurd size"):
        open_donor(path)


def test_many_entries_cannot_unpack_to_more_than_one_may(tmp_path):
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"{number}/plans.json", b"0" * (10 << 20))
    with pytest.raises(DonorError, match="absurd size"):
        open_donor(path)


def test_a_link_in_a_zip_is_no_link_when_unpacked(tmp_path):
    (tmp_path / "secret").write_text('{"configurations": {}}')
    entry = zipfile.ZipInfo("m/plans.json")
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr(entry, str(tmp_path / "secret"))
    unpack(tmp_path / "m.zip", tmp_path / "out")
    assert (tmp_path / "out" / "m" / "plans.json").read_text() == str(tmp_path / "secret")
    assert not (tmp_path / "out" / "m" / "plans.json").is_symlink()


@pytest.mark.parametrize("axes", [[0, 7], "012", 5])
def test_mirroring_axes_that_are_none_are_refused(tmp_path, axes):
    folder = tiny.write_model_folder(tmp_path)
    edit_checkpoint(checkpoint_of(folder), lambda c: c.update(inference_allowed_mirroring_axes=axes))
    with pytest.raises(DonorError, match="may be mirrored"):
        open_donor(folder)


def test_pickle_bomb_inside_a_zip_is_not_run(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "results")
    edit_checkpoint(checkpoint_of(folder), lambda c: c.update(extra=Path("x")))
    with pytest.raises(UntrustedFileError, match="Path"):
        open_donor(tiny.zip_folder(folder, tmp_path / "m.zip"))
    assert open_donor(folder, trust=True).configuration == "3d_fullres"


def test_plans_and_labels_beside_weights_alone_are_a_donor(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "results")
    whole = open_donor(folder)
    file = tiny.slim(folder)
    zipped = tiny.zip_folder(folder, tmp_path / "m.zip", f"{folder.name}/")
    for donor in (open_donor(folder), open_donor(file), open_donor(zipped)):
        assert (donor.configuration, donor.trainer_name, donor.fold) == ("3d_fullres", "nnUNetTrainer", "0")
        assert weights_sha256(donor.weights) == weights_sha256(whole.weights)
        assert (donor.plans, donor.dataset_json) == (whole.plans, whole.dataset_json)
        assert donor.mirroring_axes is None
    with pytest.raises(DonorError, match="trained for configuration '3d_fullres'; -c asks for '2d'"):
        open_donor(folder, configuration="2d")


@pytest.mark.parametrize("content", [lambda w: w, lambda w: {"model": w}, lambda w: {"state_dict": w, "epoch": 3},
                                     lambda w: {"network_weights": unique_tensors(w)}])
def test_weights_are_found_as_other_tools_keep_them_and_without_folds(tmp_path, content):
    folder = tiny.write_model_folder(tmp_path)
    whole = open_donor(folder).weights
    torch.save(content(dict(whole)), folder / "weights.pt")
    shutil.rmtree(folder / "fold_0")
    donor = open_donor(folder)
    assert weights_sha256(donor.weights) == weights_sha256(whole) and list(donor.weights) == list(whole)
    assert (donor.fold, donor.checkpoint_name) == ("unknown", "weights.pt")


def test_a_configuration_that_nothing_names_is_the_one_that_fits_or_must_be_chosen(tmp_path):
    for configuration in ("2d", "3d_fullres"):
        tiny.slim(tiny.write_model_folder(tmp_path, configuration=configuration)).parents[1].rename(tmp_path / configuration[:2])
    assert open_donor(tmp_path / "2d").configuration == "2d"
    with pytest.raises(DonorError, match=r"Nothing says .* fit 3d_fullres, 3d_lowres\. Choose with -c"):
        open_donor(tmp_path / "3d")
    assert open_donor(tmp_path / "3d", configuration="3d_lowres").configuration == "3d_lowres"
    with pytest.raises(DonorError, match="disagree"):
        open_donor(tmp_path / "3d", configuration="2d")


@pytest.mark.parametrize("facts", [("configuration",), ("configuration", "plans", "dataset_json", "fold")])
def test_a_bundle_of_monai_is_a_donor(tmp_path, facts):
    root = tiny.monai_bundle(tmp_path / "results", tmp_path / "bundle", facts=facts)
    whole = open_donor(tmp_path / "results")
    if "plans" in facts:
        (root / "models" / "plans.json").unlink()
    for donor in (open_donor(root), open_donor(root / "models"), open_donor(tiny.zip_folder(root, tmp_path / "b.zip"))):
        assert weights_sha256(donor.weights) == weights_sha256(whole.weights)
        assert (donor.configuration, donor.fold, donor.mirroring_axes) == ("3d_fullres", "0", (0, 1))
        assert donor.checkpoint_name == "model.pt"
    assert open_donor(root, checkpoint="best_model.pt").checkpoint_name == "best_model.pt"


def test_a_model_below_other_folders_is_found_in_a_zip_and_in_a_folder(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "release" / "v2" / "nnUNet_results")
    zipped = tiny.zip_folder(tmp_path / "release", tmp_path / "m.zip", "release/")
    assert [str(m.folder) for m in find_models(zipped)] == [f"release/v2/nnUNet_results/Dataset900_Donor/{folder.name}"]
    assert len(find_models(tmp_path / "release")) == 1
    assert open_donor(zipped).sha256 == open_donor(tmp_path / "release").sha256 == open_donor(folder).sha256


def test_a_network_of_a_trainer_that_nobody_here_has_is_named(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    edit_checkpoint(checkpoint_of(folder), lambda c: c.update(
        trainer_name="nnUNetTrainerUMambaBot", network_weights={"mamba.A_log": torch.ones(2)}))
    with pytest.raises(DonorError, match="trained by 'nnUNetTrainerUMambaBot', which is not installed, and its weights do"):
        open_donor(folder)


@pytest.mark.parametrize("name", ["plans.pkl", "m.model.pkl", "m.model"])
def test_models_of_nnunet_v1_are_recognised(tmp_path, name):
    for file in ("plans.pkl", "m.model.pkl"):
        (tmp_path / file).write_bytes(b"never read")
    torch.save({"state_dict": {"a": torch.ones(1)}, "plot_stuff": [], "epoch": 1}, tmp_path / "m.model")
    shutil.copy(tmp_path / "m.model", tmp_path / "renamed.pth")
    zipped = tiny.zip_folder(tmp_path, tmp_path.parent / f"{tmp_path.name}.zip", "Task001_X/")
    for source in (tmp_path / name, tmp_path, tmp_path / "renamed.pth", zipped):
        with pytest.raises(DonorError, match=r"nnU-Net v1.*nnUNetv2_convert_old_nnUNet_dataset"):
            open_donor(source)


def test_an_exported_zip_without_records_still_holds_the_model_and_no_names(tmp_path):
    folder, file = tiny.write_model_folder(tmp_path / "results"), tmp_path / "model.zip"
    for record in ("debug.json", "validation/summary.json"):
        (folder / "fold_0" / record).parent.mkdir(exist_ok=True)
        (folder / "fold_0" / record).write_text(f'"{tmp_path}/P01.nii.gz"')
    with zipfile.ZipFile(file, "w") as archive:
        for inner in folder.rglob("*.*"):
            archive.write(inner, inner.relative_to(tmp_path / "results"))
    before = open_donor(file)
    without_records(file)
    assert open_donor(file).sha256 == before.sha256
    with zipfile.ZipFile(file) as archive:
        assert not any(b"P01" in archive.read(name) for name in archive.namelist())
        assert not any("debug" in name or "summary" in name for name in archive.namelist())
