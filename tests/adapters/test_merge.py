"""merge.py: the sum of adapters is the sum of what they do to the weights, and only of adapters of one base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import train
from safetensors.torch import save

from nnunet_dante import DanteError
from nnunet_dante.adapters.adapter import apply, extract, info
from nnunet_dante.adapters.file import read_adapter, write_adapter
from nnunet_dante.adapters.merge import merge
from nnunet_dante.adapters.strength import at_strength
from nnunet_dante.models.checkpoint import load_checkpoint_safely, save_atomically
from nnunet_dante.training import trainers


@pytest.fixture(scope="module")
def folder(prepared_once, tmp_path_factory):
    """Two adapters a and b of each kind on start.pth; b has other numbers, as of another training."""
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        prepared = prepared_once.activate(patch)
        for name in ("LoRA", "LoRAFlat", "DoRA", "ConvAdapter", "BitFit"):
            trainer = train(getattr(trainers, f"nnUNetTrainer{name}"), prepared)
            final = Path(trainer.output_folder, "checkpoint_final.pth")
            save_atomically(at_strength(load_checkpoint_safely(final), 1), final)
            extract(final, folder / "whole")
            metadata, tensors = read_adapter(folder / "whole")
            generator = torch.Generator().manual_seed(1)
            for letter in "ab":
                write_adapter(metadata, tensors, folder / f"{name}_{letter}.safetensors")
                tensors = {key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
                           for key, tensor in tensors.items()}
        start = load_checkpoint_safely(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")
    torch.save(start, folder / "start.pth")
    return folder


def weights_with(folder, adapter, tmp_path):
    apply(folder / "start.pth", adapter, tmp_path / "applied.pth")
    return load_checkpoint_safely(tmp_path / "applied.pth")["network_weights"]


@pytest.mark.parametrize("shares", [None, (0.3, 0.7), (1.0, 1.0), (1.0, -0.5)])
@pytest.mark.parametrize("kinds", [("LoRA", "LoRA"), ("LoRAFlat", "LoRAFlat"), ("DoRA", "DoRA"),
                                   ("ConvAdapter", "ConvAdapter"), ("LoRA", "ConvAdapter"), ("LoRA", "LoRAFlat")])
def test_the_merged_adapter_does_the_weighted_sum_of_what_each_does(folder, tmp_path, kinds, shares):
    files = [folder / f"{kind}_{letter}.safetensors" for kind, letter in zip(kinds, "ab")]
    merge(files, tmp_path / "sum.safetensors", weights=shares, base=folder / "start.pth")
    start = load_checkpoint_safely(folder / "start.pth")["network_weights"]
    alone = [weights_with(folder, file, tmp_path) for file in files]
    for key, tensor in weights_with(folder, tmp_path / "sum.safetensors", tmp_path).items():
        expected = start[key].double() + sum(
            share * (one[key].double() - start[key].double()) for share, one in zip(shares or (0.5, 0.5), alone))
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-5)


def test_factors_stay_factors_where_they_cost_less_than_the_weight(folder, tmp_path):
    merge([folder / "LoRAFlat_a.safetensors", folder / "LoRAFlat_b.safetensors"], tmp_path / "sum.safetensors",
          base=folder / "start.pth")
    metadata, tensors = read_adapter(tmp_path / "sum.safetensors")
    one, _ = read_adapter(folder / "LoRAFlat_a.safetensors")
    stacked = metadata["updates"]
    assert stacked and all(update["rank"] == update["alpha"] for update in stacked.values())
    for name in one["updates"]:
        weight = load_checkpoint_safely(folder / "start.pth")["network_weights"][name]
        size = sum(tensors[f"{name}.{f}"].numel() for f in ("lora_A", "lora_B")) if name in stacked else weight.numel()
        assert size < weight.numel() if name in stacked else name in tensors


def test_the_average_of_tensors_trained_in_full_needs_no_base(folder, tmp_path):
    metadata, tensors = read_adapter(folder / "LoRA_a.safetensors")
    full = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in metadata["updates"]}
    for letter, amount in (("a", 0.0), ("b", 2.0)):
        write_adapter({**metadata, "updates": {}}, {k: v + amount for k, v in full.items()}, tmp_path / letter)
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    for key, tensor in read_adapter(tmp_path / "sum")[1].items():
        torch.testing.assert_close(tensor, full[key] + 1)
    with pytest.raises(DanteError, match="give --base"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "sum", weights=(1, 1))


def test_other_bases_and_numbers_are_refused_by_name(folder, tmp_path):
    metadata, tensors = read_adapter(folder / "LoRA_b.safetensors")
    write_adapter({**metadata, "base_sha256": "0" * 64}, tensors, tmp_path / "stranger.safetensors")
    with pytest.raises(DanteError, match=r"stranger.safetensors was trained on another base than .*LoRA_a.safetensors"):
        merge([folder / "LoRA_a.safetensors", tmp_path / "stranger.safetensors"], tmp_path / "sum")
    with pytest.raises(DanteError, match=r"at least two adapters, and 1 was given \(LoRA_a.safetensors\)"):
        merge([folder / "LoRA_a.safetensors"], tmp_path / "sum")
    for weights, said in (((0, 0), "weights are 0, 0, which adds nothing"), ((float("nan"), 1), "weights nan, 1 were"),
                          ((1e300, 1), "is infinite or not a number: the weights 1e")):
        with pytest.raises(DanteError, match=said):
            merge([folder / "BitFit_a.safetensors", folder / "BitFit_b.safetensors"], tmp_path / "sum", weights=weights,
                  base=folder / "start.pth")
    for odd in (folder, folder / "start.pth"):
        with pytest.raises(DanteError, match=f"{odd.name} is (a checkpoint|no folder of PEFT).*adapter extract"):
            merge([folder / "LoRA_a.safetensors", odd], tmp_path / "sum")
    with pytest.raises(DanteError, match="one finite number for each"):
        merge([folder / "LoRA_a.safetensors", folder / "LoRA_b.safetensors"], tmp_path / "sum", weights=(1, 1, 1))
    torch.save({"network_weights": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(DanteError, match="other.pth is not the base"):
        merge([folder / "LoRA_a.safetensors", folder / "LoRA_b.safetensors"], tmp_path / "sum",
              base=tmp_path / "other.pth")
    for content in ({"network_weights": [1]}, {"x": 1}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(DanteError, match="other.pth"):
            merge([folder / "LoRA_a.safetensors", folder / "LoRA_b.safetensors"], tmp_path / "sum",
                  base=tmp_path / "other.pth")
    assert not (tmp_path / "sum").exists()


def test_other_labels_are_refused_by_name(folder, tmp_path):
    metadata, tensors = read_adapter(folder / "LoRA_b.safetensors")
    init = metadata["init_args"]
    labels = {"liver" if name == "organ" else name: value for name, value in init["dataset_json"]["labels"].items()}
    write_adapter({**metadata, "init_args": {**init, "dataset_json": {**init["dataset_json"], "labels": labels}}},
                  tensors, tmp_path / "liver.safetensors")
    with pytest.raises(DanteError, match="liver.safetensors was trained for the labels background, lesion, liver, vessel"):
        merge([folder / "LoRA_a.safetensors", tmp_path / "liver.safetensors"], tmp_path / "sum")


def test_adapters_at_other_strengths_add_what_they_keep_and_the_sum_names_its_summands(folder, tmp_path):
    start = load_checkpoint_safely(folder / "start.pth")["network_weights"]
    files, expected = [], {key: tensor.double() for key, tensor in start.items()}
    for letter, strength in (("a", 0.5), ("b", 0.25)):
        apply(folder / "start.pth", folder / f"LoRAFlat_{letter}.safetensors", tmp_path / "applied.pth")
        kept = at_strength(load_checkpoint_safely(tmp_path / "applied.pth"), strength)
        torch.save(kept, tmp_path / "kept.pth")
        files.append(tmp_path / f"{letter}.safetensors")
        extract(tmp_path / "kept.pth", files[-1])
        expected = {key: tensor + (kept["network_weights"][key].double() - start[key]) / 2
                    for key, tensor in expected.items()}
    said = merge(files, tmp_path / "sum", base=folder / "start.pth")
    assert "0.5 x a.safetensors: LoRA, Dataset901_Tiny, fold 0, strength 0.5 + 0.5 x b.safetensors: LoRA" in said
    summed = weights_with(folder, tmp_path / "sum", tmp_path)
    for key, tensor in summed.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-5, atol=1e-5)
    assert "sum of         0.5 x a.safetensors" in info(tmp_path / "sum") and "strength       1," in info(tmp_path / "sum")
    at_1 = at_strength(load_checkpoint_safely(tmp_path / "applied.pth"), 1)["network_weights"]
    assert all(torch.equal(at_1[key], tensor) for key, tensor in summed.items())


def test_adapters_of_format_1_can_be_added(folder, tmp_path):
    metadata, tensors = read_adapter(folder / "LoRA_a.safetensors")
    settings = next(iter(metadata["updates"].values()))
    old = {key: value for key, value in metadata.items() if key != "updates"} | {
        "format": 1, **{key: settings[key] for key in ("rank", "alpha", "factorisation")}}
    (tmp_path / "old").write_bytes(save(tensors, metadata={"nnunet_dante": json.dumps(old)}))
    files = [folder / "LoRA_a.safetensors", folder / "LoRA_b.safetensors"]
    merge(files, tmp_path / "new_sum", base=folder / "start.pth")
    merge([tmp_path / "old", files[1]], tmp_path / "old_sum", base=folder / "start.pth")
    wanted = weights_with(folder, tmp_path / "new_sum", tmp_path)
    for key, tensor in weights_with(folder, tmp_path / "old_sum", tmp_path).items():
        torch.testing.assert_close(tensor, wanted[key])


def test_folders_of_peft_are_added_under_the_names_of_the_base(folder, tmp_path):
    for letter in "ab":
        apply(folder / "start.pth", folder / f"LoRAFlat_{letter}.safetensors", tmp_path / f"{letter}.pth")
        extract(tmp_path / f"{letter}.pth", tmp_path / letter, form="peft")
    alone = [load_checkpoint_safely(tmp_path / f"{letter}.pth")["network_weights"] for letter in "ab"]
    with pytest.raises(DanteError, match="a is a folder of PEFT"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "sum")
    for first in (tmp_path / "a", folder / "LoRAFlat_a.safetensors"):
        merge([first, tmp_path / "b"], tmp_path / "sum", base=folder / "start.pth")
        for key, tensor in weights_with(folder, tmp_path / "sum", tmp_path).items():
            torch.testing.assert_close(tensor, (alone[0][key] + alone[1][key]) / 2, rtol=1e-5, atol=1e-5)


def test_damaged_settings_and_bases_end_in_an_error_of_this_package(folder, tmp_path):
    metadata, tensors = read_adapter(folder / "LoRA_a.safetensors")
    files = [tmp_path / "bad", folder / "LoRA_b.safetensors"]
    write_adapter({**metadata, "updates": {name: {**settings, "rank": 0} for name, settings in
                                           metadata["updates"].items()}}, tensors, files[0])
    with pytest.raises(DanteError, match="cannot be added"):
        merge(files, tmp_path / "sum", base=folder / "start.pth")
    for content in ({}, {"network_weights": [1]}, {"network_weights": {"a": 1}}):
        torch.save(content, tmp_path / "base.pth")
        with pytest.raises(DanteError, match="base.pth is damaged"):
            merge(files, tmp_path / "sum", base=tmp_path / "base.pth")
