"""importer.py: a .model comes back as an nnU-Net model folder, bit for bit; what is not ours is named, never run."""

from __future__ import annotations

import json
import pickle
import uuid
from pathlib import Path

import pytest
import tiny
import torch

from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.dafne.export import export_model
from nnunet_dante.dafne.importer import describe, import_model
from nnunet_dante.dafne.model_file import read, write
from nnunet_dante.dafne.sources import settings_of
from nnunet_dante.errors import DafneError, DanteError, UntrustedFileError
from nnunet_dante.models.donor import open_donor

REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}


@pytest.fixture
def exported(tmp_path):
    return export_model(tiny.write_model_folder(tmp_path / "donor"), tmp_path / "Liver.model").model


def edited(path: Path, **changes) -> Path:
    content, _ = read(path)
    write(path, {**content, **changes})
    return path


@pytest.mark.parametrize("options", [{}, {"configuration": "2d"}, {"architecture": "ResidualEncoderUNet"}, REGIONS,
                                     {"channel_names": {"0": "T1", "1": "T2"}, "fold": "all"}], ids=str)
def test_there_and_back_is_the_same_model(tmp_path, options):
    folder = tiny.write_model_folder(tmp_path / "donor", **options)
    report = import_model(export_model(folder, tmp_path / "Liver.model").model, tmp_path / "back")
    before, after = open_donor(folder), open_donor(tmp_path / "back")
    assert list(after.weights) == list(before.weights)
    assert all(torch.equal(after.weights[key], tensor) for key, tensor in before.weights.items())
    assert (after.configuration, after.mirroring_axes, after.dataset_json, after.fold, after.network_trainer) == (
        before.configuration, before.mirroring_axes, before.dataset_json, before.fold, before.network_trainer)
    assert report.checkpoint.parent.name == f"fold_{before.fold}"


def test_the_description_says_the_strength_and_the_adapters_of_a_sum(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "donor")
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    for n, (dante, said) in enumerate((
            ({"strength": {"value": 0.4}}, "strength 0.4, where 1 is all"),
            ({"options": {"sources": ["0.5 x a", "0.5 x b"]}}, "sum of 0.5 x a\n  sum of 0.5 x b"))):
        torch.save(content | {"dante": dante}, file)
        text = inspect_path(export_model(folder, tmp_path / f"Liver{n}.model").model)
        assert said in text and text.count("strength") == len(dante.get("strength", ()))


def test_files_that_are_no_pickles_are_told_from_damaged_ones(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10" + bytes(7) + b'{"a": {}}       ')
    with pytest.raises(DafneError, match="x.safetensors is no .model file of Dafne; give one"):
        import_model(tmp_path / "x.safetensors", tmp_path / "back")


def test_stock_nnunet_predicts_with_the_imported_folder(exported, tmp_path):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    import_model(exported, tmp_path / "back")
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "back"), use_folds=(0,))
    weights = open_donor(tmp_path / "back").weights
    assert all(torch.equal(tensor, weights[key]) for key, tensor in predictor.list_of_parameters[0].items())


@pytest.mark.parametrize(("written", "said"), [(None, "off, as the model was trained"), ("missing", "does not say"),
                                               ((0, 2), "axes [0, 2]")])
def test_the_axes_of_mirroring_go_there_and_back_as_nnunet_writes_them(tmp_path, written, said):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    folder, key = tiny.write_model_folder(tmp_path / "donor"), "inference_allowed_mirroring_axes"
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False) | {key: written}
    if written == "missing":
        del content[key]
    torch.save(content, file)
    report = export_model(folder, tmp_path / "Liver.model", mirroring=True)
    assert f"mirroring: {said}" in str(report) or f"mirroring: off: the checkpoint {said}" in str(report)
    back = torch.load(import_model(report.model, tmp_path / "back").checkpoint, weights_only=False)
    assert back.get(key, "missing") == written
    assert open_donor(tmp_path / "back").mirroring_axes == open_donor(folder).mirroring_axes
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "back"), use_folds=(0,))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    predictor._internal_maybe_mirror_and_predict(torch.zeros(1, 1, 16, 16, 16))  # fails on an empty tuple


@pytest.mark.parametrize("trainer", ["nnUNetTrainerSpatialAdapter", "nnUNetTrainerAdaptFormer"])
def test_added_modules_go_there_and_back_and_their_trainer_is_named(tmp_path, trainer):
    folder = tiny.add_modules(tiny.write_model_folder(tmp_path / "donor"), trainer)
    report = import_model(export_model(folder, tmp_path / "Liver.model").model, tmp_path / "back")
    before, after = open_donor(folder), open_donor(tmp_path / "back")
    assert list(after.weights) == list(before.weights)
    assert all(torch.equal(after.weights[key], tensor) for key, tensor in before.weights.items())
    assert after.trainer_name == after.network_trainer == trainer
    assert trainer in str(report) and trainer in describe(tmp_path / "Liver.model")


def test_the_imported_model_keeps_its_model_id_when_it_is_exported_again(exported, tmp_path):
    edited(exported, model_id="given-by-a-server")
    import_model(exported, tmp_path / "back")
    assert export_model(tmp_path / "back", tmp_path / "Again.model").model_id == "given-by-a-server"


def with_settings(path: Path, change) -> Path:
    """The file with change(settings) made to its description of the network."""
    source = read(path)[0]["init_model_function"]
    settings = settings_of(source)
    change(settings)
    return edited(path, init_model_function=f"# nnunet-dante\ndef f():\n    SETTINGS = {settings!r}\n")


@pytest.mark.parametrize("fold", ["0/../../../outside", "../x", "/x", "", "0 ", None, 3])
def test_a_fold_cannot_lead_out_of_the_folder(exported, tmp_path, fold):
    with pytest.raises(DafneError, match="damaged: fold"):
        import_model(with_settings(exported, lambda s: s["origin"].update(fold=fold)), tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "outside").exists()


@pytest.mark.parametrize("change", [
    lambda s: s.pop("architecture"), lambda s: s.update(labels="organ"), lambda s: s["origin"].update(plans=[]),
    lambda s: s["origin"].update(mirroring_axes=[7]), lambda s: s["origin"].update(mirroring_axes="012"),
    lambda s: s.update(dimension=2), lambda s: s["origin"].pop("trainer"), lambda s: s.update(origin=None)])
def test_a_damaged_description_is_refused(exported, tmp_path, change):
    with pytest.raises(DafneError, match="is damaged"):
        import_model(with_settings(exported, change), tmp_path / "back")


def test_the_plans_in_a_model_run_no_code(exported, tmp_path):
    def change(settings):
        arguments = settings["origin"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        arguments |= {"nonlin": "subprocess.Popen", "nonlin_kwargs": {"args": ["touch", str(tmp_path / "executed")]}}

    with pytest.raises(UntrustedFileError, match="nonlin of the plans"):
        import_model(with_settings(exported, change), tmp_path / "back")
    assert not (tmp_path / "executed").exists()


def test_learned_weights_come_back(exported, tmp_path):
    weights = {key: tensor + 1 for key, tensor in read(exported)[0]["weights"].items()}
    import_model(edited(exported, weights=weights), tmp_path / "back")
    found = open_donor(tmp_path / "back").weights
    assert all(torch.equal(found[key], tensor) for key, tensor in weights.items())


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FOREIGN = {
    "keras": ({"model_id": "x", "type": "DynamicDLModel", "weights": []}, "Keras"),
    "no type": ({"model_id": "x", "weights": [1.0]}, "Keras"),
    "monai": ({"model_id": uuid.UUID(int=1), "type": "DynamicTorchModel", "weights": {},
               "init_model_function": "def init():\n    from monai.networks.nets import UNet"}, "MONAI"),
    "other": ({"model_id": "x", "type": "DynamicTorchModel", "weights": {}, "init_model_function": "def f(): pass"},
              "another program")}


@pytest.mark.parametrize("kind", FOREIGN)
def test_models_of_others_get_a_clear_answer(kind, tmp_path):
    content, said = FOREIGN[kind]
    (tmp_path / "X.model").write_bytes(pickle.dumps(content))
    with pytest.raises(DafneError if kind != "monai" else (DafneError, UntrustedFileError), match=said):
        import_model(tmp_path / "X.model", tmp_path / "back")
    assert said in describe(tmp_path / "X.model") and not (tmp_path / "back").exists()


@pytest.mark.parametrize("where", ["metadata", "weights", "apply_model_function"])
def test_nothing_in_a_file_is_executed(exported, tmp_path, where):
    content, _ = read(exported)
    exported.write_bytes(pickle.dumps({**content, where: Bomb(tmp_path / "ran")}))
    assert "UNSAFE" in inspect_path(exported)
    with pytest.raises(DanteError):
        import_model(exported, tmp_path / "back")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "back").exists()


@pytest.mark.parametrize("damage", ["missing", "more", "shape", "nan", "empty", "delta"])
def test_damaged_weights_are_refused_and_nothing_is_written(exported, tmp_path, damage):
    weights = dict(read(exported)[0]["weights"])
    key = next(iter(weights))
    changes = {"missing": {k: v for k, v in weights.items() if k != key}, "more": weights | {"more": weights[key]},
               "shape": weights | {key: weights[key][:1]}, "nan": weights | {key: weights[key] * torch.nan},
               "empty": {}}
    edited(exported, **({"is_delta": True} if damage == "delta" else {"weights": changes[damage]}))
    with pytest.raises(DafneError):
        import_model(exported, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"a": 1})])
def test_files_that_are_no_model_are_named(content, tmp_path):
    (tmp_path / "X.model").write_bytes(content)
    for function in (describe, lambda p: import_model(p, tmp_path / "back")):
        with pytest.raises(DafneError, match=r"X\.model"):
            function(tmp_path / "X.model")


def test_a_truncated_file_is_called_damaged(exported, tmp_path):
    exported.write_bytes(exported.read_bytes()[:-5000])
    with pytest.raises(DafneError, match="damaged"):
        describe(exported)


def test_a_folder_in_use_is_left_alone(exported, tmp_path):
    with pytest.raises(DafneError, match="not empty"):
        import_model(exported, tmp_path)


def test_inspect_says_what_matters(exported):
    said = inspect_path(exported)
    for word in ("organ, lesion", "3d_fullres", read(exported)[0]["model_id"], "RAS", "Dataset900_Donor"):
        assert word in said


def test_the_plans_that_come_back_hold_this_configuration_alone(exported, tmp_path):
    import_model(exported, tmp_path / "back")
    assert list(json.loads((tmp_path / "back" / "plans.json").read_text())["configurations"]) == ["3d_fullres"]
