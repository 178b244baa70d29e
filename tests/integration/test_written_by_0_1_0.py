"""The files in fixtures/0.1.0, which version 0.1.0 wrote (make_0_1_0.py there), mean today what they meant then.

Only the public names and the command line are used, so that the files, not the modules, are what stays.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from running import Prepared, build, threads_for_pools
from safetensors.torch import load_file

import nnunet_dante
from nnunet_dante.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures" / "0.1.0"
DATASET, FOLD = "Dataset901_Tiny", 1
RAW, PREPROCESSED, RESULTS = (f"nnUNet_{part}/{DATASET}" for part in ("raw", "preprocessed", "results"))
PLANS = f"{PREPROCESSED}/nnUNetDantePlans.json"
START = f"{PREPROCESSED}/nnUNetDantePlans_3d_fullres_start.pth"
MERGEABLE = ["LoRA", "LoRAFlat", "DoRA", "ConvAdapter"]
FACTORS = ("lora_A", "lora_B", "magnitude", "pointwise")
SETTINGS = {"epochs": 3, "lr": 0.02, "rank": 2, "alpha": 4.0, "rank_stabilised": True, "lr_ratio": 0.5, "l2_sp": 0.01}


def model(method: str) -> str:
    return f"{RESULTS}/nnUNetTrainer{method}__nnUNetDantePlans__3d_fullres"


def final(method: str) -> str:
    return f"{model(method)}/fold_{FOLD}/checkpoint_final.pth"


def latest(method: str) -> str:
    return f"stopped/{Path(model(method)).name}/checkpoint_latest.pth"


def adapter(method: str) -> str:
    return f"{model(method)}/fold_{FOLD}/adapter.safetensors"


def read(file: Path) -> dict:
    return torch.load(file, weights_only=False)


def weights(file: Path) -> dict[str, torch.Tensor]:
    return read(file)["network_weights"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: dict, b: dict) -> None:
    """Equal but for the last bits, which another machine may add up in another order."""
    torch.testing.assert_close(dict(a), dict(b), rtol=1e-5, atol=1e-6)


def command(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output



@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A copy of the files with the images preprocessed by the old plans."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    root = Path(shutil.copytree(FIXTURES, tmp_path_factory.mktemp("written") / "files"))
    (root / PREPROCESSED / "dataset_fingerprint.json").touch()  # git does not keep that it is younger than the images
    with pytest.MonkeyPatch.context() as patch:
        threads_for_pools(patch)
        Prepared(root, DATASET, root / model("LoRA")).activate(patch)
        preprocess_dataset(901, "nnUNetDantePlans", ("3d_fullres",), (1,))
    return root


@pytest.fixture
def files(whole, tmp_path, monkeypatch) -> Path:
    """A copy that a test may change, with nnU-Net's folders set to it."""
    root = Path(shutil.copytree(whole, tmp_path / "files"))
    Prepared(root, DATASET, root / model("LoRA")).activate(monkeypatch)
    return root


@pytest.fixture
def trainers(monkeypatch):
    """The module that nnU-Net finds the trainers in."""
    folder = re.search(r'nnUNet_extTrainer="([^"]+)"', command("env"))[1].split(":")[0]
    spec = importlib.util.spec_from_file_location("nnunet_dante_trainers", f"{folder}/nnunet_dante_trainers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INSPECTED = {
    PLANS: ["nnU-Net plans nnUNetDantePlans.json", "nnunet_dante 0.1.0", "vessel: new", "rank: 2", "l2_sp: 0.01"],
    f"{PREPROCESSED}/dataset.json": ["channels: MRI", "labels: background, lesion, organ, vessel"],
    START: ["start weights of a transfer", "9,084 numbers", "nnunet_dante 0.1.0", "dataset: Dataset900_Donor"],
    "peft": ["adapter of nnunet_dante 0.1.0", "LoRA, rank 2, alpha 4.0, factorisation flat"],
    "dafne/Tiny.model": ["Dafne model", "written by nnunet-dante 0.1.0", "labels: lesion, organ, vessel", "9,084 numbers",
                         "protection 0.1", "Test"],
    **{model(m): ["nnU-Net model folder", f"fold_{FOLD}/checkpoint_final.pth", "labels: background, lesion, organ, vessel"]
       for m in (*MERGEABLE, "SpatialAdapter")},
    **{final(m): ["trained with nnunet_dante", "trainer nnUNetTrainer,", "epoch 3", "nnunet_dante 0.1.0",
                  f"method: {m.removesuffix('Flat')}", "adapter: "] for m in MERGEABLE},
    **{adapter(m): ["adapter of nnunet_dante 0.1.0", f"method         {m.removesuffix('Flat')}",
                    "Dataset901_Tiny, 3d_fullres, fold 1", "labels         background, lesion, organ, vessel"]
       for m in MERGEABLE},
    final("SpatialAdapter"): ["NOT a stock network: 864 of these numbers", "trainer nnUNetTrainerSpatialAdapter, ",
                              "method: SpatialAdapter", "epoch 3"],
    latest("LoRA"): ["trained with nnunet_dante", "epoch 1", "method: LoRA", "adapter: "],
    latest("SpatialAdapter"): ["NOT a stock network", "epoch 1", "method: SpatialAdapter"],
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_says_what_each_file_is(name):
    said = command("inspect", FIXTURES / name)
    assert [words for words in INSPECTED[name] if words not in said] == []
    assert nnunet_dante.inspect_path(FIXTURES / name) == said.removesuffix("\n")


def test_no_file_of_weights_is_left_out_above():
    found = {str(f.relative_to(FIXTURES)) for kind in ("*.pth", "*.safetensors", "*.model") for f in FIXTURES.rglob(kind)}
    assert found - {"peft/adapter_model.safetensors"} <= set(INSPECTED)


def test_no_file_names_a_place_of_the_machine_that_wrote_it():
    places = re.compile(rb"/(tmp|root|home|work|opt|usr)/[\w.-]+")
    texts = [f for f in FIXTURES.rglob("*.*") if f.is_file() and not f.name.endswith(".nii.gz")]
    assert len(texts) > 40 and [f.name for f in texts if places.search(f.read_bytes())] == []


@pytest.mark.parametrize("method", MERGEABLE)
def test_start_weights_and_adapter_make_the_checkpoint_and_part_again(tmp_path, method):
    trained, start = weights(FIXTURES / final(method)), weights(FIXTURES / START)
    assert max((trained[key] - start[key]).abs().max() for key in start) > 0.05
    command("adapter", "apply", FIXTURES / START, FIXTURES / adapter(method), "-o", tmp_path / "merged.pth")
    close(weights(tmp_path / "merged.pth"), trained)
    for source in (FIXTURES / final(method), tmp_path / "merged.pth"):
        command("adapter", "remove", source, "-o", tmp_path / "base.pth")
        assert same(weights(tmp_path / "base.pth"), start)
    said = command("adapter", "info", FIXTURES / adapter(method))
    of_start = re.search(r"weights: .* sha256 (\w{64})", command("inspect", FIXTURES / START))[1]
    assert f"base           weights sha256 {of_start}" in said


@pytest.mark.parametrize("method", MERGEABLE)
def test_the_adapter_is_extracted_from_the_checkpoint_as_it_was_then(tmp_path, method):
    command("adapter", "extract", FIXTURES / final(method), "-o", tmp_path / "adapter.safetensors")
    now, then = load_file(tmp_path / "adapter.safetensors"), load_file(FIXTURES / adapter(method))
    assert same(now, then) and any(name.rpartition(".")[2] in FACTORS for name in then)
    command("adapter", "apply", FIXTURES / START, tmp_path / "adapter.safetensors", "-o", tmp_path / "merged.pth")
    close(weights(tmp_path / "merged.pth"), weights(FIXTURES / final(method)))


def test_the_peft_folder_is_read_and_written_as_it_was_then(tmp_path):
    command("adapter", "apply", FIXTURES / START, FIXTURES / "peft", "-o", tmp_path / "merged.pth")
    close(weights(tmp_path / "merged.pth"), weights(FIXTURES / final("LoRAFlat")))
    command("adapter", "extract", FIXTURES / final("LoRAFlat"), "--format", "peft", "-o", tmp_path / "peft")
    name = "adapter_model.safetensors"
    assert same(load_file(tmp_path / "peft" / name), load_file(FIXTURES / "peft" / name))
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "peft", FIXTURES / "peft")]
    assert {key: configs[0].get(key) for key in configs[1]} == configs[1]


def test_modules_that_stay_in_the_network_are_no_adapter(tmp_path):
    done = CliRunner().invoke(main, ["adapter", "extract", str(FIXTURES / final("SpatialAdapter")), "-o",
                                     str(tmp_path / "a.safetensors")])
    assert done.exit_code == 1 and "holds no adapter" in done.output


@pytest.mark.parametrize(("source", "method"), [(final("LoRA"), "LoRA"), (model("DoRA"), "DoRA"),
                                                (final("SpatialAdapter"), "SpatialAdapter")])
def test_checkpoints_and_folders_are_donors(files, source, method):
    from hashlib import sha256

    report = command("transfer", files / source, "-d", "901", "-p", "nnUNetSecondPlans", "--set", "l2_sp=0.5")
    assert ("-tr nnUNetTrainerSpatialAdapter" in report) == (method == "SpatialAdapter")
    plans = json.loads((files / PREPROCESSED / "nnUNetSecondPlans.json").read_text())
    entry = plans["dante"]["start_weights"]["3d_fullres"]
    assert entry["donor"]["sha256"] == sha256((files / final(method)).read_bytes()).hexdigest()
    assert entry["donor"]["dataset"] == DATASET and entry["label_map"]["vessel"] == "vessel"
    assert same(weights(files / PREPROCESSED / entry["file"]), weights(files / final(method)))
    # What the old training was told is no business of the new one's.
    assert plans["dante"]["options"] == {"l2_sp": 0.5} and plans["dante"]["overrides"] == {}


def test_a_second_transfer_goes_into_the_old_plans(files):
    """Batch size, network and normalisation stay; the old overrides give way to the new ones, as ever."""
    old = json.loads((files / PLANS).read_text())
    nnunet_dante.transfer(files / final("LoRAFlat"), 901, overrides={"epochs": 7, "rank": 3, "dropout": 0.5})
    new = json.loads((files / PLANS).read_text())
    assert new["configurations"] == old["configurations"]
    assert new["dante"]["overrides"] == {"epochs": 7, "rank": 3} and new["dante"]["options"] == {"dropout": 0.5}
    assert same(weights(files / START), weights(FIXTURES / final("LoRAFlat")))


def test_the_dafne_model_becomes_the_model_folder_it_was_made_of(tmp_path):
    command("import", FIXTURES / "dafne" / "Tiny.model", "-o", tmp_path / "model")
    assert same(weights(tmp_path / "model" / f"fold_{FOLD}" / "checkpoint_final.pth"), weights(FIXTURES / final("LoRA")))
    for name in ("plans.json", "dataset.json"):
        then, now = (json.loads((folder / name).read_text()) for folder in (FIXTURES / model("LoRA"), tmp_path / "model"))
        then.pop("dante", None)  # where that training started, which the exported model has left behind
        assert {key: now.get(key) for key in then} == then
    assert nnunet_dante.open_donor(tmp_path / "model").mirroring_axes == (0, 1, 2)


def test_the_dafne_model_hands_its_id_down(tmp_path):
    known = re.search(r"model_id ([\w-]{36})", command("inspect", FIXTURES / "dafne" / "Tiny.model"))[1]
    base = FIXTURES / "dafne" / "Tiny.model"
    report = nnunet_dante.export_model(FIXTURES / model("LoRAFlat"), tmp_path / "New.model", base=base)
    assert report.model_id == known
    side = json.loads((FIXTURES / "dafne" / "Tiny.json").read_text())
    assert side["categories"] == [["Test", "Tiny"]] and side["info"]["Made with"] == "nnunet-dante 0.1.0"
    assert json.loads((tmp_path / "New.json").read_text()).keys() >= side.keys()


def stored_runs() -> dict[str, dict]:
    found = [json.loads(file.read_text()) for file in (FIXTURES / "protocol/results/runs").iterdir()]
    return {run["method"]: run for run in found}


def test_results_of_a_protocol_are_compared_with_the_values_they_hold(tmp_path):
    command("compare", FIXTURES / "protocol" / "results", "-o", tmp_path)
    runs = stored_runs()
    assert runs.keys() == {"zero-shot", "LoRA", "GU"}
    kept = {run["method"]: run for run in json.loads((tmp_path / "results.json").read_text())}
    assert {method: {key: kept[method].get(key) for key in run} for method, run in runs.items()} == runs
    text = (tmp_path / "report.md").read_text()
    for method, run in runs.items():
        (scores,) = run["cases"].values()
        dice = [label["dice"] for label in scores.values()]
        assert re.search(rf"^\| {method} \|.* {sum(dice) / 3:.3f} \|", text, re.MULTILINE)
        assert f"| {method} | {scores['lesion']['dice']:.3f} / {scores['lesion']['hd95_mm']:.1f} / " in text
    assert "simulated" in text and "surface Dice at 1 mm" in text


def test_a_protocol_that_is_done_has_nothing_left_to_run(files, monkeypatch):
    for name in ("nnUNet_n_proc_DA", "nnUNet_extTrainer", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # whatever the command sets is undone
    results, protocol = files / "protocol" / "results", files / "protocol" / "tiny.toml"
    protocol.write_text(protocol.read_text().replace("[training]", "[training]\nstrength = 1"))  # as 0.1.0 ended
    before = {file: file.read_bytes() for file in (results / "runs").iterdir()}
    assert "3 runs in" in command("benchmark", protocol, "-o", results)
    assert {file: file.read_bytes() for file in (results / "runs").iterdir()} == before
    assert not (results / "logs").exists() and not (results / "prepared").exists()


def test_finished_folds_are_compared_with_their_scores_curve_and_cost(files, tmp_path):
    folds = {method: files / model(method) / f"fold_{FOLD}" for method in ("LoRA", "SpatialAdapter")}
    command("compare", *folds.values(), "-o", tmp_path / "report")
    runs = {run["method"]: run for run in json.loads((tmp_path / "report" / "results.json").read_text())}
    values = json.loads((files / RAW / "dataset.json").read_text())["labels"]
    for method, fold in folds.items():
        run = runs[method]
        (case,) = json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]
        assert run["cases"]["case_000"].keys() == {"lesion", "organ", "vessel"}
        for label, scores in run["cases"]["case_000"].items():
            assert scores["dice"] == pytest.approx(case["metrics"][str(values[label])]["Dice"])
        (log,) = (file.read_text() for file in fold.glob("training_log*.txt"))
        epochs = [[float(x) for x in re.findall(r"\d\.\d+", line)] for line in re.findall(r"Pseudo dice \[(.*)\]", log)]
        assert run["curve"] == pytest.approx([sum(epoch) / 3 for epoch in epochs], abs=1e-4) and len(epochs) == 3
        assert run["start_dice"] == pytest.approx(float(re.search(r"before training: ([\d.]+)", log)[1]), abs=1e-4)
        assert (run["shots"], run["all"], run["seed"], run["iterations_per_epoch"]) == (2, False, 0, 8)
        dante = read(fold / "checkpoint_final.pth")["dante"]
        for key, stored in (("trained_parameters", "trainable_parameters"), ("total_parameters", "total_parameters")):
            assert run[key] == dante[stored]
        assert (run["adapter_mib"] is None) == (method == "SpatialAdapter")


def test_the_shots_are_drawn_again_as_they_were_then(files, tmp_path):
    names = ("shots.json", "splits_final.json")
    shots, splits = (json.loads((files / PREPROCESSED / name).read_text()) for name in names)
    (tmp_path / "test.txt").write_text("case_004\n")
    command("shots", "-d", "901", "-k", "1,2", "--seeds", "1", "--val", "1", "--test", tmp_path / "test.txt")
    again, splits_again = (json.loads((files / PREPROCESSED / name).read_text()) for name in names)
    assert {key: again.get(key) for key in shots} == shots and splits_again == splits


def prepared(files: Path, method: str, *, stopped: bool) -> tuple[Prepared, Path]:
    """The data set with no results but, where `stopped`, the checkpoint_latest of after the first epoch."""
    shutil.rmtree(files / RESULTS)
    fold = files / model(method) / f"fold_{FOLD}"
    if stopped:
        fold.mkdir(parents=True)
        shutil.copy(files / latest(method), fold)
    return Prepared(files, DATASET, files / model(method)), fold


def distance(a: dict, b: dict) -> float:
    return float(sum((a[key] - b[key]).double().square().sum() for key in a) ** 0.5)


@pytest.mark.parametrize("method", ["LoRA", "SpatialAdapter"])
def test_a_stopped_training_continues_to_where_it_went_then(files, trainers, method):
    """On other machines the last bits may differ and grow; another course they must not take."""
    data, fold = prepared(files, method, stopped=True)
    trainer = build(getattr(trainers, f"nnUNetTrainer{method}"), data, fold=FOLD, resume=True)
    assert isinstance(trainer, nnunet_dante.DanteMixin) and trainer.current_epoch == 1
    trainer.run_training()
    ended, then = read(fold / "checkpoint_final.pth"), read(FIXTURES / final(method))
    assert ended["current_epoch"] == then["current_epoch"] == 3
    before = weights(FIXTURES / latest(method))
    way = distance(then["network_weights"], before)
    assert way > 0.1 and distance(ended["network_weights"], then["network_weights"]) < 0.05 * way
    for key in ("train_losses", "mean_fg_dice", "lrs"):
        assert ended["logging"][key] == pytest.approx(then["logging"][key], rel=0.02, abs=0.02)
    for key in ("method", "base_sha256", "start_dice", "start_weights", "label_map", "cases"):
        assert ended["dante"].get(key) == then["dante"].get(key)
    if method == "LoRA":
        assert same(ended["dante"]["adapter"]["base"], then["dante"]["adapter"]["base"])
        command("adapter", "remove", fold / "checkpoint_final.pth", "-o", files / "base.pth")
        assert same(weights(files / "base.pth"), weights(FIXTURES / START))


@pytest.mark.parametrize(("change", "message"), [({"rank": 3}, "rank was 2, is 3"), ({"lr": 0.5}, "lr was 0.02, is 0.5"),
                                                 ({"iterations": 9}, "iterations was 8, is 9")])
def test_a_stopped_training_does_not_continue_with_other_numbers(files, trainers, change, message):
    data, _ = prepared(files, "LoRA", stopped=True)
    plans = json.loads((files / PLANS).read_text())
    plans["dante"]["overrides"] |= change
    with pytest.raises(nnunet_dante.DanteError, match=message):
        build(trainers.nnUNetTrainerLoRA, data, plans=plans, fold=FOLD, resume=True)


@pytest.mark.parametrize("method", ["LoRA", "SpatialAdapter"])
def test_a_training_starts_from_the_old_plans(files, trainers, method):
    data, fold = prepared(files, method, stopped=False)
    trainer = build(getattr(trainers, f"nnUNetTrainer{method}"), data, fold=FOLD)
    trainer.run_training()
    assert trainer.current_epoch == trainer.num_epochs == 3
    content, start = read(fold / "checkpoint_final.pth"), weights(FIXTURES / START)
    then = read(FIXTURES / final(method))["dante"]
    options = {name: value for name, value in SETTINGS.items() if name in then["options"]}
    assert {name: content["dante"]["options"][name] for name in options} == options and len(options) >= 3
    assert {name: content["dante"]["options"].get(name) for name in then["options"]} == then["options"]
    for key in ("start_source", "start_weights", "donor", "label_map", "iterations", "val_iterations", "cases",
                "trainable_parameters", "total_parameters"):
        assert content["dante"][key] == then[key]
    if method == "LoRA":
        assert not same(content["network_weights"], start)
        command("adapter", "remove", fold / "checkpoint_final.pth", "-o", files / "base.pth")
        assert same(weights(files / "base.pth"), start)
    else:  # all but heads and added convolutions is the donor's still
        kept = {key: value for key, value in content["network_weights"].items() if "seg_layers" not in key
                and "spatial_adapter" not in key}
        assert same(kept, {key: start[key] for key in kept}) and len(kept) > 60
