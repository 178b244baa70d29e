"""create.py and join.py: what a founder writes, and which data sets fit it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from federated import activate, found, join
from running import threads_for_pools

from nnunet_dante.adapters.adapter import apply, info
from nnunet_dante.errors import ConfigurationError, FederationError
from nnunet_dante.federation.create import new_federation
from nnunet_dante.federation.settings import CHECKPOINT, START, read_settings, read_site
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.models.donor import open_donor


@pytest.fixture
def root(tmp_path, monkeypatch):
    threads_for_pools(monkeypatch)
    activate(tmp_path, monkeypatch)
    return tmp_path


def test_the_start_changes_nothing_and_is_an_adapter_of_the_start_network(root):
    sites = found(root)
    apply(sites.folder / CHECKPOINT, sites.folder / START, root / "applied.pth")
    start, applied = (load_checkpoint_safely(file)["network_weights"]
                      for file in (sites.folder / CHECKPOINT, root / "applied.pth"))
    assert all(torch.equal(start[key], applied[key]) for key in start)
    assert "factors of" in info(sites.folder / START) and "organ, lesion" in info(sites.folder / START)


def test_the_folder_is_a_flower_app_without_the_network(root):
    sites = found(root)
    app = (sites.folder / "pyproject.toml").read_text()
    assert 'serverapp = "federated.server_app:app"' in app and str(sites.folder) in app
    assert 'fab-include = ["federated/*.py"]' in app and "min-sites" in app
    assert "app = client_app" in (sites.folder / "federated" / "client_app.py").read_text()


def test_equal_federations_have_equal_starts(root):
    one = found(root)
    donor = next((root / "nnUNet_results" / "Dataset900_Donor").iterdir())
    new_federation(root / "other", donor, rounds=2, epochs=1, overrides=read_settings(one.folder).overrides
                   | {"epochs": None, "strength": None})
    assert read_settings(root / "other").start_sha256 == read_settings(one.folder).start_sha256


def test_new_labels_start_as_in_a_transfer_and_known_ones_keep_their_rows(root):
    sites = found(root, labels=["Lesion", "vessel", "organ"])
    settings = read_settings(sites.folder)
    assert settings.labels == ("background", "lesion", "vessel", "organ")  # as the donor spells them
    donor = open_donor(next((root / "nnUNet_results" / "Dataset900_Donor").iterdir()))
    start = open_donor(sites.folder / "model")
    (head, _), *_ = settings.heads.items()
    rows, known = start.weights[head], donor.weights[head]
    assert torch.equal(rows[1], known[2]) and torch.equal(rows[3], known[1])


@pytest.mark.parametrize(("options", "reason"), [
    ({"method": "DoRA"}, "DoRA cannot be federated"), ({"method": "AdaptFormer"}, "choose one of"),
    ({"method": "FromScratch"}, "choose one of"), ({"overrides": {"ewc": 1.0}}, "--set ewc"),
    ({"averaging": "mean"}, "cannot have these settings"), ({"rounds": 0}, "epochs|settings")])
def test_options_that_cannot_work_are_refused_and_nothing_is_written(root, options, reason):
    with pytest.raises((FederationError, ConfigurationError), match=reason):
        found(root, **options)
    assert not (root / "federation" / "federation.json").exists()


def test_a_federation_is_never_overwritten(root):
    found(root)
    with pytest.raises(FederationError, match="holds a federation already"):
        new_federation(root / "federation", root)


@pytest.mark.parametrize("name", ["my_federation", "2-sites", "a" * 33])
def test_names_that_flower_refuses_are_refused_at_once(root, name):
    with pytest.raises(FederationError, match="letters, digits and hyphens"):
        new_federation(root / name, root)


def test_a_folder_that_was_changed_on_the_way_is_refused(root):
    sites = found(root)
    file = sites.folder / CHECKPOINT
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(FederationError, match="is missing or not the file of this federation"):
        read_settings(sites.folder)


@pytest.mark.slow  # it predicts five cases
def test_a_label_that_a_site_lacks_is_completed_and_not_said_to_be_drawn(root):
    sites = found(root)
    join(sites, "west", 931, labels={"background": 0, "organ": 1}, values=(1,))
    site = read_site(sites.preprocessed("west"))
    assert site.dataset.endswith("WestCompleted") and site.facts.draws == ("organ",)
    assert site.facts.labels == ("background", "organ", "lesion") and site.facts.cases == 4


def test_labels_in_another_order_and_spelling_fit(root):
    sites = found(root)
    join(sites, "west", 931, labels={"background": 0, "Lesion": 1, "ORGAN": 2})
    facts = read_site(sites.preprocessed("west")).facts
    assert facts.labels == ("background", "lesion", "organ") and facts.draws == ("lesion", "organ")


def test_a_label_that_the_donor_does_not_know_is_asked_for_as_undrawn(root):
    sites = found(root, labels=["organ", "lesion", "vessel"])
    with pytest.raises(FederationError, match='lacks the label vessel.*"annotated"'):
        join(sites, "west", 931)
    raw = root / "nnUNet_raw" / "Dataset931_West" / "dataset.json"
    content = json.loads(raw.read_text())
    content["labels"]["vessel"] = 3
    content["annotated"] = {f"case_{i:03d}": ["organ", "lesion"] for i in range(5)}
    raw.write_text(json.dumps(content))
    from nnunet_dante.federation.join import join_federation

    joined = join_federation(sites.folder, "Dataset931_West", site="west", device="cpu", num_processes=1)
    assert joined.dataset == "Dataset931_West" and joined.facts.draws == ("lesion", "organ")


@pytest.mark.parametrize(("options", "reason"), [
    ({"labels": {"background": 0, "organ": 1, "kidney": 2}}, "has the label 'kidney'"),
    ({"channel_names": {"0": "CT"}}, "has the channels CT; the federation has MRI"), ({"fold": "7"}, "--fold is '7'")])
def test_data_that_do_not_fit_are_refused_with_the_reason(root, options, reason):
    sites = found(root)
    with pytest.raises(FederationError, match=reason):
        join(sites, "west", 931, **options)


def test_ct_in_another_unit_is_refused(root):
    sites = found(root, donor_options={"normalization": "CTNormalization", "channel_names": {"0": "CT"}})
    with pytest.raises(FederationError, match="mean of its channel CT inside the labels is 9.*another unit"):
        join(sites, "west", 931, channel_names={"0": "CT"})  # the fingerprint has mean 9, the donor 0.4 and 0.3


def test_a_site_needs_a_plain_name(root):
    from nnunet_dante.federation.join import join_federation

    sites = found(root)
    name = tiny.write_raw_dataset(root / "nnUNet_raw", labels=tiny.LABELS)
    with pytest.raises(FederationError, match="--site is 'my hospital'"):
        join_federation(sites.folder, name, site="my hospital")
