"""Overrides by name and kind: every option of every method can be set, and what is wrong is named."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from dataclasses import dataclass

import pytest

from nnunet_dante import methods
from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import DanteGradualUnfreezing, LoRA, Method
from nnunet_dante.methods.base import SHARE
from nnunet_dante.models.overrides import OVERRIDES, checked_overrides, known_overrides, parse_overrides
from nnunet_dante.models.settings import new_dante_block, read_dante_block, with_overrides
from nnunet_dante.transfers.plans import merge_plans

ENTRY = {"file": "p_start.pth", "sha256": "a" * 64, "donor": {}}


def all_methods():
    return [m for m in (getattr(methods, name) for name in methods.__all__)
            if isinstance(m, type) and issubclass(m, Method)]


def test_every_option_of_every_method_can_be_set_to_what_it_is():
    known = known_overrides()
    for method in all_methods():
        for field in dataclasses.fields(method):
            if field.name == "uses_start_weights":
                assert field.name not in known
            else:
                assert field.name in known, f"{method.__name__}.{field.name} has a kind that no text can set"
    assert known.items() >= OVERRIDES.items()


@pytest.mark.parametrize(("text", "value"), [
    ("l2_sp=0.01", 0.01), ("l2_sp=1e-3", 1e-3), ("l2_sp=1", 1.0), (" l2_sp = .5 ", 0.5), ("stop_patience=20", 20),
    ("encoder=false", False), ("encoder=True", True), ("size_images=/data/a=b", "/data/a=b"), ("size_images=3", "3"),
    ("direction=input_first", "input_first"), ("epochs=7", 7), ("iterations=9", 9),
    ("targets=decoder.*, encoder.stages.0*", ["decoder.*", "encoder.stages.0*"]), ('targets=["a,b"]', ["a,b"]),
    ('ranks={"decoder.*": 16}', {"decoder.*": 16})])
def test_texts_become_values_of_the_options_kind(text, value):
    (found,) = parse_overrides([text]).values()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("texts", "message"), [
    (["l2sp=1"], "'l2sp' is unknown; allowed are .*, l2_sp,"), (["l2_sp"], "is not KEY=VALUE"),
    (["=3"], "'' is unknown"), (["l2_sp=1", "l2_sp=2"], "sets a key for the second time"),
    (["l2_sp=strong"], "l2_sp is 'strong'; it must be a number"), (["l2_sp="], "it must be a number"),
    (["strength=hello"], "strength is 'hello'; it must be a number or the word auto"),
    (["l2_sp=nan"], "it must be a number"), (["l2_sp=-1"], "l2_sp is -1.0; give 0"),
    (["stop_patience=2.5"], "stop_patience is '2.5'; it must be a whole number"),
    (["encoder=1"], "encoder is '1'; it must be true or false"), (["size_margin=1"], "size_margin is 1.0; give a share"),
    (["epochs=0"], "epochs is 0; give a whole number of at least 1"), (["uses_start_weights=true"], "is unknown")])
def test_what_is_wrong_is_named(texts, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_overrides(texts)


@pytest.mark.parametrize(("name", "value"), [
    ("l2_sp", True), ("l2_sp", "0.1"), ("stop_patience", 1.5), ("stop_patience", True), ("encoder", 1), ("encoder", "true"),
    ("size_images", 3), ("l2_sp", [1])])
def test_values_of_another_kind_are_refused(name, value):
    with pytest.raises(ConfigurationError, match=f"Override {name} is .*; it must be"):
        checked_overrides({name: value})


@pytest.mark.parametrize("text", [
    "direction=sideways", "max_stages=0", "open_by=1.1", "fraction=7", "weight_decay=-1", "warmup_epochs=-1", "lr=0",
    "input_lr_scale=-1", "head_share=1", "dropout=1", "lr_ratio=0", "alpha=-1", "rank=0", "factorisation=tucker",
    'ranks={"decoder.*": 0}', "targets=[1]", "size_margin=1", "size_prior=-1", "size_images=", "ewc=-1",
    "stop_patience=-1", "iterations=0", "val_iterations=-3"])
def test_a_value_out_of_range_is_refused_before_anything_is_written(text):
    name, _, value = text.partition("=")
    with pytest.raises(ConfigurationError, match=rf"{name} is .*; give "):
        parse_overrides([text])


def test_every_option_of_every_method_has_its_limits():
    for method in all_methods():
        without = {field.name for field in dataclasses.fields(method)} - method.limits().keys()
        assert not without, f"{method.__name__} takes any value for {without}"
        method()  # the defaults are within


def test_an_option_with_two_meanings_is_checked_by_those_that_brought_it_in():
    @dataclass(frozen=True, kw_only=True)
    class Percent(Method):
        fraction: float = 50.0

    assert checked_overrides({"fraction": 70.0}) == {"fraction": 70.0}
    with pytest.raises(ConfigurationError, match="fraction is 7.0; give a share"):
        DanteGradualUnfreezing().with_overrides({"fraction": 7.0})
    del Percent
    gc.collect()


def test_a_method_that_needs_an_option_is_checked_without_being_made():
    @dataclass(frozen=True, kw_only=True)
    class Needy(LoRA):
        LIMITS = {"needed_share": SHARE}
        needed: int
        needed_share: float = 0.5

    assert parse_overrides(["needed_share=0.25", "needed=3"]) == {"needed_share": 0.25, "needed": 3}
    assert Needy(needed=1).with_overrides({"needed": 3}).needed == 3
    with pytest.raises(ConfigurationError, match="Needy: needed_share is 2.0; give a share"):
        parse_overrides(["needed_share=2"])


OWN_TRAINER = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nnunet_dante.methods import LoRA


@dataclass(frozen=True, kw_only=True)
class Own(LoRA):
    own_share: Optional[float] = None


class nnUNetTrainerOwn:
    method = Own()
"""


def test_options_of_trainers_below_nnunets_search_path_are_known_without_importing_them_first(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "__init__.py").write_text("")
    (tmp_path / "below" / "own_trainer_of_a_test.py").write_text(OWN_TRAINER)
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    with pytest.raises(ConfigurationError, match="'own_share' is unknown"):
        parse_overrides(["own_share=0.5"])
    monkeypatch.setenv("nnUNet_extTrainer", f"/not/there{os.pathsep}{tmp_path}")
    assert parse_overrides(["own_share=0.5"]) == {"own_share": 0.5}
    gc.collect()
    assert checked_overrides({"own_share": 0.5}) == {"own_share": 0.5}


def test_a_broken_file_in_nnunets_search_path_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_trainer_of_a_test.py").write_text("import nothing_of_this_name")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    with pytest.raises(ConfigurationError, match="nnUNet_extTrainer.*nothing_of_this_name"):
        parse_overrides(["unknown=1"])


def test_options_of_the_users_own_methods_are_known_once_imported():
    @dataclass(frozen=True, kw_only=True)
    class Mine(LoRA):
        ranks: dict[str, int] = dataclasses.field(default_factory=dict)
        share: float | None = None

        def __post_init__(self):
            super().__post_init__()
            if self.share is not None and self.share > 1:
                raise ConfigurationError("Mine: share is too large")

    assert known_overrides()["ranks"] is dict and known_overrides()["share"] is float
    found = parse_overrides(['ranks={"decoder": 4}', "share=0.5"])
    assert found == {"ranks": {"decoder": 4}, "share": 0.5}
    assert Mine().with_overrides(found).ranks == {"decoder": 4}
    for text, message in (("ranks=[1]", "it must be JSON such as"), ("ranks={", "it must be JSON"), ("share=2", "too large")):
        with pytest.raises(ConfigurationError, match=message):
            parse_overrides([text])


def test_old_versions_find_the_six_numbers_where_they_were_and_nothing_they_would_refuse():
    block = new_dante_block("2d", ENTRY, {"epochs": 3, "rank": 2, "l2_sp": 0.1, "size_images": "imagesTs"})
    assert block["format"] == 1
    assert block["overrides"] == {"epochs": 3, "rank": 2} and block["options"] == {"l2_sp": 0.1, "size_images": "imagesTs"}
    found = read_dante_block({"dante": json.loads(json.dumps(block))})
    assert found["overrides"] == {"epochs": 3, "rank": 2, "l2_sp": 0.1, "size_images": "imagesTs"}
    assert "options" not in new_dante_block("2d", ENTRY, {"epochs": 3})
    assert with_overrides(found, found["overrides"]) == block


def test_all_in_one_dict_is_read_too_and_wins():
    block = new_dante_block("2d", ENTRY, {"l2_sp": 0.1})
    block["overrides"]["l2_sp"] = 0.2
    assert read_dante_block({"dante": block})["overrides"] == {"l2_sp": 0.2}


def test_names_that_nobody_knows_are_kept_for_who_does_but_known_ones_are_checked():
    block = new_dante_block("2d", ENTRY, {}) | {"options": {"of_tomorrow": [1]}}
    assert read_dante_block({"dante": block})["overrides"] == {"of_tomorrow": [1]}
    assert LoRA().with_overrides({"of_tomorrow": [1]}) == LoRA()
    with pytest.raises(ConfigurationError, match="l2_sp is 'x'"):
        read_dante_block({"dante": block | {"options": {"l2_sp": "x"}}})


def test_a_second_configuration_keeps_the_options_of_the_first():
    def plans(configuration, **overrides):
        return {"plans_name": "P", "configurations": {configuration: {}},
                "dante": new_dante_block(configuration, ENTRY, overrides)}

    merged = merge_plans(plans("2d", l2_sp=0.1, epochs=3), plans("3d_lowres", l2_sp=0.2, rank=4), configuration="3d_lowres")
    assert merged["dante"]["overrides"] == {"epochs": 3, "rank": 4} and merged["dante"]["options"] == {"l2_sp": 0.2}
    assert set(merged["dante"]["start_weights"]) == {"2d", "3d_lowres"}
