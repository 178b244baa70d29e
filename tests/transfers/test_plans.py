"""plans.py: the donor's network and preprocessing, the target's names, in the target's channel order."""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.settings import new_dante_block
from nnunet_dante.transfers.match import NameMatch
from nnunet_dante.transfers.plans import merge_plans, retarget_plans

ENTRY = {"file": "a.pth", "sha256": "0" * 64}


def fingerprint(channels=1, *, n=3, shape=(20, 24, 18), spacing=(1.0, 1.0, 1.0), relative=1.0):
    return {"spacings": [list(spacing)] * n, "shapes_after_crop": [list(shape)] * n,
            "median_relative_size_after_cropping": relative,
            "foreground_intensity_properties_per_channel": {str(i): {"mean": 100.0 + i, "std": 1.0} for i in range(channels)}}


def retarget(plans, *, configuration="3d_fullres", donor=("MRI",), target=("MRI",), **options):
    options = {"plans_name": "P", "dataset_name": "Dataset901_T", "reader": "NibabelIO",
               "fingerprint": fingerprint(len(target))} | options
    return retarget_plans(plans, configuration=configuration, channels=NameMatch(donor=donor, target=target), **options)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"])
@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_network_and_preprocessing_are_the_donors(configuration, architecture):
    donor = tiny.plans("Dataset900_D", architecture=architecture, spacing_mm=(3.0, 1.0, 0.5), transpose=(2, 0, 1))
    before = deepcopy(donor)
    plans, _ = retarget(donor, configuration=configuration)
    assert donor == before
    new, old = (PlansManager(p).get_configuration(configuration).configuration for p in (plans, donor))
    changed = {key for key in old if new[key] != old[key]}
    assert changed <= {"data_identifier", "median_image_size_in_voxels"}
    assert plans["transpose_forward"] == [2, 0, 1]
    assert (plans["dataset_name"], plans["plans_name"], plans["image_reader_writer"]) == ("Dataset901_T", "P", "NibabelIO")


@pytest.mark.parametrize(("configuration", "kept"), [
    ("2d", {"2d"}), ("3d_fullres", {"3d_fullres"}),
    ("3d_lowres", {"3d_lowres", "3d_cascade_fullres", "3d_fullres"}),
    ("3d_cascade_fullres", {"3d_lowres", "3d_cascade_fullres", "3d_fullres"})])
def test_only_what_the_configuration_needs_is_kept(configuration, kept):
    plans, _ = retarget(tiny.plans("Dataset900_D"), configuration=configuration)
    assert set(plans["configurations"]) == kept
    manager = PlansManager(plans)
    for name in kept:
        config = manager.get_configuration(name)
        assert all(n in kept for n in [*(config.next_stage_names or []), *filter(None, [config.previous_stage_name])])


def test_shared_preprocessed_data_stay_shared():
    donor = tiny.plans("Dataset900_D")
    donor["configurations"]["3d_fullres_bs4"] = donor["configurations"]["3d_fullres"] | {
        "inherits_from": "3d_fullres", "batch_size": 4}
    plans, _ = retarget(donor, configuration="3d_fullres_bs4")
    manager = PlansManager(plans)
    assert {manager.get_configuration(c).data_identifier for c in plans["configurations"]} == {"P_3d_fullres"}
    cascade, _ = retarget(donor, configuration="3d_cascade_fullres")
    assert PlansManager(cascade).get_configuration("3d_cascade_fullres").data_identifier == "P_3d_fullres"
    assert PlansManager(cascade).get_configuration("3d_lowres").data_identifier == "P_3d_lowres"


def two_channel_donor():
    donor = tiny.plans("Dataset900_D", channels=2)
    donor["configurations"]["3d_fullres"] |= {"normalization_schemes": ["CTNormalization", "RescaleTo01Normalization"],
                                              "use_mask_for_norm": [False, True]}
    donor["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0}, "1": {"mean": 1.0}}
    return donor


def test_normalisation_follows_the_channel_name():
    plans, report = retarget(two_channel_donor(), donor=("CT", "PET"), target=("pet", "T2", "CT"))
    config = plans["configurations"]["3d_fullres"]
    assert config["normalization_schemes"] == ["RescaleTo01Normalization", "ZScoreNormalization", "CTNormalization"]
    assert config["use_mask_for_norm"] == [True, False, False]
    means = [plans["foreground_intensity_properties_per_channel"][str(i)]["mean"] for i in range(3)]
    assert means == [1.0, 101.0, 0.0]
    assert [c.scheme_from for c in report.channels] == ["donor", "target", "donor"]
    assert [c.statistics_from for c in report.channels] == ["donor", "target", "donor"]


def test_intensity_target_uses_the_targets_statistics_with_the_donors_schemes():
    plans, report = retarget(two_channel_donor(), donor=("CT", "PET"), target=("CT", "PET"), intensity="target")
    means = [plans["foreground_intensity_properties_per_channel"][str(i)]["mean"] for i in range(2)]
    assert means == [100.0, 101.0]
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"][0] == "CTNormalization"
    assert {c.statistics_from for c in report.channels} == {"target"}


@pytest.mark.parametrize(("name", "scheme", "relative", "mask"), [
    ("CT", "CTNormalization", 0.5, False), ("T1", "ZScoreNormalization", 0.5, True),
    ("T1", "ZScoreNormalization", 0.9, False), ("noNorm", "NoNormalization", 0.5, False)])
def test_new_channels_get_nnunets_own_scheme_and_mask(name, scheme, relative, mask):
    plans, _ = retarget(tiny.plans("D"), target=(name,), fingerprint=fingerprint(relative=relative))
    config = plans["configurations"]["3d_fullres"]
    assert (config["normalization_schemes"], config["use_mask_for_norm"]) == ([scheme], [mask])


def test_old_plans_keep_working():
    donor = tiny.plans("D")
    config = donor["configurations"]["3d_fullres"]
    arch = config.pop("architecture")["arch_kwargs"]
    config |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 12,
               "n_conv_per_stage_encoder": arch["n_conv_per_stage"], "num_pool_per_axis": [2, 2, 2],
               "n_conv_per_stage_decoder": arch["n_conv_per_stage_decoder"],
               "pool_op_kernel_sizes": arch["strides"], "conv_kernel_sizes": arch["kernel_sizes"]}
    donor["foreground_intensity_properties_by_modality"] = {"0": {"mean": 7.0}}
    del donor["foreground_intensity_properties_per_channel"]
    plans, _ = retarget(donor)
    assert plans["foreground_intensity_properties_per_channel"] == {"0": {"mean": 7.0}}
    assert "foreground_intensity_properties_by_modality" not in plans
    new, old = (PlansManager(p).get_configuration("3d_fullres") for p in (plans, donor))
    assert new.network_arch_init_kwargs == old.network_arch_init_kwargs


def test_report_is_in_the_donors_transposed_axes():
    donor = tiny.plans("D", spacing_mm=(2.0, 1.0, 0.5), transpose=(2, 0, 1))
    plans, report = retarget(donor, fingerprint=fingerprint(shape=(18, 24, 20), spacing=(3.0, 1.5, 1.0)))
    assert report.target_spacing_mm == (1.0, 3.0, 1.5)
    assert report.spacing_ratio == (0.5, 3.0, 3.0)
    assert report.median_shape == (10, 54, 72)
    assert plans["original_median_shape_after_transp"] == [20, 18, 24]
    _, flat = retarget(donor, configuration="2d", fingerprint=fingerprint(shape=(18, 24, 20), spacing=(3.0, 1.5, 1.0)))
    assert (flat.target_spacing_mm, flat.median_shape) == ((3.0, 1.5), (54, 72))


def test_the_donors_own_dante_block_does_not_travel():
    donor = tiny.plans("D") | {"dante": {"format": 1}, "continue_training": True}
    plans, _ = retarget(donor)
    assert not {"dante", "continue_training"} & set(plans)


def test_batch_size_is_set_only_where_asked():
    plans, _ = retarget(tiny.plans("D"), configuration="3d_cascade_fullres", batch_size=5)
    sizes = {c: PlansManager(plans).get_configuration(c).batch_size for c in plans["configurations"]}
    assert sizes == {"3d_cascade_fullres": 5, "3d_fullres": 2, "3d_lowres": 2}


def test_bad_arguments():
    with pytest.raises(ConfigurationError, match="'x' is not in the plans; they hold"):
        retarget(tiny.plans("D"), configuration="x")
    with pytest.raises(ConfigurationError, match="choose 'donor' or 'target'"):
        retarget(tiny.plans("D"), intensity="both")
    incomplete = tiny.plans("D")
    del incomplete["configurations"]["3d_lowres"]
    with pytest.raises(ConfigurationError, match="name the configuration '3d_lowres', but do not hold it"):
        retarget(incomplete, configuration="3d_cascade_fullres")


def with_block(plans, configuration, **overrides):
    return plans | {"dante": new_dante_block(configuration, ENTRY, overrides)}


def test_merge_adds_a_configuration_of_the_same_plans():
    donor = tiny.plans("D")
    flat, full = (with_block(retarget(donor, configuration=c)[0], c, **o)
                  for c, o in (("2d", {"epochs": 3}), ("3d_fullres", {"lr": 0.1})))
    merged = merge_plans(flat, full, configuration="3d_fullres")
    assert set(merged["configurations"]) == set(merged["dante"]["start_weights"]) == {"2d", "3d_fullres"}
    assert merged["dante"]["overrides"] == {"epochs": 3, "lr": 0.1}


def test_merge_replaces_the_same_configuration_alone():
    old = with_block(retarget(tiny.plans("D"))[0], "3d_fullres")
    new = with_block(retarget(tiny.plans("D", spacing_mm=(2, 2, 2)))[0], "3d_fullres")
    assert merge_plans(old, new, configuration="3d_fullres") == new


def test_merge_refuses_what_does_not_agree_and_plans_of_others():
    flat = with_block(retarget(tiny.plans("D"), configuration="2d")[0], "2d")
    other = with_block(retarget(tiny.plans("D", transpose=(2, 0, 1)))[0], "3d_fullres")
    with pytest.raises(ConfigurationError, match=r"hold \['2d'\].*transpose_backward.*transpose_forward.*-p"):
        merge_plans(flat, other, configuration="3d_fullres")
    with pytest.raises(ConfigurationError, match="not written by `nnunet-dante transfer`, so they are not changed"):
        merge_plans(tiny.plans("D"), other, configuration="3d_fullres")
