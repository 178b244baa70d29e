"""A full disk, a folder that cannot be written to: an error that says which file and what to do, and nothing destroyed."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
import torch
from killing import content, forked, full_disk_for
from running import build, train

from nnunet_dante.adapters.strength import trained_weights
from nnunet_dante.errors import DonorError, StorageError
from nnunet_dante.files import write_text_atomically
from nnunet_dante.models.checkpoint import load_checkpoint_safely, save_atomically
from nnunet_dante.training import strength, trainers

CLS = trainers.nnUNetTrainerLoRA


WRITERS = {"text": lambda path: write_text_atomically("new", path),
           "few numbers": lambda path: save_atomically({"w": torch.ones(3)}, path),
           "many numbers": lambda path: save_atomically({"w": torch.ones(10**6)}, path)}  # torch hides the OSError here


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, kind):
    path = tmp_path / "a.pth"
    path.write_bytes(b"old")
    full_disk_for(path)
    with pytest.raises(StorageError, match=r"a.pth cannot be written \(No space left on device, \d+ MiB free\); what was "
                                           r"there before still is. Make room"):
        WRITERS[kind](path)
    assert content(tmp_path) == {"a.pth": b"old"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_is_full_only_when_it_synchronises(tmp_path, monkeypatch, number):
    """Network and quota file systems may take the bytes and refuse them later."""
    def fsync(_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "a.pth").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match=os.strerror(number)):
        save_atomically({"w": torch.ones(3)}, tmp_path / "a.pth")
    assert content(tmp_path) == {"a.pth": b"old"}


def test_a_file_that_grows_beyond_the_limit_of_its_process(tmp_path):
    """Some of it is written before the write fails."""
    resource = pytest.importorskip("resource")

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        with pytest.raises(StorageError, match="a.pth cannot be written"):
            save_atomically({"w": torch.ones(10**6)}, tmp_path / "a.pth")

    (tmp_path / "a.pth").write_bytes(b"old")
    assert forked(limited) == 0
    assert content(tmp_path) == {"a.pth": b"old"}


@pytest.mark.parametrize(("name", "epoch"), [("checkpoint_latest.pth", 1), ("checkpoint_final.pth", 2)])
def test_a_training_stops_at_the_first_checkpoint_it_cannot_write_and_c_goes_on(prepared, monkeypatch, name, epoch):
    trainer = build(CLS, prepared)
    trainer.initialize()
    trainer.save_every = 1
    folder, before, original = Path(trainer.output_folder), {}, trainer.save_checkpoint

    def save_checkpoint(file):
        if Path(file).name == name and trainer.current_epoch == epoch:
            full_disk_for(Path(file))
            before.update(content(folder))
        original(file)

    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)
    with pytest.raises(StorageError, match=rf"Training stopped in epoch \d: .*{name} cannot be written \(No space left .* "
                                           rf"With --c the training goes on from the last checkpoint in .*fold_0"):
        trainer.run_training()
    assert before and content(folder) == before and not list(folder.glob(".*"))
    resumed = build(CLS, prepared, resume=True)
    assert resumed.current_epoch == epoch
    resumed.run_training()
    assert load_checkpoint_safely(folder / "checkpoint_final.pth")["current_epoch"] == 3
    assert (folder / "adapter.safetensors").is_file()


def test_an_adapter_that_cannot_be_written_is_written_by_c(prepared, monkeypatch):
    trainer = build(CLS, prepared)
    folder = Path(trainer.output_folder)
    full_disk_for(folder / "adapter.safetensors")
    monkeypatch.setattr(Path, "glob", lambda *_: [])  # on_train_start would remove the link
    with pytest.raises(StorageError, match=r"adapter.safetensors cannot be written \(No space left"):
        trainer.run_training()
    monkeypatch.undo()
    prepared.activate(monkeypatch)
    assert (folder / "checkpoint_final.pth").is_file() and not (folder / "adapter.safetensors").exists()
    train(CLS, prepared, resume=True)
    assert (folder / "adapter.safetensors").is_file()


def test_a_disk_that_fills_up_while_the_chosen_strength_is_written_loses_nothing_and_c_chooses_again(prepared, monkeypatch):
    def search(_):
        full_disk_for(Path(trainer.output_folder, "checkpoint_final.pth"))
        return {0.0: 0.1, 0.4: 0.9, 1.0: 0.5}

    trainer = build(CLS, prepared)
    with monkeypatch.context() as patch:
        patch.setattr(strength, "search", search)
        with pytest.raises(StorageError, match="checkpoint_final.pth cannot be written.*With --c the training goes on"):
            trainer.run_training()
    final = Path(trainer.output_folder, "checkpoint_final.pth")
    trained = load_checkpoint_safely(final)
    assert "strength" not in trained["dante"], "all that was learned is there"
    monkeypatch.setattr(strength, "search", lambda _: {0.0: 0.1, 0.4: 0.9, 1.0: 0.5})
    build(CLS, prepared, resume=True).run_training()
    chosen = load_checkpoint_safely(final)
    assert chosen["dante"]["strength"]["value"] == 0.4
    back = trained_weights(chosen)
    assert all(torch.equal(back[key], tensor) for key, tensor in trained["network_weights"].items())


def test_errors_of_nnunets_own_writing_name_the_folder(prepared, monkeypatch):
    """Its progress figure, for one, is the first thing to fail on some full disks."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    def plot(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LocalLogger, "plot_progress_png", plot)
    with pytest.raises(StorageError, match="Training stopped in epoch 0: .*fold_0 cannot be written"):
        train(CLS, prepared)


def test_errors_that_are_not_of_writing_stay_what_they_are(prepared, monkeypatch):
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    def plot(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else.b2nd")

    monkeypatch.setattr(LocalLogger, "plot_progress_png", plot)
    with pytest.raises(PermissionError, match="else.b2nd"):
        train(CLS, prepared)


def test_results_below_a_file_are_refused_before_anything_is_trained(prepared, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("old")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "file" / "results"))
    with pytest.raises(StorageError, match=r"file/results.* cannot be written \(Not a directory"):
        build(CLS, prepared)
    assert content(tmp_path) == {"file": b"old"}


def _without_privileges() -> None:
    """Let permissions hold for root, too: give up all capabilities of this process."""
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


@pytest.mark.parametrize("where", ["results", "fold"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(prepared, monkeypatch, where):
    if not hasattr(os, "fork") or (os.geteuid() == 0 and not hasattr(ctypes.CDLL(None), "capset")):
        pytest.skip("permissions do not bind this user")
    train(CLS, prepared)
    results = prepared.root / "nnUNet_results" / prepared.dataset
    for log in results.glob("*/fold_0/training_log*"):
        log.unlink()  # a log has its name from the second it was begun in, and this one could still be written to
    before = content(results)
    name = "nnUNetTrainerLoRA" if where == "fold" else "nnUNetTrainerDoRA"  # DoRA's folder is not there yet
    folder = next(results.glob("*/fold_0")) if where == "fold" else results

    def refused():
        _without_privileges()
        monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.sleep", lambda _: None)
        with pytest.raises(StorageError, match=r"fold_0.* cannot be written \(.*make the folder writable"):
            build(getattr(trainers, name), prepared, resume=True)

    folder.chmod(0o555)
    try:
        assert forked(refused) == 0
    finally:
        folder.chmod(0o755)
    assert content(results) == before


@pytest.mark.parametrize(("name", "next_one"), [("checkpoint_latest.pth", "checkpoint_best.pth"),
                                                ("checkpoint_best.pth", "checkpoint_latest.pth")])
def test_a_checkpoint_that_was_damaged_is_named_with_the_one_to_go_on_from(prepared, name, next_one):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = (0, 1, 2)  # as the start of a training sets them
    folder = Path(trainer.output_folder)
    for file in ("checkpoint_latest.pth", "checkpoint_best.pth"):
        trainer.save_checkpoint(str(folder / file))
    (folder / name).write_bytes((folder / name).read_bytes()[:-1000])
    before = content(folder)
    with pytest.raises(DonorError, match=rf"{name} .*truncated.*move it away: --c then continues from {next_one}"):
        build(trainers.nnUNetTrainerFineTune, prepared, resume=True)
    assert content(folder) == before
    (folder / name).unlink()
    assert build(trainers.nnUNetTrainerFineTune, prepared, resume=True).current_epoch == 1
