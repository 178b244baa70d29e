"""A site's part in a federation: one round of training with nnU-Net's trainer, and what is sent of it.

What stays: images, masks, names of cases, the network's frozen weights, the optimiser's state, and what `local` names.
The training of all rounds together is one training in nnUNet_results: its checkpoint_latest holds the optimiser and the
state of the random numbers between rounds, so that a single site trains bit for bit as without a federation, and a site
that was killed goes on. The tensors of the federation lie beside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..adapters.file import read_adapter
from ..errors import FederationError
from ..files import atomic_path, read_json
from ..models.checkpoint import file_sha256, weights_sha256
from ..models.labels import head_names
from ..peft.inject import adapted, update
from ..peft.regularisation import ExtendedLoss
from ..training import trainers
from ..training.resume import random_state, restore_random_state
from ..types import ReadOnlyStateDict, StateDict
from .aggregate import frozen_factor, trained_in
from .settings import PLANS_NAME, SETTINGS, START, Settings, Site, read_settings, read_site
from .state import put, reordered, spelled, trained_tensors

STATE_FILE = "federation_state.safetensors"
_SEED = 16  # the same validation patches before and after a round
_Base: Any = object


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a site sends after a round. dice_before, dice_after: label -> pseudo Dice, before and after its epochs."""

    tensors: StateDict
    dice_before: dict[str, float]
    dice_after: dict[str, float]


def exchanged(settings: Settings, state: ReadOnlyStateDict) -> StateDict:
    """Return the tensors of a state that sites and server share."""
    return {name: tensor for name, tensor in state.items() if name not in settings.kept}


def shared_start(site: Site) -> StateDict:
    """Return the shared tensors before the first round."""
    return exchanged(read_settings(site.folder), read_adapter(Path(site.folder, START))[1])


class RoundMixin(_Base):
    """A trainer that trains the epochs of one round, from the federation's state."""

    settings: Settings
    round: int  # 0 is the first
    state: StateDict
    loss: Any

    def initialize(self) -> None:
        """Let nnU-Net's loop never end by itself: only `finish` ends the training."""
        super().initialize()
        self.num_epochs += 1

    @property
    def tensors(self) -> StateDict:
        """The shared tensors in the network, with head rows in the site's order."""
        return exchanged(self.settings, trained_tensors(self.bare_network, self.training_plan))

    def go_to_round(self) -> None:
        """Count the epochs as if every round before this one had been trained here."""
        self.current_epoch = self.round * self.settings.epochs
        for name, values in self.logger.local_logger.my_fantastic_logging.items():
            del values[self.current_epoch:]  # of an attempt at this round that did not end
            none: Any = [0.0] * len(self.foreground_names) if name == "dice_per_class_or_region" else 0.0
            missed = self.current_epoch - len(values)  # nnU-Net's log needs a value for every epoch
            values += (values[-1:] or [none]) * missed

    def on_train_start(self) -> None:
        """Put the federation's state into the network after nnU-Net and the methods have seen the start weights."""
        super().on_train_start()
        put(reordered(self.state, self.settings.heads, given=self.settings.labels, wanted=self.row_names), self.tensors)
        if self.settings.prox:
            self.loss = ExtendedLoss(self.loss, [self._pull()])
        self.dice_before = self.score()

    @property
    def row_names(self) -> tuple[str, ...]:
        """The names of the head's rows at this site."""
        return head_names(self.dataset_json)

    def _pull(self) -> Any:
        """Return the gradient of FedProx: prox * (w - w of the start of this round), for each trained tensor."""
        parameters = [p for group in self.training_plan.groups for _, p in group.parameters]
        start = [p.detach().clone() for p in parameters]

        def gradients() -> list[tuple[nn.Parameter, Tensor]]:
            return [(p, self.settings.prox * (p.detach() - w)) for p, w in zip(parameters, start) if p.requires_grad]

        return gradients

    def score(self) -> dict[str, float]:
        """Return the pseudo Dice by the federation's labels; the training's random numbers go on as if it had not run.
        """
        kept = random_state()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(_SEED)
        dice = self.validation_dice()[1]
        restore_random_state(kept)
        return {spelled(name, self.settings.labels): value for name, value in dice.items()}

    def on_epoch_start(self) -> None:
        """End the round after its epochs."""
        if self.current_epoch >= (self.round + 1) * self.settings.epochs:
            raise _RoundEnd
        super().on_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Freeze the factor that no site trains in this round."""
        super().on_train_epoch_start()
        frozen = frozen_factor(self.settings.averaging, self.round)
        for module in adapted(self.bare_network).values():
            for name, factor in update(module).factors().items():
                if name == frozen:
                    factor.requires_grad_(False)

    def train_round(self) -> Trained:
        """Train the epochs of this round, save the training, and return what is sent."""
        try:
            self.run_training()
        except _RoundEnd:
            self.save_after(self.current_epoch, "checkpoint_latest.pth")
        names = trained_in(self.tensors, self.settings.averaging, self.round)
        sent = reordered(self.tensors, self.settings.heads, given=self.row_names, wanted=self.settings.labels)
        return Trained(tensors={name: sent[name].cpu().clone() for name in names}, dice_before=self.dice_before,
                       dice_after=self.score())

    def finish(self) -> dict[str, float]:
        """Write the federation's network as this site's finished training, and return its pseudo Dice by label."""
        self.on_train_start()
        self.current_epoch = self.num_epochs - 1
        self.on_train_end()
        return self.dice_before


class _RoundEnd(Exception):
    """Raised to leave nnU-Net's loop over the epochs after those of a round."""


def train_round(preprocessed: Path, round_: int, received: ReadOnlyStateDict, digest: str) -> Trained:
    """Train one round at the site whose data lie in `preprocessed`, and return what is sent.

    Args:
        preprocessed: folder of the data set in nnUNet_preprocessed.
        round_: its number; 0 is the first.
        received: the shared tensors that the server has sent, which are those that have changed since this site last
            took part.
        digest: `weights_sha256` of all shared tensors at the start of the round.

    Raises:
        FederationError: the site has not joined, or its tensors and the received ones together are not those of the
            digest. DanteError: the training cannot run.
    """
    with _trainer(preprocessed, round_, received, digest) as trainer:
        return trainer.train_round()


def finish(preprocessed: Path, received: ReadOnlyStateDict, digest: str) -> dict[str, float]:
    """Write the federation's final network as a finished training, and return its pseudo Dice by label.

    Arguments and errors: as in `train_round`.
    """
    settings = read_settings(read_site(preprocessed).folder, files=False)
    with _trainer(preprocessed, settings.rounds, received, digest) as trainer:
        return trainer.finish()


@contextmanager
def _trainer(preprocessed: Path, round_: int, received: ReadOnlyStateDict, digest: str) -> Iterator[Any]:
    site = read_site(preprocessed)
    settings = read_settings(site.folder)
    base = getattr(trainers, settings.trainer)
    cls = type(base.__name__, (RoundMixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})
    trainer = cls(plans=read_json(preprocessed / f"{PLANS_NAME}.json") | {"continue_training": round_ > 0},
                  configuration=settings.configuration, fold=site.fold if site.fold == "all" else int(site.fold),
                  dataset_json=read_json(preprocessed / "dataset.json"), device=torch.device(site.device))
    folder = Path(trainer.output_folder)
    # A server that begins anew sends what differs from the start, whatever this site knows from before.
    for known in (_read_state(folder / STATE_FILE, file_sha256(Path(site.folder, SETTINGS))), None):
        state = exchanged(settings, {**(known or shared_start(site)), **received})
        if (found := weights_sha256(state)) == digest:
            break
    else:
        raise FederationError(f"the state of the federation is not complete at {site.facts.site}: sha256 {found[:12]}, "
                              f"at the server {digest[:12]}. The server sends all of it in the next round.")
    trainer.settings, trainer.round, trainer.state = settings, round_, state
    saved = [folder / name for name in ("checkpoint_latest.pth", "checkpoint_final.pth") if (folder / name).is_file()]
    if round_ and known and saved:
        trainer.load_checkpoint(str(saved[0]))
    else:
        trainer.logger.resume = False
        trainer.initialize()
    trainer.go_to_round()
    try:
        yield trainer
        _write_state(state, folder / STATE_FILE, file_sha256(Path(site.folder, SETTINGS)))
    finally:
        trainers.end_loaders(trainer)


def _read_state(file: Path, federation: str) -> StateDict | None:
    """Return the tensors that this site knows from an earlier round; None if there are none of this federation."""
    try:
        with safe_open(file, framework="pt") as content:
            if (content.metadata() or {}).get("federation") != federation:
                return None
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118  no mapping
    except Exception:  # missing or damaged: safetensors may raise anything
        return None


def _write_state(state: StateDict, file: Path, federation: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_bytes(save(dict(state), metadata={"federation": federation}))
