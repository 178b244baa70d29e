"""Adapter files against a checkpoint that a trainer wrote: exact there and back, refused on anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from running import same, train
from safetensors.torch import save_file

from nnunet_dante.adapters.adapter import apply, extract, info, remove
from nnunet_dante.adapters.file import read_adapter, write_adapter
from nnunet_dante.adapters.strength import at_strength, start_weights
from nnunet_dante.errors import AdapterError
from nnunet_dante.models.checkpoint import load_checkpoint_safely, replaced, save_atomically
from nnunet_dante.training import trainers


@pytest.fixture(scope="module")
def trained(prepared_once, tmp_path_factory) -> Path:
    """A folder with checkpoint_final.pth, all that was learned in it, adapter.safetensors and start.pth."""
    with pytest.MonkeyPatch.context() as patch:
        trainer = train(trainers.nnUNetTrainerLoRADecoder, prepared_once.activate(patch))
    folder = tmp_path_factory.mktemp("trained")
    final = load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_final.pth"))
    save_atomically(at_strength(final, 1), folder / "checkpoint_final.pth")
    extract(folder / "checkpoint_final.pth", folder / "adapter.safetensors")
    shutil.copy(prepared_once.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth", folder / "start.pth")
    return folder


def test_base_and_adapter_equal_the_merged_checkpoint(trained, tmp_path):
    apply(trained / "start.pth", trained / "adapter.safetensors", tmp_path / "merged.pth")
    assert same(tmp_path / "merged.pth", trained / "checkpoint_final.pth")
    assert not same(tmp_path / "merged.pth", trained / "start.pth")
    assert (tmp_path / "merged.pth").stat().st_size < 2.5 * (trained / "start.pth").stat().st_size
    merged = load_checkpoint_safely(tmp_path / "merged.pth")
    final = load_checkpoint_safely(trained / "checkpoint_final.pth")
    for key in ("trainer_name", "inference_allowed_mirroring_axes"):
        assert merged[key] == final[key]
    assert merged["init_args"]["plans"] == final["init_args"]["plans"]


@pytest.mark.parametrize("source", ["checkpoint_final.pth", "merged.pth"])
def test_removing_restores_the_base_bit_for_bit(trained, tmp_path, source):
    shutil.copy(trained / "checkpoint_final.pth", tmp_path)
    apply(trained / "start.pth", trained / "adapter.safetensors", tmp_path / "merged.pth")
    remove(tmp_path / source, tmp_path / "base.pth")
    assert same(tmp_path / "base.pth", trained / "start.pth")
    apply(tmp_path / "base.pth", trained / "adapter.safetensors", tmp_path / "again.pth")
    assert same(tmp_path / "again.pth", trained / "checkpoint_final.pth")


@pytest.mark.parametrize("strength", [0, 0.5, 1, 1.5])
@pytest.mark.parametrize("factors", [True, False])
def test_the_strength_of_a_checkpoint_made_of_an_adapter_can_be_changed_exactly(trained, tmp_path, strength, factors):
    content = load_checkpoint_safely(trained / "checkpoint_final.pth")
    start = start_weights(content)
    if not factors:  # as of BitFit
        adapter = content["dante"]["adapter"]
        base = {name: tensor for name, tensor in adapter["base"].items() if name not in adapter["updates"]}
        content["network_weights"] = replaced(start, {name: content["network_weights"][name] for name in base})
        content["dante"]["adapter"] = {"base": base, "updates": {}, "factors": {}}
    save_atomically(at_strength(content, strength, start=start), tmp_path / "at.pth")
    extract(tmp_path / "at.pth", tmp_path / "a.safetensors")
    apply(trained / "start.pth", tmp_path / "a.safetensors", tmp_path / "applied.pth")
    assert same(tmp_path / "applied.pth", tmp_path / "at.pth")
    applied = load_checkpoint_safely(tmp_path / "applied.pth")
    for other in (0.25, 1, 0, strength):
        applied, expected = at_strength(applied, other), at_strength(content, other, start=start)["network_weights"]
        assert all(torch.equal(applied["network_weights"][key], expected[key]) for key in expected)
    assert f"strength       {strength:g}, where 1 is all that was learned" in info(tmp_path / "a.safetensors")


def test_an_adapter_that_says_two_strengths_is_refused(trained, tmp_path):
    metadata, tensors = read_adapter(trained / "adapter.safetensors")
    updates = {name: {**settings, "strength": 0.5} for name, settings in metadata["updates"].items()}
    with pytest.raises(AdapterError, match="a.safetensors is at strength 0.25, and its update of .* at 0.5.*extract"):
        write_adapter({**metadata, "updates": updates, "strength": {"value": 0.25}}, tensors, tmp_path / "a.safetensors")
    rewritten(trained / "adapter.safetensors", tmp_path / "a.safetensors", lambda m, t: m.update(strength={"value": 0.25}))
    with pytest.raises(AdapterError, match="a.safetensors is at strength 0.25, and its update of .* at 1.*extract"):
        apply(trained / "start.pth", tmp_path / "a.safetensors", tmp_path / "merged.pth")


def test_extracting_twice_gives_the_same_file(trained, tmp_path):
    extract(trained / "checkpoint_final.pth", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (trained / "adapter.safetensors").read_bytes()


def test_it_holds_factors_and_what_was_trained_in_full_and_nothing_else(trained):
    metadata, tensors = read_adapter(trained / "adapter.safetensors")
    assert metadata["method"] == "LoRA" and metadata["options"]["rank"] == 2
    assert not any(name.startswith("encoder") for name in tensors)
    assert any(name.endswith("lora_A") for name in tensors) and "decoder.seg_layers.0.weight" in tensors
    said = info(trained / "adapter.safetensors")
    assert metadata["base_sha256"] in said and "vessel" in said and "Dataset901_Tiny" in said


def test_another_base_is_refused_and_nothing_is_written(trained, tmp_path):
    content = load_checkpoint_safely(trained / "start.pth")
    content["network_weights"]["decoder.seg_layers.0.bias"] += 1e-6
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(AdapterError, match="trained on weights with sha256 .* other.pth holds"):
        apply(tmp_path / "other.pth", trained / "adapter.safetensors", tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


def rewritten(source: Path, target: Path, change) -> Path:
    """The adapter after change(metadata, tensors), without checksum as older files are."""
    metadata, tensors = read_adapter(source)
    change(metadata, tensors)
    save_file(tensors, target, metadata={"nnunet_dante": json.dumps(metadata)})
    return target


def test_a_changed_number_or_word_is_noticed(trained, tmp_path):
    content = (trained / "adapter.safetensors").read_bytes()
    for place in (len(content) - 2, content.find(b"vessel")):
        (tmp_path / "flipped").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(AdapterError, match="does not hold what was written"):
            read_adapter(tmp_path / "flipped")


@pytest.mark.parametrize(("change", "match"), [
    (lambda m, t: m["updates"].popitem(), "changes .*lora_A"),
    (lambda m, t: next(iter(m["updates"].values())).update(rank=10**9, factorisation="none"), "is damaged"),
    (lambda m, t: next(iter(m["updates"].values())).update(kind="dora", groups=10**9, transposed=True), "is damaged"),
    (lambda m, t: next(iter(m["updates"].values())).update(alpha="a"), "is damaged"),
    (lambda m, t: t.update({"decoder.seg_layers.0.bias": torch.zeros(9)}), "another shape"),
    (lambda m, t: t["decoder.seg_layers.0.bias"].fill_(float("nan")), "infinite"),
    (lambda m, t: t.update(unknown=torch.zeros(1)), "changes unknown"),
    (lambda m, t: t.update({"decoder.encoder.stages.0.0.convs.0.norm.bias": torch.zeros(4)}), "under another name"),
    (lambda m, t: (m.update(strength={"value": 1.0}), t.update({"trained:unknown": torch.zeros(1)})), "changes unknown"),
    (lambda m, t: m.update(strength={"value": float("nan")}), "damaged: .*strength"),
    (lambda m, t: m.pop("init_args"), "damaged: .*init_args"), (lambda m, t: m.update(method=3), "damaged: .*method"),
    (lambda m, t: m.update(inference_allowed_mirroring_axes=[[0]]), "damaged: .*inference_allowed_mirroring_axes")])
def test_a_damaged_adapter_is_refused_and_nothing_is_written(trained, tmp_path, change, match):
    adapter = rewritten(trained / "adapter.safetensors", tmp_path / "a.safetensors", change)
    with pytest.raises(AdapterError, match=match):
        apply(trained / "start.pth", adapter, tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()


@pytest.mark.parametrize("change", [lambda c: c["dante"].update(adapter=[1]), lambda c: c["dante"].update(adapter=torch.ones(2)),
                                    lambda c: c["dante"]["adapter"].pop("base"),
                                    lambda c: c.pop("init_args"), lambda c: c.update(network_weights=[]),
                                    lambda c: c["dante"]["adapter"]["base"].update(x=torch.zeros(1))])
def test_a_damaged_checkpoint_gives_no_adapter_and_no_base(trained, tmp_path, change):
    content = load_checkpoint_safely(trained / "checkpoint_final.pth")
    change(content)
    torch.save(content, tmp_path / "c.pth")
    for command in (extract, remove):
        with pytest.raises(AdapterError, match="damaged"):
            command(tmp_path / "c.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_adapter_is_written_that_could_not_be_read_again(trained, tmp_path):
    content = load_checkpoint_safely(trained / "checkpoint_final.pth")
    content["dante"]["method"] = 3
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(AdapterError, match="damaged: .*method"):
        extract(tmp_path / "c.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_tensor_among_the_words_of_a_checkpoint_is_refused_by_the_adapter(trained, tmp_path):
    content = load_checkpoint_safely(trained / "checkpoint_final.pth")
    content["dante"]["label_map"] = torch.zeros(1)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(AdapterError, match="no JSON"):
        extract(tmp_path / "c.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_hold_no_adapter_are_refused(trained, tmp_path):
    with pytest.raises(AdapterError, match="holds no adapter"):
        extract(trained / "start.pth", tmp_path / "a.safetensors")
    (tmp_path / "cut").write_bytes((trained / "adapter.safetensors").read_bytes()[:1000])
    with pytest.raises(AdapterError, match="damaged"):
        info(tmp_path / "cut")
    with pytest.raises(AdapterError, match="does not exist"):
        info(tmp_path / "missing")
    with pytest.raises(AdapterError, match="checkpoint_final.pth is a checkpoint, no adapter.*adapter extract"):
        apply(trained / "start.pth", trained / "checkpoint_final.pth", tmp_path / "merged.pth")
    with pytest.raises(AdapterError, match="is no folder of PEFT.*adapter extract"):
        info(trained)
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(AdapterError, match="not an adapter of nnunet_dante"):
        info(tmp_path / "foreign")


def test_a_file_of_format_1_gives_the_same_checkpoint(trained, tmp_path):
    """Rank, alpha and factorisation stood in the metadata once for all; there were no other updates and no checksum."""
    metadata, tensors = read_adapter(trained / "adapter.safetensors")
    old = {k: v for k, v in metadata.items() if k not in ("updates", "options")}
    old |= {"format": 1, **{k: metadata["options"][k] for k in ("rank", "alpha", "factorisation")}}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "old.safetensors", metadata={"nnunet_dante": json.dumps(old)})
    apply(trained / "start.pth", tmp_path / "old.safetensors", tmp_path / "merged.pth")
    assert same(tmp_path / "merged.pth", trained / "checkpoint_final.pth")
    assert "LoRA, rank 2, alpha 4.0, channel" in info(tmp_path / "old.safetensors").replace("factorisation ", "")


def test_a_checkpoint_from_before_format_2_can_be_extracted(trained, tmp_path):
    content = load_checkpoint_safely(trained / "checkpoint_final.pth")
    options = content["dante"]["options"]
    del content["dante"]["adapter"]["updates"]
    content["dante"] |= {k: options[k] for k in ("rank", "alpha", "factorisation")}
    torch.save(content, tmp_path / "old.pth")
    extract(tmp_path / "old.pth", tmp_path / "a.safetensors")
    apply(trained / "start.pth", tmp_path / "a.safetensors", tmp_path / "merged.pth")
    assert same(tmp_path / "merged.pth", trained / "checkpoint_final.pth")
