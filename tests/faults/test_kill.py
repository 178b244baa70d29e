"""kill -9 at any moment of a training: what is there is whole, and --c ends where nobody would have killed it."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace

import pytest

if not hasattr(os, "fork"):
    pytest.skip("a training is killed in a process that was forked", allow_module_level=True)

from killing import (
    Kill,
    PeakedGradualUnfreezing,
    PeakedLoRA,
    Report,
    Training,
    differences,
    forked,
    kill_and_continue,
    moments,
    outcome,
    reached,
    undisturbed,
)
from running import with_overrides


@pytest.fixture(scope="module")
def training(prepared_once, tmp_path_factory) -> Training:
    with pytest.MonkeyPatch.context() as patch:
        prepared_once.activate(patch)
        return Training(PeakedLoRA, prepared_once, tmp_path_factory.mktemp("undisturbed"),
                        with_overrides(prepared_once, epochs=5))


@pytest.fixture(scope="module")
def whole(training, prepared_once):
    with pytest.MonkeyPatch.context() as patch:
        prepared_once.activate(patch)
        return undisturbed(training)


def test_a_training_killed_around_its_writes_ends_as_if_nobody_had(prepared, training, whole, tmp_path):
    """In the first checkpoint; some time in the first epochs; in a later write, by the clock."""
    report = Report()
    kills = [Kill(0.0, event=2), Kill(whole.seconds / 2), Kill(0.001, event=whole.events // 3)]
    kill_and_continue(replace(training, results=tmp_path), iter(kills), report, at_most=3, expected=whole.left)
    assert report.kills == 3 and report.in_writes == 2 and report.before_first_checkpoint >= 1
    assert whole.left["best epoch"] == 2  # the peak: neither the first nor the last


def test_what_was_killed_after_checkpoint_final_gets_its_adapter_from_c(prepared, training, whole, tmp_path):
    """nnU-Net writes checkpoint_final, then removes checkpoint_latest; the adapter comes after both."""
    shutil.copytree(training.results, tmp_path, dirs_exist_ok=True)
    again = replace(training, results=tmp_path)
    (again.folder / "adapter.safetensors").unlink()
    shutil.copy(again.folder / "checkpoint_best.pth", again.folder / "checkpoint_latest.pth")
    assert forked(again.run) == 0
    assert not differences(outcome(again.folder), whole.left)


def test_a_new_training_in_an_old_folder_is_not_confused_with_the_old_one(prepared, training, whole, tmp_path):
    """Killed before it has written checkpoint_latest or checkpoint_final of its own: --c must not take the old ones."""
    shutil.copytree(training.results, tmp_path, dirs_exist_ok=True)
    again = replace(training, results=tmp_path)
    shutil.copy(again.folder / "checkpoint_best.pth", again.folder / "checkpoint_latest.pth")
    old = {file.name: file.read_bytes() for file in again.folder.iterdir() if file.suffix in (".pth", ".safetensors")}
    # Four results are renamed; the fifth event is the first checkpoint's opening, and the tenth that of the second.
    assert forked(lambda: again.run(resume=False), kill=Kill(0.0, event=10), watch=tmp_path) == 9
    assert 0 <= reached(again) < 5 and not (again.folder / "checkpoint_final.pth").exists()
    assert {name: (again.folder / f"{name}.previous").read_bytes() for name in old} == old
    assert forked(again.run) == 0
    assert not differences(outcome(again.folder), whole.left)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [PeakedLoRA, PeakedGradualUnfreezing])
def test_ten_random_moments(prepared, tmp_path, trainer):
    training = Training(trainer, prepared, tmp_path / "whole", with_overrides(prepared, epochs=5))
    whole, report, number = undisturbed(training), Report(), 0
    kills = moments(random.Random(0), seconds=whole.seconds, events=whole.events)
    while report.kills < 10:
        number += 1
        kill_and_continue(replace(training, results=tmp_path / str(number)), kills, report,
                          at_most=min(3, 10 - report.kills), expected=whole.left)
    assert report.in_writes >= 3
