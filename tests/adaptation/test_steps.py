"""steps.py: commands run below the output folder, failures name their log, epochs are counted from the log."""

from __future__ import annotations

import pytest

from nnunet_dante.adaptation.steps import EpochCount, Steps
from nnunet_dante.errors import DanteError

EPOCH = "2026-01-01 00:00:01.0: Pseudo dice [np.float32(0.5), np.float32(nan), 0.25]\n2026-01-01 00:00:01.0: Epoch time: 1 s\n"


def test_a_process_sees_nnunets_folders_below_out_and_no_trainers_of_this_package(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "somewhere")
    said = Steps(tmp_path, total=1).python(
        "import os, pathlib; print(os.environ['nnUNet_raw'], pathlib.Path.cwd(), 'nnUNet_extTrainer' in os.environ)",
        name="probe")
    assert said.split() == [str(tmp_path / "nnUNet_raw"), str(tmp_path), "False"]


@pytest.mark.parametrize(("cores", "seen"), [(2, "0 1"), (16, "None None")])
def test_only_machines_with_few_cores_get_one_process_instead_of_nnunets_own_number(tmp_path, monkeypatch, cores, seen):
    """A GPU would wait for images that one process augments."""
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nnunet_dante.adaptation.steps.cores", lambda: cores)
    said = Steps(tmp_path, total=1).python(
        "import os; print(os.environ.get('nnUNet_n_proc_DA'), os.environ.get('nnUNet_def_n_proc'))", name="probe", epochs=1)
    assert said.strip() == seen


def test_a_failure_names_its_log_and_shows_the_end_of_it(tmp_path):
    steps = Steps(tmp_path, total=1)
    with pytest.raises(DanteError, match=r"(?s)probe failed with exit code 3.*0_probe_0\.log.*the last words"):
        steps.python("import sys; print('the last words'); sys.exit(3)", name="probe")
    assert (tmp_path / "logs" / "0_probe_0.log").read_text() == "the last words\n"


def test_each_step_is_numbered_and_timed(tmp_path, capsys):
    steps = Steps(tmp_path, total=2)
    steps.announce("first")
    steps.announce("second")
    assert capsys.readouterr().err.splitlines() == ["[1/2] 0:00  first", "[2/2] 0:00  second"]


def test_away_from_a_terminal_each_epoch_is_a_line_with_its_dice(tmp_path, capsys):
    log = tmp_path / "log"
    with EpochCount(2) as count:
        for text in ("", EPOCH, EPOCH, 2 * EPOCH):
            log.write_text(text)
            count.read(log)
    assert capsys.readouterr().err.splitlines() == ["      epoch 1/2, Dice 0.38", "      epoch 2/2, Dice 0.38"]


def test_commands_without_epochs_show_none(tmp_path, capsys):
    (tmp_path / "log").write_text(EPOCH)
    with EpochCount(0) as count:
        count.read(tmp_path / "log")
    assert capsys.readouterr().err == ""
