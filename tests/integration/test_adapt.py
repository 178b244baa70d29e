"""adapt: from a donor and labelled cases to a report and a stock nnU-Net model, also when it is stopped in between."""

from __future__ import annotations

import io
import json
import math
import zipfile

import pandas
import pytest
import tiny

from nnunet_dante import adapt, predict
from nnunet_dante.adaptation.steps import Steps
from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.checkpoint import load_checkpoint_safely

pytestmark = pytest.mark.slow
OPTIONS = {"overrides": {"epochs": 2, "iterations": 2, "val_iterations": 1}, "device": "cpu", "trainer": "nnUNetTrainerLoRA"}


@pytest.fixture
def given(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    donor = tiny.write_model_folder(tmp_path / "donors")
    (tmp_path / "data").mkdir()
    return donor, tmp_path / "data" / tiny.write_raw_dataset(tmp_path / "data", n_cases=3), tmp_path / "out"


def _contents(file):
    """Yield name and bytes of each file, also of those in zip files and in zip files therein."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        archive = zipfile.ZipFile(io.BytesIO(content))
        yield "names", " ".join(archive.namelist()).encode()
        for name in archive.namelist():
            yield from ((f"{name}/{inner}", found) for inner, found in _contents(archive.read(name)))
    else:
        yield "", content


def test_the_whole_way_goes_on_where_it_was_stopped(given, monkeypatch):
    donor, data, out = given
    run, called, stops = Steps.run, [], ["1"]

    def stopped(self, command, *words, **options):
        called.append((command, words[:1], words[3:4]))
        if words[:1] == ("train",) and words[3] in stops:
            stops.remove(words[3])
            raise KeyboardInterrupt
        return run(self, command, *words, **options)

    monkeypatch.setattr(Steps, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        adapt(donor, data, out, **OPTIONS)
    fold = next(out.rglob("fold_0/checkpoint_final.pth"))
    before = fold.stat().st_mtime_ns
    result = adapt(donor, data, out, **OPTIONS)
    assert fold.stat().st_mtime_ns == before, "a fold that was trained is not trained again"
    assert [words for command, what, words in called if what == ("train",)] == [("0",), ("1",), ("1",), ("2",), *(
        [("all",)] if result.strength or (fold.parents[1] / "fold_all").is_dir() else [])]

    trained = next((fold.parents[1] / "fold_0").glob("training_log*.txt")).read_text()
    assert "Current learning rate: 0.003" in trained, "so few steps need a higher one"
    assert set(result.dice) == {"donor", "adapted"} and not any(map(math.isnan, result.dice.values()))
    kept = [load_checkpoint_safely(fold.parents[1] / f"fold_{n}" / fold.name)["dante"]["strength"]["value"] for n in range(3)]
    assert result.strength == pytest.approx(round(sum(kept) / 3, 2))
    assert "adapted" in result.report.read_text() and result.adapter.is_file() and result.dafne.is_file()
    assert any(name.endswith("checkpoint_final.pth") for name in zipfile.ZipFile(result.model).namelist())
    names = [name for file in (result.model, result.adapter, result.dafne) for name, content in _contents(file)
             if any(word in content for word in (str(out.parent).encode(), b"case_0", b"debug.json", b"summary.json"))]
    assert not names, "what is handed on names neither folders of this machine nor cases"
    assert len(list((out / "predictions" / "donor").glob("case_*.nii.gz"))) == 3
    record = json.loads((out / "adapt.json").read_text())
    assert record["begun"][:3] == [f"nnUNetTrainerLoRA {n}" for n in range(3)]
    assert record["done"]["transfer"]["commands"][0].startswith("nnunet-dante transfer ")
    assert str(adapt(donor, data, out, **OPTIONS)) == str(result), "all is done: the same again, at once"

    done = predict(out, data / "imagesTr", out / "masks", device="cpu")
    columns = list(pandas.read_csv(done.table))
    assert ("donor" in columns, "strength" in columns, "folds" in columns) == (result.strength > 0, True, any(kept))
    unseen = pandas.read_csv(out / "confidence_unseen.csv")
    assert sorted(unseen["case"]) == sorted(done.confidence) and unseen["dice"].notna().all()
    assert "folds" not in unseen and "Only 3 unseen cases" in done.tested
    written = (out / "confidence_unseen.csv").stat().st_mtime_ns
    assert predict(out, data / "imagesTr", out / "again", device="cpu").confidence == done.confidence
    assert (out / "confidence_unseen.csv").stat().st_mtime_ns == written, "the confidence is tested once"

    with pytest.raises(ConfigurationError, match="adaptation with trainer 'nnUNetTrainerLoRA', and now 'nnUNetTrainerFineTune'"):
        adapt(donor, data, out, **OPTIONS | {"trainer": "nnUNetTrainerFineTune"})


def test_old_labels_are_kept_at_the_users_own_spacing_and_the_report_says_what_they_lost(given):
    _, data, out = given
    donor = tiny.write_model_folder(out.parent / "others", labels={"background": 0, "vessel": 1}, spacing_mm=(2.0, 2.0, 2.0))
    result = adapt(donor, data, out, **OPTIONS, keep_labels=["all"], geometry="target")
    record = json.loads((out / "adapt.json").read_text())
    assert "--keep-labels all --geometry target" in record["done"]["transfer"]["commands"][0]
    assert record["done"]["transfer"]["dataset"] == f"Dataset902_{data.name.partition('_')[2]}Completed"
    content = json.loads(zipfile.ZipFile(result.model).read(next(
        name for name in zipfile.ZipFile(result.model).namelist() if name.endswith("dataset.json"))))
    assert list(content["labels"]) == ["background", "vessel", "organ", "lesion"]
    page = result.report.read_text()
    assert "What each label of the donor lost or gained" in page and "do not count in these means" in page
    tables = json.loads((out / "tables.json").read_text())
    (kept,) = (records for name, records in tables.items() if "kept" in name)
    assert {(r["method"], r["label"], r["cases_of_a_person"]) for r in kept} == {("adapted", "vessel", 0)}
    trained = record["done"]["nnUNetTrainerLoRA 0"]
    assert trained["epochs"] == 2 and (trained["gib"] or 0) >= 0 and record["done"]["cost"]["gib"] >= 0
