"""site.py: a round is nnU-Net's training from the federation's state, and only what it trained leaves the site."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from federated import activate, made, seed
from running import train, weights

from nnunet_dante import DanteError
from nnunet_dante.adapters.file import read_adapter
from nnunet_dante.errors import FederationError
from nnunet_dante.federation.aggregate import Update
from nnunet_dante.federation.coordinator import Coordinator
from nnunet_dante.federation.settings import read_settings, read_site
from nnunet_dante.federation.site import finish, train_round
from nnunet_dante.training import trainers


@pytest.fixture(autouse=True, scope="module")
def no_figures():
    """nnU-Net's progress figure is most of the time of a tiny epoch."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)
        patch.setenv("nnUNet_n_proc_DA", "0")
        yield


def run_rounds(sites, coordinator, *names, rounds=None):
    """Train the rounds of a federation without an engine; each site begins with the same random numbers."""
    known: dict[str, int] = {}
    for _ in range(rounds if rounds is not None else coordinator.settings.rounds):
        for name in names:
            if coordinator.round == 0:
                seed()
            facts = read_site(sites.preprocessed(name)).facts
            assert coordinator.admit(facts) is None
            trained = train_round(sites.preprocessed(name), coordinator.round, coordinator.to_send(known.get(name)),
                                  coordinator.state_sha256)
            reason = coordinator.receive(
                Update(site=name, cases=facts.cases, tensors=trained.tensors, draws=frozenset(facts.draws)),
                dice_before=trained.dice_before, dice_after=trained.dice_after)
            assert reason is None, reason
            known[name] = coordinator.round
        assert coordinator.close_round()
    return known


def final(sites, name, trainer):
    return (sites.root / "nnUNet_results" / sites.datasets[name] / f"{trainer}__nnUNetFederationPlans__3d_fullres"
            / "fold_0" / "checkpoint_final.pth")


@pytest.mark.parametrize(("method", "options"), [("FineTune", {}), ("LoRA", {"averaging": "frozen"})])
def test_one_site_equals_local_training_bit_for_bit(tmp_path, monkeypatch, method, options):
    sites = made(tmp_path, "alone", method=method, rounds=2, **options)
    activate(tmp_path, monkeypatch)
    coordinator = Coordinator(sites.folder, min_sites=1)
    known = run_rounds(sites, coordinator, "alone")
    finish(sites.preprocessed("alone"), coordinator.to_send(known["alone"]), coordinator.state_sha256)
    federated = weights(final(sites, "alone", f"nnUNetTrainer{method}"))
    local = local_training(sites, "alone", method, frozen="frozen" in options.values())
    assert federated.keys() == local.keys()
    assert all(torch.equal(federated[key], local[key]) for key in local)
    result = weights(coordinator.write_result({}) / "fold_all" / "checkpoint_final.pth")
    assert all(torch.equal(result[key], local[key]) for key in local)


def local_training(sites, name, method, *, frozen):
    """Return the weights after the same training without a federation, from the federation's factors."""
    start = read_adapter(sites.folder / "start.safetensors")[1]

    class Local(getattr(trainers, f"nnUNetTrainer{method}")):
        def on_train_start(self):
            super().on_train_start()
            for module, layer in self.low_rank():
                with torch.no_grad():
                    layer.lora_A.copy_(start[f"{module}.lora_A"])

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            for _, layer in self.low_rank():
                layer.lora_A.requires_grad_(not frozen)

        def low_rank(self):
            from nnunet_dante.peft.inject import adapted, update

            return [(n, update(m)) for n, m in adapted(self.bare_network).items() if hasattr(update(m), "lora_A")]

    folder = sites.preprocessed(name)

    class Prepared:
        preprocessed = folder

    seed()
    trained = train(Local, Prepared, plans=json.loads((folder / "nnUNetFederationPlans.json").read_text()))
    return weights(Path(trained.output_folder, "checkpoint_final.pth"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A federation of two sites with equal data, and what it has learned in two rounds."""
    with pytest.MonkeyPatch.context() as patch:
        sites = made(tmp_path_factory.mktemp("pair"), "north", "south", same=True)
        activate(sites.root, patch)
        coordinator = Coordinator(sites.folder)
        run_rounds(sites, coordinator, "north", "south")
        yield sites, coordinator


def test_sites_with_equal_data_learn_what_one_learns(pair, tmp_path, monkeypatch):
    alone = made(tmp_path, "north", same=True)
    activate(tmp_path, monkeypatch)
    coordinator = Coordinator(alone.folder, min_sites=1)
    run_rounds(alone, coordinator, "north")
    together = pair[1].state
    assert all(torch.equal(together[name], tensor) for name, tensor in coordinator.state.items())


def test_rounds_change_what_they_train_and_nothing_else(pair):
    sites, coordinator = pair
    start, state = read_adapter(sites.folder / "start.safetensors")[1], coordinator.state
    assert start.keys() == state.keys()
    assert all(not torch.equal(start[n], state[n]) for n in state if n.endswith(("lora_A", "lora_B")))
    kept = [entry["sites"]["north"] for entry in coordinator.history["rounds"]]
    halves = [sum(t.nbytes for n, t in state.items() if not n.endswith(frozen)) for frozen in ("lora_A", "lora_B")]
    assert [entry["bytes_up"] for entry in kept] == halves
    assert all(set(entry["dice_after"]) == {"organ", "lesion"} for entry in kept)


def test_a_state_that_is_not_complete_is_refused(pair, monkeypatch):
    sites, coordinator = pair
    activate(sites.root, monkeypatch)
    with pytest.raises(FederationError, match="not complete at north.*sends all of it"):
        train_round(sites.preprocessed("north"), 1, {}, "0" * 64)


def test_a_data_set_that_has_not_joined_is_refused(tmp_path):
    with pytest.raises(FederationError, match="has not joined"):
        read_site(tmp_path)


def test_a_site_may_miss_rounds_and_come_back(tmp_path, monkeypatch):
    sites = made(tmp_path, "north", "south", rounds=3)
    activate(tmp_path, monkeypatch)
    coordinator = Coordinator(sites.folder, min_sites=1)
    run_rounds(sites, coordinator, "north", "south", rounds=1)
    run_rounds(sites, coordinator, "north", rounds=1)  # south is away
    run_rounds(sites, coordinator, "north", "south", rounds=1)
    assert [sorted(entry["sites"]) for entry in coordinator.history["rounds"]] == [
        ["north", "south"], ["north"], ["north", "south"]]


def test_a_federation_that_begins_anew_takes_sites_that_know_the_earlier_one(tmp_path, monkeypatch):
    sites = made(tmp_path, "north", rounds=2)
    activate(tmp_path, monkeypatch)
    run_rounds(sites, Coordinator(sites.folder, min_sites=1), "north", rounds=2)
    shutil.rmtree(sites.folder / "run")
    anew = Coordinator(sites.folder, min_sites=1)
    run_rounds(sites, anew, "north", rounds=1)
    assert [sorted(entry["sites"]) for entry in anew.history["rounds"]] == [["north"]]


def test_a_round_can_be_repeated(pair, tmp_path, monkeypatch):
    """The server was killed before it wrote the round: the site trains it again, from what it has."""
    sites = made(tmp_path, "north")
    activate(tmp_path, monkeypatch)
    coordinator = Coordinator(sites.folder, min_sites=1)
    run_rounds(sites, coordinator, "north", rounds=1)
    for _ in range(2):
        trained = train_round(sites.preprocessed("north"), 1, coordinator.to_send(None), coordinator.state_sha256)
    assert all(t.isfinite().all() for t in trained.tensors.values())


def test_what_is_local_is_never_sent_and_never_changed_by_others(tmp_path, monkeypatch):
    sites = made(tmp_path, "north", "south", local=["norms", "heads"], rounds=1, prox=0.1)
    activate(tmp_path, monkeypatch)
    settings, coordinator = read_settings(sites.folder), Coordinator(sites.folder)
    assert {name.split(".")[-3] for name in settings.kept if "seg_layers" in name} and any(
        "norm" in name for name in settings.kept)
    known = run_rounds(sites, coordinator, "north", "south")
    assert not {"norm", "seg_layers"} & {part for name in coordinator.state for part in name.split(".")}
    for name in ("north", "south"):
        finish(sites.preprocessed(name), coordinator.to_send(known[name]), coordinator.state_sha256)
    north, south = (weights(final(sites, name, "nnUNetTrainerLoRA")) for name in ("north", "south"))
    assert all(torch.equal(north[name], south[name]) for name in coordinator.state if name in north)
    different = {name for name in settings.kept if not torch.equal(north[name], south[name])}
    assert any("norm" in name for name in different) and any("seg_layers" in name for name in different)


def test_errors_are_those_of_this_package(tmp_path):
    assert issubclass(FederationError, DanteError)
    with pytest.raises(FederationError, match="federation.json cannot be used"):
        read_settings(tmp_path)
