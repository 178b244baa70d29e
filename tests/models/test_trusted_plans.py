"""plans_check.py: plans cannot make nnU-Net import or call other code than its own, nor build without end."""

from __future__ import annotations

import sys

import pytest
import tiny
import torch

from nnunet_dante.errors import ConfigurationError, DonorError, UntrustedFileError
from nnunet_dante.models.checkpoint import save_atomically
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.network import build_network, network_aliases
from nnunet_dante.models.trusted_plans import check_plans


def edited(*keys, value) -> dict:
    plans = tiny.plans("D")
    place = plans
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return plans


CONFIG = ("configurations", "3d_fullres")
ARCHITECTURE = (*CONFIG, "architecture")


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("normalization", ["ZScoreNormalization", "CTNormalization", "RGBTo01Normalization"])
def test_what_nnunet_writes_passes(architecture, normalization):
    check_plans(tiny.plans("D", architecture=architecture, normalization=normalization, transpose=(2, 0, 1)))


@pytest.mark.parametrize("value", [torch.zeros(2), b"bytes"])
def test_what_no_json_file_can_hold_is_refused(tmp_path, value):
    """Plans and dataset.json inside a checkpoint are no text."""
    with pytest.raises(ConfigurationError, match="The plans cannot be used: .*not JSON serializable"):
        check_plans(edited("experiment_planner_used", value=value))
    file = tiny.write_model_folder(tmp_path) / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["init_args"]["dataset_json"]["description"] = value
    save_atomically(content, file)
    with pytest.raises(ConfigurationError, match="dataset.json of the model cannot be used"):
        open_donor(file)


def test_a_class_that_moved_passes_as_in_nnunet():
    name = "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"  # of plans before 2024
    check_plans(edited(*ARCHITECTURE, "network_class_name", value=name))


@pytest.mark.parametrize("name", ["subprocess.Popen", "torch.nn.modules.module.warnings.sys.exit", "torch.nn.functional.relu",
                                  "torch.utils.cpp_extension.load", "torch.nn.Conv3d.forward", "torch.nn", "builtins.exec",
                                  "torch.nn.__builtins__", "", 7, ["torch.nn.LeakyReLU"]])
def test_an_argument_that_is_no_layer_is_refused_before_it_is_called(tmp_path, name):
    plans = edited(*ARCHITECTURE, "arch_kwargs", "nonlin", value=name)
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["nonlin_kwargs"] = {
        "args": ["touch", str(tmp_path / "executed")]}
    with pytest.raises(UntrustedFileError, match=r"nonlin of the plans is .*--trust"):
        build_network(plans, tiny.dataset_json(), "3d_fullres")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["os.system", "dynamic_network_architectures.architectures.unet.torch.load",
                                  "dynamic_network_architectures.building_blocks.helper.get_matching_convtransp"])
def test_a_network_that_is_none_is_refused(name):
    with pytest.raises(UntrustedFileError, match="network_class_name of the plans"):
        check_plans(edited(*ARCHITECTURE, "network_class_name", value=name))


def test_a_foreign_module_is_not_even_imported_unless_trusted(tmp_path, monkeypatch):
    (tmp_path / "my_architecture.py").write_text(
        "from dynamic_network_architectures.architectures.unet import PlainConvUNet as Net\n")
    monkeypatch.syspath_prepend(tmp_path)
    plans = edited(*ARCHITECTURE, "network_class_name", value="my_architecture.Net")
    with pytest.raises(UntrustedFileError, match="another package"):
        build_network(plans, tiny.dataset_json(), "3d_fullres")
    assert "my_architecture" not in sys.modules
    assert type(build_network(plans, tiny.dataset_json(), "3d_fullres", trust=True)).__name__ == "PlainConvUNet"
    folder = tiny.write_model_folder(tmp_path)
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    content["init_args"]["plans"] = plans
    save_atomically(content, file)
    with pytest.raises(UntrustedFileError, match="another package"):
        open_donor(file)
    assert open_donor(file, trust=True).trust


@pytest.mark.parametrize(("keys", "value"), [
    (("image_reader_writer",), "Type"), (("label_manager",), "np"), ((*CONFIG, "preprocessor_name"), "nnunetv2"),
    ((*CONFIG, "normalization_schemes"), ["ABC"]), ((*CONFIG, "resampling_fn_data"), "OrderedDict"),
    ((*CONFIG, "resampling_fn_probabilities"), "a b"), ((*CONFIG, "resampling_fn_seg"), ["np"])])
def test_names_that_nnunet_would_find_elsewhere_in_its_modules_are_refused(keys, value):
    with pytest.raises(UntrustedFileError, match=keys[-1]):
        check_plans(edited(*keys, value=value))


def test_what_nnunet_does_not_find_is_left_to_it():
    check_plans(edited("image_reader_writer", value="ReaderOfAnotherInstallation"))


@pytest.mark.parametrize(("keys", "value", "match"), [
    (("configurations",), None, "configurations"), (("configurations", "3d_fullres"), [], "configurations"),
    (("configurations", "../../x"), {}, "names of letters"), (("transpose_forward",), [0, 0, 1], "transpose_forward"),
    (("transpose_forward",), "012", "transpose_forward"),
    ((*CONFIG, "spacing"), [1.0, float("nan"), 1.0], "spacing"), ((*CONFIG, "spacing"), [1.0], "spacing"),
    ((*CONFIG, "patch_size"), [10**6] * 3, "patch_size"), ((*CONFIG, "patch_size"), [16, -16, 16], "patch_size"),
    ((*CONFIG, "patch_size"), 16, "patch_size"), ((*CONFIG, "batch_size"), 0, "batch_size"),
    ((*CONFIG, "batch_size"), True, "batch_size"), ((*CONFIG, "normalization_schemes"), "CT", "normalization_schemes"),
    ((*ARCHITECTURE, "arch_kwargs", "n_stages"), 10**9, "a number"),
    ((*ARCHITECTURE, "arch_kwargs", "features_per_stage"), [10**9] * 3, "a number"),
    ((*ARCHITECTURE, "arch_kwargs", "kernel_sizes"), [3] * 2000, "a list"),
    ((*ARCHITECTURE, "arch_kwargs"), [], "arch_kwargs"), ((*ARCHITECTURE, "_kw_requires_import"), "nonlin", "_kw_requires"),
    ((*ARCHITECTURE, "arch_kwargs", "nonlin"), "torch.nn.LeakyReLX", "cannot be found"),
    (("plans_name",), 10**100, "bits")])
def test_entries_of_another_kind_or_absurd_size_are_named(keys, value, match):
    with pytest.raises(ConfigurationError, match=match):
        check_plans(edited(*keys, value=value))


def test_a_network_of_a_million_stages_is_stopped():
    plans = edited(*ARCHITECTURE, "arch_kwargs", "n_stages", value=10**6)
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments |= {"features_per_stage": 1, "kernel_sizes": 1, "strides": 1, "n_conv_per_stage": 1,
                  "n_conv_per_stage_decoder": 1}
    with torch.device("meta"), pytest.raises(ConfigurationError, match="more than 20000 modules"):
        build_network(plans, tiny.dataset_json(), "3d_fullres")


def test_a_donor_whose_plans_describe_a_huge_network_takes_no_memory(tmp_path):
    folder = tiny.write_model_folder(tmp_path)
    file = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    arguments = content["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [10**6] * 3  # weights of 10**14 bytes
    save_atomically(content, file)
    with pytest.raises(DonorError, match=r"the network \(1000000, "):
        open_donor(file)


def test_aliases_of_a_network_without_memory_are_those_of_its_weights():
    from nnunet_dante.models.checkpoint import alias_sets

    plans = tiny.plans("D", architecture="ResidualEncoderUNet")
    with torch.device("meta"):
        empty = build_network(plans, tiny.dataset_json(), "3d_fullres")
    network = build_network(plans, tiny.dataset_json(), "3d_fullres")
    assert network_aliases(empty) == network_aliases(network) == alias_sets(network.state_dict())
