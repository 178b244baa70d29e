"""The server's part in a federation without any engine: the state after each round, what to send, and the history.

The state lies on disk as an adapter file that says how many rounds are done. So a server that was killed goes on after
the last finished round, and each state can be looked at, applied and merged like any adapter.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save

from ..adapters.adapter import apply
from ..adapters.file import read_adapter, write_adapter
from ..errors import FederationError
from ..files import atomic_path, read_json, write_text_atomically
from ..models.checkpoint import file_sha256, load_checkpoint_safely, save_atomically, weights_sha256
from ..types import PathLike, StateDict
from .aggregate import Average, Update, distance, far_off, refusal, trained_in
from .settings import CHECKPOINT, MODEL, RUN, SETTINGS, SITE_NAME, START, Facts, misfit, read_settings

STATE, HISTORY, RESULT, _REPLIES = "state.safetensors", "history.json", "result", "replies"
_ROUNDS = "federated_rounds"  # entry of the options of the state's adapter file


class Coordinator:
    """The rounds of one federation.

    Args:
        folder: of the federation; what is written goes into `folder`/run.
        min_sites: a round with fewer accepted updates is repeated.
        max_length: as in `far_off`. trim: as in `Average`.

    Raises:
        FederationError: the folder holds no federation, or the state of another one.
    """

    def __init__(self, folder: PathLike, *, min_sites: int = 2, max_length: float = 10.0, trim: int = 0) -> None:
        self.folder, self.run = Path(folder), Path(folder, RUN)
        self.settings = read_settings(self.folder)
        self.digest = file_sha256(self.folder / SETTINGS)
        self.plans: dict[str, Any] = read_json(self.folder / MODEL / "plans.json")
        self.min_sites, self.max_length, self.trim = min_sites, max_length, trim
        file = self.run / STATE
        self._metadata, self._all = read_adapter(file if file.is_file() else self.folder / START)
        self.round = int((self._metadata["options"] or {}).get(_ROUNDS, 0))
        self.history = self._read_history()
        self.start_round()

    @property
    def state(self) -> StateDict:
        """The tensors that sites and server share."""
        return {name: tensor for name, tensor in self._all.items() if name not in self.settings.kept}

    @property
    def state_sha256(self) -> str:
        """By this, a site sees that it has the state of this round."""
        return weights_sha256(self.state)

    def _trained(self, round_: int) -> tuple[str, ...]:
        return trained_in(self.state, self.settings.averaging, round_)

    @property
    def expected(self) -> StateDict:
        """The tensors that a site must send in this round, with their values before it."""
        return {name: self.state[name] for name in self._trained(self.round)}

    def _read_history(self) -> dict[str, Any]:
        file = self.run / HISTORY
        found: Any = read_json(file) if file.is_file() else {}
        if found and found.get("federation") != self.digest:
            raise FederationError(f"{self.run} belongs to another federation, or federation.json has been changed. "
                                  "Move it away to begin anew, or put federation.json back.")
        rounds = found.get("rounds", [])[:self.round]
        return {"format": 1, "federation": self.digest, "rounds": rounds, "refused": found.get("refused", {})}

    def admit(self, facts: Facts) -> str | None:
        """Return why a site cannot take part, or None if it can; the history keeps the reason."""
        reason = misfit(self.settings, self.digest, self.plans, facts)
        if reason is not None:
            self.history["refused"][facts.site[:64]] = reason
            self._write_history()
        return reason

    def start_round(self) -> None:
        """Forget the replies of a round that did not end."""
        shutil.rmtree(self.run / _REPLIES, ignore_errors=True)
        self._lengths: dict[str, float] = {}
        self._entry: dict[str, Any] = {"round": self.round, "sites": {}, "left_out": {}}
        self._began = time.monotonic()

    def to_send(self, known: int | None) -> StateDict:
        """Return the tensors that a site lacks.

        known: the last round in which the site has sent an update to this server; None if there is none.
        """
        first = 0 if known is None else known
        names = {name for round_ in range(first, self.round) for name in self._trained(round_)}
        return {name: tensor for name, tensor in self.state.items() if name in names}

    def receive(self, update: Update, *, dice_before: dict[str, float], dice_after: dict[str, float],
                bytes_down: int = 0) -> str | None:
        """Keep the update of a site on disk until the round closes, or return why it is refused.

        dice_before, dice_after: label -> pseudo Dice. bytes_down: what the site was sent.
        """
        expected = self.expected
        reason = "its name is not allowed" if not SITE_NAME.fullmatch(update.site) else refusal(update, expected)
        if reason is None and update.site in self._entry["sites"]:
            reason = "a site of the same name has answered already"
        if reason is not None:
            self.leave_out(update.site, reason)
            return reason
        with atomic_path(self.run / _REPLIES / f"{update.site}.safetensors") as temporary:
            temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in update.tensors.items()},
                                       metadata={"site": json.dumps([update.cases, sorted(update.draws)])}))
        self._lengths[update.site] = distance(update.tensors, expected)
        self._entry["sites"][update.site] = {
            "cases": update.cases, "draws": sorted(update.draws), "length": self._lengths[update.site],
            "dice_before": _rounded(dice_before), "dice_after": _rounded(dice_after), "bytes_down": bytes_down,
            "bytes_up": sum(tensor.nbytes for tensor in update.tensors.values())}
        return None

    def leave_out(self, site: str, reason: str) -> None:
        """Note that a site takes no part in this round."""
        self._entry["left_out"][site[:64]] = reason

    def close_round(self) -> bool:
        """Average the updates of this round and write the new state; return whether there were enough of them."""
        for site, reason in far_off(self._lengths, self.max_length).items():
            self.leave_out(site, reason)
            del self._entry["sites"][site]
        sites = sorted(self._entry["sites"])
        enough = len(sites) >= self.min_sites
        if enough:
            average = Average(labels=self.settings.labels, heads=self.settings.heads, trim=self.trim)
            for site in sites:  # in the order of the names, so that the order of the replies does not matter at all
                average.add(self._kept(site))
            self._all |= average.result(self.expected)
            self._entry["seconds"] = round(time.monotonic() - self._began, 3)
            self.history["rounds"].append(self._entry)
            self.round += 1
            self._write_state()
        self.start_round()
        return enough

    def _kept(self, site: str) -> Update:
        file = self.run / _REPLIES / f"{site}.safetensors"
        with safe_open(file, framework="pt") as content:
            cases, draws = json.loads(content.metadata()["site"])
        return Update(site=site, cases=cases, draws=frozenset(draws), tensors=load_file(file))

    def _write_state(self) -> None:
        """Write the history, then the state: the state says how many rounds of the history count."""
        self._write_history()
        self._metadata = {**self._metadata, "options": {**(self._metadata["options"] or {}), _ROUNDS: self.round}}
        write_adapter(self._metadata, self._all, self.run / STATE)

    def _write_history(self) -> None:
        write_text_atomically(json.dumps(self.history, indent=2), self.run / HISTORY)

    def write_result(self, final_dice: dict[str, dict[str, float]]) -> Path:
        """Write the federation's network as a model folder with its adapter beside it, and return the folder.

        final_dice: site -> label -> pseudo Dice of the final network.
        """
        self.history["final_dice"] = {site: _rounded(dice) for site, dice in sorted(final_dice.items())}
        self._write_history()
        folder = self.run / RESULT
        adapter, checkpoint = folder / "adapter.safetensors", folder / "fold_all" / "checkpoint_final.pth"
        write_adapter(self._metadata, self._all, adapter)
        apply(self.folder / CHECKPOINT, adapter, checkpoint)
        content = load_checkpoint_safely(checkpoint)
        content["dante"]["start_source"] = "transfer"  # so that `export` finds the donor's id
        save_atomically(content, checkpoint)
        for name in ("plans.json", "dataset.json"):
            shutil.copy(self.folder / MODEL / name, folder / name)
        return folder


def _rounded(dice: dict[str, float]) -> dict[str, float | None]:
    """Return Dice values for JSON, which has no nan."""
    return {label: None if value != value else round(float(value), 4) for label, value in dice.items()}
