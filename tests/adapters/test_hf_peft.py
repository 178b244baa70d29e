"""Adapters as folders of Hugging Face PEFT: exact there and back, and PEFT itself computes the same with them."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import torch
from running import same, train, with_overrides
from safetensors.torch import load_file, save_file
from torch import nn

from nnunet_dante.adapters.adapter import apply, extract, info, remove
from nnunet_dante.adapters.file import read_adapter
from nnunet_dante.adapters.hf_peft import CONFIG, WEIGHTS, drop_aliases, read_folder, write_folder
from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.errors import AdapterError
from nnunet_dante.methods import DoRA, LoRA
from nnunet_dante.models.checkpoint import load_checkpoint_safely, weights_sha256
from nnunet_dante.peft.inject import adapted, factors, settings
from nnunet_dante.peft.inject import remove as remove_updates
from nnunet_dante.training import trainers

NETWORKS = {"plain": tiny.plain_unet, "plain 2d": lambda: tiny.plain_unet(2), "residual": tiny.residual_unet,
            "anisotropic": lambda: tiny.plain_unet(3, kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
                                                   strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])}


@pytest.fixture(scope="module")
def peft():
    """PEFT; what it brings of transformers goes again, because nnU-Net's search for trainers fails over some versions."""
    before = set(sys.modules)
    yield import_module("peft")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "transformers":
            del sys.modules[name]


def output(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = network.eval()(x)
    return y[0] if isinstance(y, list) else y


def image(network: nn.Module) -> torch.Tensor:
    return torch.rand(1, 1, *[16] * (next(network.parameters()).ndim - 2))


def stirred(network: nn.Module, method: LoRA) -> dict[str, torch.Tensor]:
    """Adapt the network, move everything that the method trains, and return the tensors of its adapter."""
    method.adapt(network)
    method.plan(network).restrict(network)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    state = network.state_dict()
    full = {n: state[n] for n, p in network.named_parameters() if p.requires_grad and n in state}
    return {**factors(network), **full}


def written(folder: Path, network: nn.Module, method: LoRA) -> None:
    tensors = stirred(network, method)
    stock = copy.deepcopy(network)
    remove_updates(stock)
    metadata = {"updates": settings(network), "method": "LoRA"}
    write_folder(folder, metadata, tensors, network.state_dict(), stock)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"rank_stabilised": True, "ranks": {"encoder.*": 2}},
                                     {"alpha": 3.0, "encoder": False}], ids=["default", "stabilised", "decoder"])
def test_peft_computes_the_same_with_the_folder(peft, tmp_path, name, options):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    base, x = copy.deepcopy(network), image(network)
    written(tmp_path, network, LoRA(**({"factorisation": "flat", "rank": 3} | options)))
    drop_aliases(base)
    assert torch.allclose(output(peft.PeftModel.from_pretrained(base, tmp_path), x), output(network, x), atol=1e-4)


def test_peft_says_that_a_network_with_aliases_has_not_these_layers(peft, tmp_path):
    network = tiny.plain_unet()
    base = copy.deepcopy(network)
    written(tmp_path, network, LoRA(factorisation="flat", rank=3))
    with pytest.raises(ValueError, match="No modules were targeted"):
        peft.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropping_aliases_changes_no_output_and_leaves_each_tensor_one_name(name):
    network = NETWORKS[name]()
    x = image(network)
    before, parameters = output(network, x), {id(p) for p in network.parameters()}
    drop_aliases(network)
    assert torch.equal(output(network, x), before) and {id(p) for p in network.parameters()} == parameters
    assert len(list(network.named_parameters(remove_duplicate=False))) == len(parameters)
    assert torch.equal(output(copy.deepcopy(network), x), before)


def test_layers_that_peft_computes_otherwise_are_stored_in_full(tmp_path):
    network = tiny.plain_unet()
    written(tmp_path, network, LoRA(factorisation="flat", rank=2))
    config, content = json.loads((tmp_path / CONFIG).read_text()), load_file(tmp_path / WEIGHTS)
    assert any("transpconvs" in name for name in adapted(network))
    for name, layer in network.decoder.transpconvs.named_children():
        assert f"decoder.transpconvs.{name}" in config["modules_to_save"]
        assert torch.equal(content[f"base_model.model.decoder.transpconvs.{name}.weight"], layer.weight)
    assert config["target_modules"] and all("all_modules.0" in name for name in config["target_modules"])


@pytest.mark.parametrize(("method", "named"), [(LoRA(rank=1), "nnUNetTrainerLoRAFlat"),
                                               (DoRA(rank=1, factorisation="flat"), "nnUNetTrainerLoRAFlat")])
def test_other_updates_are_refused(tmp_path, method, named):
    with pytest.raises(AdapterError, match=named):
        written(tmp_path / "folder", tiny.plain_unet(), method)
    assert not (tmp_path / "folder").exists()


def test_parameters_outside_layers_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="trained in full and belongs to no layer"):
        written(tmp_path, tiny.primus(), LoRA(factorisation="flat", rank=2))


@pytest.fixture(scope="module")
def trained(prepared_once, tmp_path_factory) -> Path:
    """A folder with checkpoint_final.pth, start.pth and the folder peft."""
    with pytest.MonkeyPatch.context() as patch:
        # At another strength PEFT's alpha carries it, which rounds otherwise than the checkpoint does.
        trainer = train(trainers.nnUNetTrainerLoRAFlat, prepared_once.activate(patch),
                        plans=with_overrides(prepared_once, strength=1.0))
    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(Path(trainer.output_folder, "checkpoint_final.pth"), folder)
    shutil.copy(prepared_once.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth", folder / "start.pth")
    extract(folder / "checkpoint_final.pth", folder / "peft", form="peft")
    return folder


def test_base_and_folder_equal_the_checkpoint_and_can_be_taken_apart_again(trained, tmp_path):
    assert "factors of" in info(trained / "peft")
    assert inspect_path(trained / "peft") == info(trained / "peft")
    apply(trained / "start.pth", trained / "peft", tmp_path / "merged.pth")
    assert same(tmp_path / "merged.pth", trained / "checkpoint_final.pth")
    remove(tmp_path / "merged.pth", tmp_path / "removed.pth")
    assert same(tmp_path / "removed.pth", trained / "start.pth")
    extract(tmp_path / "merged.pth", tmp_path / "adapter.safetensors")
    apply(trained / "start.pth", tmp_path / "adapter.safetensors", tmp_path / "again.pth")
    assert same(tmp_path / "again.pth", trained / "checkpoint_final.pth")
    with pytest.raises(AdapterError, match="was trained on weights"):
        apply(trained / "checkpoint_final.pth", trained / "peft", tmp_path / "wrong.pth")


def test_what_peft_saves_again_is_read_with_a_whole_checkpoint_as_base(peft, trained, tmp_path):
    from nnunet_dante.models.network import build_network

    final = load_checkpoint_safely(trained / "checkpoint_final.pth")
    init = final["init_args"]
    network = build_network(init["plans"], init["dataset_json"], init["configuration"])
    network.load_state_dict(load_checkpoint_safely(trained / "start.pth")["network_weights"])
    drop_aliases(network)
    peft.PeftModel.from_pretrained(network, trained / "peft").save_pretrained(tmp_path / "saved")
    with pytest.raises(AdapterError, match="whole checkpoint_final.pth as its base"):
        apply(trained / "start.pth", tmp_path / "saved", tmp_path / "merged.pth")
    remove(trained / "checkpoint_final.pth", tmp_path / "base.pth")
    apply(tmp_path / "base.pth", tmp_path / "saved", tmp_path / "merged.pth")
    assert same(tmp_path / "merged.pth", trained / "checkpoint_final.pth")


def test_damaged_folders_and_other_methods_of_peft_are_refused(trained, tmp_path):
    shutil.copytree(trained / "peft", tmp_path / "a")
    content = load_file(tmp_path / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="no folder of PEFT"):
        read_adapter(tmp_path)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for change, named in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3")):
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config | change))
        with pytest.raises(AdapterError, match=named):
            read_adapter(tmp_path / "a")
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    from safetensors import safe_open

    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        kept = file.metadata()
    assert weights_sha256(content) == json.loads(kept["nnunet_dante"])["tensors_sha256"]
    next(iter(content.values())).add_(1)
    save_file(content, tmp_path / "a" / WEIGHTS, metadata=kept)
    with pytest.raises(AdapterError, match="copy it again"):
        read_folder(tmp_path / "a")


def test_the_command_line_writes_and_applies_it(trained, tmp_path):
    from click.testing import CliRunner

    from nnunet_dante.cli import main

    def run(*words: object) -> None:
        result = CliRunner().invoke(main, ["adapter", *map(str, words)])
        assert result.exit_code == 0, result.output

    run("extract", trained / "checkpoint_final.pth", "--format", "peft", "-o", tmp_path / "folder")
    assert {file.name for file in (tmp_path / "folder").iterdir()} == {CONFIG, WEIGHTS}
    run("apply", trained / "start.pth", tmp_path / "folder", "-o", tmp_path / "merged.pth")
    assert same(tmp_path / "merged.pth", trained / "checkpoint_final.pth")
