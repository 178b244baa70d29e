"""worker.py: runs that share a process do not change one another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from nnunet_dante.benchmark import worker


class Network(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(1, features, 3), nn.Conv3d(features, 2, 1))

    def forward(self, image):
        return self.layers(image)


def test_a_tenth_network_in_one_process_is_still_compiled(tmp_path, monkeypatch):
    """torch.compile gives up on code that it compiled 8 times, without an error: costs would be those of eager code."""
    compiled = []

    def train(job):
        network = torch.compile(Network(job.features), backend=lambda graph, _: compiled.append(1) or graph.forward)
        network(torch.rand(1, 1, 4, 4, 4)).sum().backward()
        return {}

    monkeypatch.setattr(worker, "_train_and_score", train)
    monkeypatch.setattr(worker, "_result", lambda job, **facts: facts)
    for features in range(2, 12):
        job = SimpleNamespace(threads=1, out=Path(tmp_path), run=SimpleNamespace(id=f"run_{features}"), features=features)
        assert worker.execute(job) == {}
    assert len(compiled) == 10
