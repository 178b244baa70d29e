"""What the page says about runs is what lies in their folders."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest

from nnunet_dante.adaptation.running import claimed
from nnunet_dante.errors import ConfigurationError, StorageError
from nnunet_dante.ui import runs
from nnunet_dante.ui.runs import delete, go_on, read_run, start, stop

DONE = {"data": {"dataset": "Dataset001_A", "seconds": 30.0, "commands": []}}
FILES = {"model": "model.zip", "adapter": None, "dafne": "A.model", "seconds": 30.0, "commands": [], "fold": "all",
         "folder": "nnUNet_results/Dataset001_A/nnUNetTrainerLoRA__nnUNetDantePlans__2d"}


def write(folder, done):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapt.json").write_text(json.dumps({"format": 1, "asked": {"model": "M", "source": "S"}, "done": done}))
    return folder


@pytest.fixture
def launched(monkeypatch):
    """The processes that would be started."""
    found = []

    class Process:
        def __init__(self, command, **options):
            self.ended = False
            found.append((command, options))

        def poll(self):
            return 0 if self.ended else None

        def terminate(self):
            self.ended = True

        wait = poll

    monkeypatch.setattr(runs.subprocess, "Popen", Process)
    monkeypatch.setattr(runs, "_started", {})
    return found


def test_states(tmp_path):
    folder = write(tmp_path / "run", DONE)
    assert read_run(folder).state == "stopped" and read_run(folder).dice == {}
    with claimed(folder):
        assert read_run(folder).state == "running"
    write(folder, DONE | {"report": {"dice": {"donor": 0.5, "adapted": 0.8}, "seconds": 60}, "files": FILES})
    run = read_run(folder)
    assert run.final == folder.resolve() / FILES["folder"] / "fold_all"
    assert (run.state, run.dice, run.minutes) == ("finished", {"donor": 0.5, "adapted": 0.8}, 2.0)


def test_why_it_stopped_is_said(tmp_path):
    folder = write(tmp_path, {})
    (folder / "adapt.log").write_text("[1/8] 0:00  Read\nError: --budget is too short.\nGive more.\n")
    assert read_run(folder).problem == "Error: --budget is too short.\nGive more."
    with claimed(folder):
        assert read_run(folder).problem == "", "what was wrong before does not matter while it runs"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"asked": 1, "done": {}}', '{"asked": {}, "done": {"data": 1}}', "{" * 1000, "\0"])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "adapt.json").write_text(text)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_run(tmp_path)


def test_a_run_is_a_process_of_its_own(tmp_path, launched):
    start(tmp_path / "new", {"model": "M", "source": "S", "budget_minutes": 30.0})
    (command, options), = launched
    assert command[-2:] == ["adapt", str(tmp_path / "new")] and options["start_new_session"] and "shell" not in options
    assert read_run(tmp_path / "new").asked == {"model": "M", "source": "S", "budget_minutes": 30.0}
    with pytest.raises(ConfigurationError, match="holds something already"):
        start(tmp_path / "new", {})
    assert read_run(tmp_path / "new").state == "running", "although it has not claimed the folder yet"
    with pytest.raises(ConfigurationError, match="is running already"):
        go_on(read_run(tmp_path / "new"))
    stop(tmp_path / "new")
    assert read_run(tmp_path / "new").state == "stopped"
    go_on(read_run(tmp_path / "new"))
    assert len(launched) == 2
    stop(tmp_path / "new")
    with claimed(tmp_path / "new"), pytest.raises(ConfigurationError, match="is running already"):
        go_on(read_run(tmp_path / "new"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path, launched):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        start(tmp_path / "file" / "new", {})
    assert not launched


def test_a_full_disk_is_named(tmp_path, launched, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(type(tmp_path), "write_text", full)
        with pytest.raises(StorageError, match="No space left on device.*MiB free"):
            start(tmp_path / "new", {})
    stopped = read_run(write(tmp_path / "run", DONE))
    (tmp_path / "run" / "adapt.log").mkdir()
    with pytest.raises(StorageError, match=r"adapt\.log cannot be written"):
        go_on(stopped)
    assert not launched


def test_the_process_goes_on_when_its_starter_is_killed(tmp_path):
    code = ("import os, signal, sys; from pathlib import Path; from nnunet_dante.ui import runs\n"
            "sys.executable = '/bin/sleep'; real = runs.subprocess.Popen\n"
            "runs.subprocess.Popen = lambda words, **o: print(real(['sleep', '30'], **o).pid, flush=True)\n"
            "runs.start(Path(sys.argv[1]), {}); os.kill(os.getpid(), signal.SIGKILL)")
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert said.returncode == -9
    number = said.stdout.strip()
    assert subprocess.run(["kill", number]).returncode == 0, "it was still there"


def test_only_what_the_run_wrote_is_deleted(tmp_path):
    folder = write(tmp_path / "run", DONE | {"files": FILES})
    for name in ("model.zip", "A.model", "A.json", "confidence_unseen.csv", "report.html", "logs/1.log", "notes.txt", "nnUNet_results/Dataset001_A/x",
                 "nnUNet_preprocessed/Dataset002_Other/x", "nnUNet_preprocessed/Dataset001_A/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image").write_text("")
    (folder / "nnUNet_raw").mkdir()
    (folder / "nnUNet_raw" / "Dataset001_A").symlink_to(tmp_path / "data")
    with claimed(folder), pytest.raises(ConfigurationError, match="Stop it first"):
        delete(read_run(folder))
    assert delete(read_run(folder)) == ["nnUNet_preprocessed", "notes.txt"]
    assert (folder / "nnUNet_preprocessed" / "Dataset002_Other" / "x").is_file(), "another data set lies there, too"
    assert (tmp_path / "data" / "image").is_file(), "links are not followed"
    clean = write(tmp_path / "clean", DONE)
    assert delete(read_run(clean)) == [] and not clean.exists()


def test_names_in_a_record_cannot_lead_out(tmp_path):
    folder = write(tmp_path / "run", DONE | {"files": FILES | {"model": "../outside", "dafne": str(tmp_path / "outside")}})
    (tmp_path / "outside").write_text("")
    delete(read_run(folder))
    assert (tmp_path / "outside").is_file()


def test_the_end_of_a_log(tmp_path):
    assert runs.tail(tmp_path / "log") == ""
    (tmp_path / "log").write_bytes(b"x" * 40_000 + b"\nbar 10%\rbar 20%\rbar 100%\r\nnext\n\xff")
    assert runs.tail(tmp_path / "log").splitlines()[1:] == ["bar 100%", "next", "\ufffd"]
