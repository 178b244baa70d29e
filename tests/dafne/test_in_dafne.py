"""Exported files in dafne-dl, in a process that has neither this package nor nnU-Net: what client and server do."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from dafne_client import VERSIONS, client

from nnunet_dante.dafne.export import export_model
from nnunet_dante.dafne.importer import import_model
from nnunet_dante.dafne.model_file import open_model
from nnunet_dante.models.donor import open_donor

CALLERS = """
model = load(arguments[0])
volume = np.random.default_rng(0).normal(50, 20, (20, 24, 18)).astype(np.float32)
affine = np.array([[0, -1.5, 0, 30], [-1.5, 0, 0, 9], [0, 0, 2.0, -4], [0, 0, 0, 1.0]])
size = [1.5, 1.5, 2.0]
if model.data_dimensionality == 2:
    image = volume[:, :, 3]
    requests = [{"image": image, "resolution": size[:2], "split_laterality": True, "classification": "Tiny, Variant"},
                {"image": volume.astype(np.int16)[:, :, 3], "resolution": np.abs(size[:2])}]
else:
    requests = [{"image": volume, "resolution": np.array(size), "affine": affine, "split_laterality": False,
                 "classification": "Tiny"},
                {"image": volume, "resolution": size, "affine": affine},
                {"image": volume, "resolution": tuple(size), "affine": affine.astype(np.float32), "options": {},
                 "classification": ""}]
found = [model.apply(request) for request in requests]
for masks, request in zip(found, requests):
    assert sorted(masks) == ["lesion", "organ"], sorted(masks)
    for mask in masks.values():
        assert type(mask) is np.ndarray and mask.dtype == np.uint8 and mask.shape == request["image"].shape
        assert mask.max() <= 1
if model.data_dimensionality == 3:
    assert all((found[0][k] == masks[k]).all() for masks in found for k in masks)
    for request, word in (({"image": volume, "resolution": size}, "Load the original"),
                          ({"image": volume, "resolution": size, "affine": np.diag([*size, 1])}, "Load the original")):
        try:
            model.apply(request)
        except ValueError as error:
            assert word in str(error), error
        else:
            raise AssertionError("an unknown orientation was segmented")
from dafne_dl.interfaces import WrongDimensionalityError
try:
    model.apply({**requests[0], "image": volume[:, :, 3] if model.data_dimensionality == 3 else volume})
except WrongDimensionalityError:
    pass
else:
    raise AssertionError("an image of the other dimensionality was segmented")
"""

MERGING = """
import io, json
from dafne_dl.interfaces import IncompatibleModelError
a, b = load(arguments[0]), load(arguments[1])
def weights(model):
    return {k: v.double() for k, v in model.get_weights().items()}
def equal(x, y, tolerance=0.0):
    assert list(x) == list(y)
    return max(float((x[k] - y[k]).abs().max()) for k in x) <= tolerance
wa, wb = weights(a), weights(b)
half = lambda x, y: {k: (0.5 * x[k].float() + 0.5 * y[k].float()).double() for k in x}
assert equal(weights(a * 0.5 + b * 0.5), half(wa, wb))
assert equal(weights(a), wa) and equal(weights(b), wb), "merging changed what was merged"
delta = b.calc_delta(a)
assert delta.is_delta and delta.timestamp_id == a.timestamp_id and not b.is_delta
assert equal(weights(a.apply_delta(delta)), wb, 1e-6)
assert not a.apply_delta(delta).is_delta
small = b.calc_delta(a, threshold=0.01)
assert all(((v == 0) | (v.abs() >= 0.01)).all() for v in small.get_weights().values())
again = type(a).Loads(a.dumps())
assert equal(weights(again), wa) and again.model_id == a.model_id and again.timestamp_id == a.timestamp_id
for name in a.function_mappings:
    assert isinstance(getattr(a, name).source, str) and getattr(again, name).source == getattr(a, name).source, name
twin = a.copy()
next(twin.model.parameters()).data.add_(1)
assert equal(weights(a), wa) and not equal(weights(twin), wa)
assert json.loads(json.dumps(a.get_metadata()))["dimensionality"] == "3"
half_size = len(b.dumps())
assert half_size < 1.05 * len(open(arguments[1], "rb").read()), "a dump stores weights twice"
b.model_id = "another"
for wrong in (lambda: a + b, lambda: b.calc_delta(a)):
    try:
        wrong()
    except IncompatibleModelError:
        pass
    else:
        raise AssertionError("models of two ids were merged")
for factor in ("2", None):
    try:
        a * factor
    except NotImplementedError:
        continue
    raise AssertionError(f"a model was multiplied by {factor!r}")
(a * 0.5 + load(arguments[1]) * 0.5).dump(open(arguments[2], "wb"))
"""

PROVIDER = """
import json, pathlib
from dafne_dl.LocalModelProvider import LocalModelProvider
folder = pathlib.Path(arguments[1])
folder.mkdir()
provider = LocalModelProvider(folder, folder)
provider.import_model(arguments[0], "Mine")
assert provider.available_models() == ["Mine"]
details = provider.model_details("Mine")
assert details["dimensionality"] == "3" and details["dependencies"] == {} and details["can_incremental_learn"] is True
assert sorted(provider.load_model("Mine").get_weights()) == sorted(load(arguments[0]).get_weights())
ready = LocalModelProvider(pathlib.Path(arguments[2]), folder)
(name,) = ready.available_models()
assert ready.model_details(name)["categories"] == [["Abdomen", "Kidney"]]
assert ready.load_model(name).model_id == load(arguments[0]).model_id
print(name)
"""

LEARN = """
import contextlib, io
model, start = load(arguments[0]), load(arguments[0])
rng = np.random.default_rng(0)
volumes, masks = [], []
for _ in range(5):
    mask = np.zeros((20, 24, 18), np.uint8)
    low = rng.integers(3, 6, 3)
    mask[low[0]:low[0] + 9, low[1]:low[1] + 10, low[2]:low[2] + 8] = 1
    volumes.append((mask * 100 + rng.normal(50, 10, mask.shape)).astype(np.float32))
    masks.append(mask)
affine = np.array([[0, -1.0, 0, 30], [-1.0, 0, 0, 9], [0, 0, 1.0, -4], [0, 0, 0, 1.0]])
if model.data_dimensionality == 2:
    slices = [v[:, :, 9] for v in volumes]
    data = {"resolution": [1.0, 1.0], "classification": "Tiny", "image_list": slices}
    outputs = [{"organ": m[:, :, 9], "lesion": 0 * m[:, :, 9], "my own": m[:, :, 9]} for m in masks]
    asked = {"image": slices[0], "resolution": [1.0, 1.0]}
else:  # the client stacks slices first, keeps one label, and counts masks in a dict
    data = {"affine": [affine.astype(np.float32)] * 5, "resolution": [1.0, 1.0, 1.0], "classification": "Tiny",
            "image_list": [np.moveaxis(v, -1, 0) for v in volumes]}
    outputs = {i: {"organ": np.moveaxis(m, -1, 0)} for i, m in enumerate(masks)}
    asked = {"image": volumes[0], "resolution": [1.0, 1.0, 1.0], "affine": affine}
truth = (masks[0] if model.data_dimensionality == 3 else masks[0][:, :, 9]) > 0
def dice(m):
    found = m.apply(asked)["organ"] > 0
    return 2 * (found & truth).sum() / (found.sum() + truth.sum())
before = dice(model)
for _ in range(3):
    model.incremental_learn(data, outputs, 5, 5)
after = dice(model)
assert after > before + 0.1, (before, after)
for broken in ({}, {"image_list": [np.zeros((3, 3), np.float32)]}, {**data, "image_list": [None] * 5}):
    kept = {k: v.clone() for k, v in model.get_weights().items()}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        model.incremental_learn(broken, outputs, 5, 5)
    assert all(torch.equal(v, kept[k]) for k, v in model.get_weights().items())
assert not {"triton", "torch._dynamo"} & set(sys.modules), "importing this aborts a client that has TensorFlow loaded"
merged = start * 0.5 + model * 0.5
assert all(torch.isfinite(v).all() for v in merged.get_weights().values())
merged.reset_timestamp()
with open(arguments[1], "wb") as stream:
    merged.dump(stream)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A 3D model, another training of it, the same of two with added modules, and a 2D model, as .model files."""
    root = tmp_path_factory.mktemp("files")
    folder = tiny.write_model_folder(root / "donor")
    spatial = tiny.add_modules(tiny.write_model_folder(root / "spatial"), "nnUNetTrainerSpatialAdapter", amount=0.05)
    parallel = tiny.add_modules(tiny.write_model_folder(root / "parallel"), "nnUNetTrainerAdaptFormer", amount=0.05)
    for name, model in (("", folder), ("spatial-", spatial), ("parallel-", parallel)):
        export_model(model, root / f"{name}a.model", orientation="RAS")
        checkpoint = model / "fold_0" / "checkpoint_final.pth"
        content = torch.load(checkpoint, weights_only=False)
        for tensor in {t.data_ptr(): t for t in content["network_weights"].values()}.values():
            tensor += 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        torch.save(content, checkpoint)
        export_model(model, root / f"{name}b.model", base=root / f"{name}a.model", orientation="RAS")
    export_model(tiny.write_model_folder(root / "flat", configuration="2d"), root / "flat.model", orientation="RAS")
    (root / "models").mkdir()
    export_model(folder, root / "models", categories=["Abdomen/Kidney"], base=root / "a.model", orientation="RAS")
    return root


@pytest.mark.parametrize("version", [*(pytest.param(v, marks=pytest.mark.slow) for v in VERSIONS[:-1]), VERSIONS[-1]])
class TestVersions:
    @pytest.mark.parametrize("name", ["a", "flat"])
    def test_every_caller_is_answered_and_what_cannot_be_right_refused(self, files, version, name, tmp_path):
        client(CALLERS, files / f"{name}.model", home=tmp_path / "home", version=version)

    @pytest.mark.parametrize("name", ["", "spatial-", "parallel-"])
    def test_models_merge_differ_and_survive_a_dump(self, files, version, name, tmp_path):
        client(MERGING, files / f"{name}a.model", files / f"{name}b.model", tmp_path / "m.model",
               home=tmp_path / "home", version=version)
        assert (tmp_path / "m.model").stat().st_size < 1.05 * (files / f"{name}a.model").stat().st_size

    @pytest.mark.parametrize("name", ["a", *(pytest.param(v, marks=pytest.mark.slow) for v in ("flat", "spatial-a", "parallel-a"))])
    def test_it_learns_from_what_the_client_sends_and_the_result_comes_back(self, files, version, name, tmp_path):
        client(LEARN, files / f"{name}.model", tmp_path / "m.model", home=tmp_path / "home", version=version)
        report = import_model(tmp_path / "m.model", tmp_path / "back")
        assert report.model.timestamp >= open_model(files / f"{name}.model").timestamp
        learned = open_donor(tmp_path / "back").weights
        assert any(not torch.equal(learned[k], v) for k, v in open_model(files / f"{name}.model").weights.items())

    def test_the_local_provider_imports_lists_and_loads(self, files, version, tmp_path):
        said = client(PROVIDER, files / "a.model", tmp_path / "imported", files / "models", home=tmp_path / "home",
                      version=version)
        assert said.splitlines()[-1] == "Donor-3d-fullres"
        assert json.loads((files / "models" / "Donor-3d-fullres.json").read_text())["orientation"] == ""
