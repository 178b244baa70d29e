"""worker.py: runs that share a process do not change one another."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_dante.benchmark import worker
from nnunet_dante.models.memory import PeakMemory


class Network(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, features, 3), nn.Conv3d(features, 2, 1))

    def forward(self, image):
        return self.layers(image)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_result", lambda job, **facts: facts)
    monkeypatch.setattr(worker, "_WARM", [True])
    return SimpleNamespace(threads=1, out=tmp_path, run=SimpleNamespace(id="run"))


def test_labels_are_found_by_name_however_their_numbers_are_written(tmp_path):
    """nnU-Net also trains labels that are text or a list of one number; donor and data set may number them differently."""
    truth = np.zeros((1, 4, 4, 4))
    truth[0, 0], truth[0, 1], truth[0, 2] = 1, 2, 3
    predicted = np.zeros((4, 4, 4), int)
    predicted[0], predicted[1], predicted[2] = 2, 1, 1
    reader = SimpleNamespace(read_images=lambda files: (truth, {"spacing": (1, 1, 1)}), read_seg=lambda file: (truth, {}))
    predictor = SimpleNamespace(
        plans_manager=SimpleNamespace(image_reader_writer_class=lambda: reader),
        dataset_json={"labels": {"background": "0", "a": "2", "b": ["1"], "own": 3}},
        predict_single_npy_array=lambda *_: predicted)
    labels = {"background": 0, "b": [2], "a": "1", "other": 4, "ignore": "3"}
    case = SimpleNamespace(images=[tmp_path], mask=tmp_path)
    found = worker.score_cases(predictor, worker.Scored(cases={"c": case}, labels=labels), tolerance_mm=1)["c"]
    assert {name: scores["dice"] for name, scores in found.items()} == {"a": 1, "b": 1}


def test_a_tenth_network_in_one_process_is_still_compiled(job, monkeypatch):
    """torch.compile gives up on code that it compiled 8 times, without an error: costs would be those of eager code."""
    compiled = []

    def train(job):
        network = torch.compile(Network(job.features), backend=lambda graph, _: compiled.append(1) or graph.forward)
        network(torch.rand(1, 1, 4, 4, 4)).sum().backward()
        return {}

    monkeypatch.setattr(worker, "_train_and_score", train)
    for job.features in range(2, 12):
        assert worker.execute(job) == {}
    assert len(compiled) == 10


def test_the_first_run_of_a_process_needs_no_more_memory_than_the_next(job, monkeypatch):
    """A first step loads tens of MiB of libraries, whichever method takes it."""
    loaded, peaks = [], []

    class Trainer:
        dataloader_train = iter([{}])

        def initialize(self):
            """nnU-Net's names."""

        def train_step(self, batch):
            if not loaded:
                loaded.append(np.ones(64 << 20, np.uint8))

        on_train_start = on_train_epoch_start = initialize

    def train(job):
        memory = PeakMemory(torch.device("cpu"))
        Trainer().train_step({})
        peaks.append(memory.peak_mib())
        return {}

    monkeypatch.setattr(worker, "_trainer", lambda job: Trainer())
    monkeypatch.setattr(worker, "_train_and_score", train)
    monkeypatch.setattr(worker, "_WARM", [])
    assert [worker.execute(job), worker.execute(job)] == [{}, {}]
    assert len(loaded) == 1 and peaks[0] < 32, peaks


def test_labels_that_were_not_drawn_in_a_test_case_are_not_scored():
    mask = np.ones((1, 4, 4, 4), np.uint8)
    reader = SimpleNamespace(read_images=lambda _: (mask, {"spacing": [1, 1, 1]}), read_seg=lambda _: (mask, {}))
    predictor = SimpleNamespace(
        plans_manager=SimpleNamespace(image_reader_writer_class=lambda: reader),
        predict_single_npy_array=lambda *_: mask[0], dataset_json={"labels": {"background": 0, "a": 1, "b": 2}})
    test = worker.Scored(cases={name: SimpleNamespace(images=(), mask="") for name in ("one", "two")},
                         labels=predictor.dataset_json["labels"], undrawn={"two": frozenset({"b"})})
    scores = worker.score_cases(predictor, test, tolerance_mm=1.0)
    assert scores["one"].keys() == {"a", "b"} and scores["two"].keys() == {"a"}
