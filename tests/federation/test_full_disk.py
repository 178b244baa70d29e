"""A disk that fills up at the server or at a site: an error that says what to do, and the same command goes on."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from federated import activate, found, made
from killing import full_disk_for

from nnunet_dante.errors import StorageError
from nnunet_dante.federation.aggregate import Update
from nnunet_dante.federation.coordinator import Coordinator
from nnunet_dante.federation.settings import read_site
from nnunet_dante.federation.site import STATE_FILE, train_round
from nnunet_dante.models.checkpoint import load_checkpoint_safely


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """The folder of a federation of two rounds."""
    activate(tmp_path, monkeypatch)
    return found(tmp_path, rounds=2).folder


def one_round(coordinator: Coordinator) -> None:
    """Let two sites send an update."""
    for site in ("north", "south"):
        tensors = {name: tensor + 0.01 for name, tensor in coordinator.expected.items()}
        assert coordinator.receive(
            Update(site=site, cases=3, tensors=tensors, draws=frozenset(coordinator.settings.foreground)),
            dice_before={"organ": 0.5}, dice_after={"organ": 0.5}) is None
    assert coordinator.close_round()


@pytest.mark.parametrize("file", ["replies/south.safetensors", "history.json", "state.safetensors"])
def test_a_server_whose_disk_was_full_goes_on_from_the_last_finished_round(federation, file):
    coordinator = Coordinator(federation)
    one_round(coordinator)
    state = coordinator.state
    (federation / "run" / "replies").mkdir()
    full_disk_for(federation / "run" / file)
    with pytest.raises(StorageError, match=r"cannot be written \(No space left on device.*Make room"):
        one_round(coordinator)
    again = Coordinator(federation)
    assert again.round == 1 and [entry["round"] for entry in again.history["rounds"]] == [0]
    assert all(torch.equal(again.state[name], tensor) for name, tensor in state.items())
    one_round(again)
    assert [entry["round"] for entry in Coordinator(federation).history["rounds"]] == [0, 1]
    assert not list((federation / "run").rglob(".*"))


@pytest.mark.parametrize("file", ["adapter.safetensors", "fold_all/checkpoint_final.pth"])
def test_a_result_that_found_the_disk_full_is_written_by_the_same_command(federation, file):
    coordinator = Coordinator(federation)
    one_round(coordinator)
    one_round(coordinator)
    (federation / "run" / "result" / "fold_all").mkdir(parents=True)
    full_disk_for(federation / "run" / "result" / file)
    with pytest.raises(StorageError, match="cannot be written"):
        coordinator.write_result({})
    again = Coordinator(federation)
    assert again.round == 2
    assert load_checkpoint_safely(again.write_result({}) / "fold_all" / "checkpoint_final.pth")["network_weights"]


@pytest.mark.slow
@pytest.mark.parametrize(("round_", "file"), [(0, "checkpoint"), (1, "checkpoint"), (1, "state")])
def test_a_site_whose_disk_was_full_is_left_out_and_comes_back(tmp_path, monkeypatch, round_, file):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    sites = made(tmp_path, "north", "south", rounds=3)
    activate(tmp_path, monkeypatch)
    results = tmp_path / "nnUNet_results" / sites.datasets["south"]
    coordinator, known = Coordinator(sites.folder, min_sites=1), {}
    while coordinator.round < 3:
        for name in ("north", "south"):
            order = (sites.preprocessed(name), coordinator.round, coordinator.to_send(known.pop(name, None)),
                     coordinator.state_sha256)
            if name == "south" and coordinator.round == round_:
                if file == "state":
                    full_disk_for(next(results.glob("*/fold_0")) / STATE_FILE)
                with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
                    if file == "checkpoint":
                        patch.setattr(os, "fsync", full)
                    train_round(*order)
                continue
            facts, trained = read_site(sites.preprocessed(name)).facts, train_round(*order)
            update = Update(site=name, cases=facts.cases, tensors=trained.tensors, draws=frozenset(facts.draws))
            assert coordinator.receive(update, dice_before=trained.dice_before, dice_after=trained.dice_after) is None
            known[name] = coordinator.round
        assert coordinator.close_round()
    expected = [["north", "south"]] * 3
    expected[round_] = ["north"]
    assert [sorted(entry["sites"]) for entry in coordinator.history["rounds"]] == expected
