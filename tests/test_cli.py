from __future__ import annotations

import json

import pytest
import tiny
from click.testing import CliRunner

from nnunet_dante.cli import main


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_help_names_every_command():
    said = run("--help").output
    for command in ("demo", "transfer", "train", "env", "doctor", "inspect", "adapter", "export", "import"):
        assert command in said


def test_our_errors_are_one_message_with_exit_code_1(tmp_path):
    done = run("adapter", "info", __file__)
    assert done.exit_code == 1 and done.output.startswith("Error: ") and "Traceback" not in done.output


@pytest.mark.parametrize(("option", "value"), [("--epochs", "0"), ("--lr", "-1"), ("--intensity", "mine")])
def test_bad_options_are_named_before_anything_is_done(option, value, tmp_path):
    done = run("transfer", tmp_path, "-d", "1", option, value)
    assert done.exit_code == 2 and option in done.output and value in done.output


@pytest.mark.parametrize(("options", "message"), [
    (["--set", "l2sp=1"], "'l2sp' is unknown; allowed are"), (["--set", "l2_sp"], "is not KEY=VALUE"),
    (["--set", "lr=0.1", "--lr", "0.2"], "lr has a flag of its own")])
def test_bad_settings_are_named_before_anything_is_done(options, message, tmp_path):
    done = run("transfer", tmp_path, "-d", "1", *options)
    assert done.exit_code in (1, 2) and message in done.output


def test_env_prints_a_line_for_the_shell(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    said = run("env").output
    assert said.startswith('export nnUNet_extTrainer="') and said.rstrip().endswith(':/mine"')


def test_transfer_without_nnunet_raw_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    done = run("transfer", tmp_path, "-d", "1")
    assert done.exit_code == 1 and "nnUNet_raw" in done.output


def test_transfer_says_what_makes_a_training_fit_the_gpu(nnunet_paths):
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"])
    (nnunet_paths["nnUNet_preprocessed"] / dataset).mkdir()
    tiny.write_fingerprint(nnunet_paths["nnUNet_preprocessed"] / dataset, n_cases=5)
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"], patch=(64, 64, 64))
    words = ["transfer", donor, "-d", dataset, "-c", "3d_fullres", "--memory"]
    assert "and so fits 8 GiB" in run(*words, "8GiB").output
    report = json.loads((nnunet_paths["nnUNet_preprocessed"] / dataset / "nnUNetDantePlans_3d_fullres_transfer.json").read_text())
    said = run(*words, f"{900 * report['memory_gib']}MiB").output
    assert "It fits with any of these" in said and "  --set recompute=true: about " in said
    assert run(*words, "much").output.startswith("Error: --memory is 'much'")
