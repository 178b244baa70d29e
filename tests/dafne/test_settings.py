"""settings.py: what cannot be shipped is refused by name, and the rest is pure JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny

from nnunet_dante.dafne.settings import settings_for
from nnunet_dante.errors import DafneError
from nnunet_dante.models.donor import open_donor


def made(donor, **options):
    return settings_for(donor, **{"orientation": "RAS", "as_shown": False, "mirroring": False, "tile_step": 0.5} | options)


def test_json_gives_the_same_settings_back(tmp_path):
    settings = made(open_donor(tiny.write_model_folder(tmp_path)), mirroring=True)
    assert json.loads(json.dumps(settings)) == settings
    assert settings["mirroring"] == [0, 1, 2]


def test_labels_are_by_name_without_background_and_regions_keep_their_values(tmp_path):
    folder = tiny.write_model_folder(tmp_path, labels={"background": 0, "whole, all": [1, 2], "core": 2},
                                     regions_class_order=[1, 2])
    settings = made(open_donor(folder))
    assert settings["labels"] == [{"name": "whole. all", "values": [1, 2]}, {"name": "core", "values": [2]}]
    assert settings["region_order"] == [1, 2]


def test_labels_that_dafne_cannot_tell_apart_are_refused(tmp_path):
    folder = tiny.write_model_folder(tmp_path, labels={"background": 0, "a,b": 1, "a.b": 2})
    with pytest.raises(DafneError, match="same name"):
        made(open_donor(folder))


def test_the_plans_for_the_way_back_hold_this_configuration_alone(tmp_path):
    donor = open_donor(tiny.write_model_folder(tmp_path, configuration="3d_lowres"))
    plans = made(donor)["origin"]["plans"]
    assert list(plans["configurations"]) == ["3d_lowres"]
    assert "next_stage" not in plans["configurations"]["3d_lowres"]


def changed(key, value):
    def edit(plans):
        plans["configurations"]["3d_fullres"][key] = value
    return edit


@pytest.mark.parametrize(("edit", "message"), [
    (changed("normalization_schemes", ["MyNormalization"]), "a normalisation is 'MyNormalization'"),
    (changed("resampling_fn_data", "my_resampling"), "the resampling of data is 'my_resampling'"),
    (changed("preprocessor_name", "MyPreprocessor"), "the preprocessor is 'MyPreprocessor'")])
def test_what_the_shipped_functions_do_not_do_is_refused(tmp_path, monkeypatch, edit, message):
    donor = open_donor(tiny.write_model_folder(tmp_path))
    edit(donor.plans)
    monkeypatch.setattr("nnunetv2.utilities.plans_handling.plans_handler.recursive_find_resampling_fn_by_name",
                        lambda name: None)
    with pytest.raises(DafneError, match=message):
        made(donor)


@pytest.mark.parametrize(("key", "value"), [
    ("patch_size", "x"), ("spacing", 7), ("architecture", {"arch_kwargs": 3})])
def test_plans_that_misstate_something_are_refused_as_a_whole(tmp_path, key, value):
    donor = open_donor(tiny.write_model_folder(tmp_path))
    changed(key, value)(donor.plans)
    with pytest.raises(DafneError, match="cannot be exported"):
        made(donor)


def test_a_second_stage_of_a_cascade_is_refused(tmp_path):
    donor = open_donor(tiny.write_model_folder(tmp_path, configuration="3d_cascade_fullres"))
    with pytest.raises(DafneError, match="no prediction of a previous stage"):
        made(donor)


def test_networks_that_the_trainer_replaces_are_refused(tmp_path):
    donor = dataclasses.replace(open_donor(tiny.write_model_folder(tmp_path)), network_trainer="nnUNetTrainerBN")
    with pytest.raises(DafneError, match="nnUNetTrainerBN"):
        made(donor)


def test_added_modules_are_described_and_stock_models_say_nothing_of_them(tmp_path):
    """A new key for stock models would change their model ids, so that they no longer merge with older exports."""
    donor = open_donor(tiny.write_model_folder(tmp_path))
    stock = made(donor)["architecture"]
    for trainer, added in (("nnUNetTrainerSpatialAdapter", {"spatial_adapter": True}),
                           ("nnUNetTrainerAdaptFormer", {"adaptformer": {"width": 16, "scale": 0.1}})):
        assert made(dataclasses.replace(donor, network_trainer=trainer))["architecture"] == stock | added
    assert not {"spatial_adapter", "adaptformer"} & set(stock)


def test_axes_that_the_images_do_not_have_are_refused(tmp_path):
    donor = open_donor(tiny.write_model_folder(tmp_path, configuration="2d"))
    with pytest.raises(DafneError, match="mirroring axis is 2; possible is 0 to 1"):
        made(dataclasses.replace(donor, mirroring_axes=(0, 2)))


@pytest.mark.parametrize(("axes", "mirrored"), [((), []), (None, []), ((1,), [1])])
def test_prediction_and_learning_mirror_only_along_the_axes_of_the_training(tmp_path, axes, mirrored):
    donor = dataclasses.replace(open_donor(tiny.write_model_folder(tmp_path)), mirroring_axes=axes)
    for asked in (True, False):
        settings = made(donor, mirroring=asked)
        assert settings["mirroring"] == (mirrored if asked else []) and settings["learning"]["mirroring"] == mirrored
