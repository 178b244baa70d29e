"""Two CPU processes: what opens after the DDP wrap must be synchronised, and the ranks share the choice of strength."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel


def _two_stages(rank: int, port: int, results) -> None:
    from nnunet_dante.methods import GradualUnfreezing
    from nnunet_dante.training.trainer import DanteMixin

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    network = tiny.plain_unet(2)
    plan = GradualUnfreezing(epochs=4).plan(network)
    plan.restrict(network)
    plan.set_stage(0)
    trainer = SimpleNamespace(network=DistributedDataParallel(network), device=torch.device("cpu"), local_rank=rank)
    optimizer = torch.optim.SGD(plan.optimiser_groups(), lr=0.1)
    torch.manual_seed(rank + 1)
    for epoch in range(4):
        if plan.set_stage(epoch):
            DanteMixin._renew_wrappers(trainer)  # type: ignore[arg-type]
        optimizer.zero_grad()
        sum(y.square().mean() for y in trainer.network(torch.rand(1, 1, 16, 16))).backward()
        optimizer.step()
    results[rank] = torch.cat([p.detach().flatten() for p in network.parameters()]).numpy()
    distributed.destroy_process_group()


def _score(rank: int, port: int, results) -> None:
    from nnunet_dante.training.strength import StrengthMixin

    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    predicted = []

    def dice(_predictor, _data, case):
        predicted.append(case)
        return [int(case) / 10, float("nan")]

    trainer = SimpleNamespace(
        is_ddp=True, device=torch.device("cpu"), print_to_log_file=lambda *_: None, _built=lambda: torch.nn.Linear(1, 1),
        plans_manager=SimpleNamespace(get_label_manager=lambda _: None, dataset_name="Dataset001_Toy"),
        configuration_manager=None, dataset_json={"labels": {"background": 0, "organ": 1, "lesion": 2}},
        dataset_class=lambda *_, **__: None, preprocessed_dataset_folder="", _dice=dice,
        folder_with_segs_from_previous_stage=None)
    state = torch.nn.Linear(1, 1).state_dict()
    score = StrengthMixin._scorer(trainer, state, state, ["1", "2", "6"])  # type: ignore[arg-type]
    results[rank] = score(0.5), predicted
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_cases_and_agree_on_the_score():
    from nnunetv2.run.run_training import find_free_network_port

    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_score, args=(find_free_network_port(), results), nprocs=2)
        assert results[0][0] == results[1][0] == pytest.approx(0.3)
        assert (results[0][1], results[1][1]) == (["1", "6"], ["2"])


@pytest.mark.slow
def test_ranks_hold_the_same_weights_after_all_stages():
    from nnunetv2.run.run_training import find_free_network_port

    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_two_stages, args=(find_free_network_port(), results), nprocs=2)
        assert (results[0] == results[1]).all()
