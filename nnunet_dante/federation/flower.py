"""Flower carries a federation: the two apps that a federation's folder names. All else is in the other modules.

The server asks every site for what it is ("query.agree"), sends what it lacks and takes what it trained ("train"), and
at the end lets it write the common network ("evaluate").
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from ..errors import DanteError, FederationError
from ..files import printable
from ..types import ReadOnlyStateDict
from .aggregate import Update
from .coordinator import Coordinator
from .report import write_history_report
from .settings import Facts, read_site
from .wire import packed, unpacked

AGREE, TRAIN, FINISH = "query.agree", "train", "evaluate"
BEFORE, AFTER = "before ", "after "
_GONE = "it went away, or did not answer in time"
_ATTEMPTS, _AGREE_S, _LOOK_S = 3, 180.0, 2.0
_log = logging.getLogger("nnunet_dante")

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the folder that the app's settings name."""
    config = context.run_config
    coordinator = Coordinator(str(config["folder"]), min_sites=int(config["min-sites"]), trim=int(config["trim"]),
                              max_length=float(config["max-length"]))
    Server(grid, coordinator, wait_s=60 * float(config["wait-minutes"]),
           round_s=60 * float(config["round-minutes"])).run()


class Server:
    """The rounds of a federation over Flower's grid.

    Args:
        grid: Flower's connection to the sites.
        coordinator: of the federation.
        wait_s: seconds to wait for enough sites. round_s: seconds after which a site is left out of a round.
        poll_s: seconds between two looks at what has arrived.
    """

    def __init__(self, grid: Grid, coordinator: Coordinator, *, wait_s: float, round_s: float, poll_s: float = 1.0):
        self.grid, self.coordinator = grid, coordinator
        self.wait_s, self.round_s, self.poll_s = wait_s, round_s, poll_s
        self.sites: dict[int, Facts] = {}  # by node, those that take part
        self.refused: set[int] = set()
        self.known: dict[int, int] = {}  # node -> last round of which it has sent an update

    def run(self) -> Path:
        """Run the rounds that are left, and write the result; return its folder.

        Raises:
            FederationError: too few sites come, or three times in a row too few updates can be used.
        """
        coordinator, failed = self.coordinator, 0
        while coordinator.round < coordinator.settings.rounds:
            self._wait_for_sites()
            round_ = coordinator.round
            self._say(f"round {round_ + 1} of {coordinator.settings.rounds}: {', '.join(self._names())}")
            self._round()
            failed = 0 if coordinator.close_round() else failed + 1
            if failed == _ATTEMPTS:
                raise FederationError(f"round {round_ + 1} has failed {_ATTEMPTS} times: fewer than "
                                      f"{coordinator.min_sites} updates could be used. The lines above and the sites' "
                                      "logs say why. The same command goes on from the last finished round.")
        self._wait_for_sites()
        result = coordinator.write_result(self._finish())
        write_history_report(coordinator.run, coordinator.settings)
        self._say(f"finished: {result}")
        return result

    def _names(self) -> list[str]:
        return sorted(facts.site for facts in self.sites.values())

    def _wait_for_sites(self) -> None:
        """Admit new sites and forget those that are gone, until there are enough."""
        until = time.monotonic() + self.wait_s
        while True:
            online = set(self.grid.get_node_ids())
            self.sites = {node: facts for node, facts in self.sites.items() if node in online}
            new = online - self.sites.keys() - self.refused
            for node, reply in self._ask({node: (AGREE, RecordDict()) for node in new}, min(_AGREE_S, self.wait_s)):
                self._admit(node, reply)
            if len(self.sites) >= self.coordinator.min_sites:
                return
            if time.monotonic() > until:
                raise FederationError(f"{len(self.sites)} sites are there ({', '.join(self._names()) or 'none'}), and "
                                      f"{self.coordinator.min_sites} are needed (min-sites). Start the others, then "
                                      "run the same command again.")
            time.sleep(self.poll_s)

    def _admit(self, node: int, reply: Message) -> None:
        if _is_gone(reply):
            return  # it is asked again if it comes back
        try:
            facts = msgspec.json.decode(str(_record(reply, "facts")["facts"]), type=Facts)
            reason = self.coordinator.admit(facts)
        except (DanteError, KeyError, ValueError) as error:
            self.refused.add(node)
            self._say(f"node {node} is refused: it cannot say what it is ({error})")
            return
        if reason is not None:
            self.refused.add(node)
            self._say(f"{facts.site} is refused: {reason}")
            return
        for other in [other for other, there in self.sites.items() if there.site == facts.site]:
            del self.sites[other]  # the same site, started again
        self.sites[node] = facts

    def _round(self) -> None:
        coordinator, down = self.coordinator, dict[int, int]()
        orders = {}
        for node in self.sites:
            tensors = coordinator.to_send(self.known.get(node))
            down[node] = sum(tensor.nbytes for tensor in tensors.values())
            orders[node] = (TRAIN, self._order(tensors))
        silent = set(orders)
        for node, reply in self._ask(orders, self.round_s):
            silent.discard(node)
            site, reason = self.sites[node].site, self._receive(node, reply, down[node])
            if reason is not None:
                coordinator.leave_out(site, reason)
                self.known.pop(node, None)
                self._say(f"{site} is left out of this round: {reason}")
        for node in silent:
            coordinator.leave_out(self.sites[node].site, _GONE)
            self._say(f"{self.sites[node].site} is left out of this round: {_GONE}")

    def _order(self, tensors: ReadOnlyStateDict) -> RecordDict:
        return RecordDict({"arrays": _arrays(tensors), "order": ConfigRecord({
            "round": self.coordinator.round, "state": self.coordinator.state_sha256})})

    def _receive(self, node: int, reply: Message, bytes_down: int) -> str | None:
        coordinator, facts = self.coordinator, self.sites[node]
        try:
            tensors = unpacked(_bytes(reply), coordinator.expected, whole=True)
            scores = _scores(_record(reply, "scores"))
        except (DanteError, KeyError, TypeError, ValueError) as error:
            return printable(str(error))
        update = Update(site=facts.site, cases=facts.cases, tensors=tensors, draws=frozenset(facts.draws))
        reason = coordinator.receive(update, dice_before=scores[BEFORE], dice_after=scores[AFTER],
                                     bytes_down=bytes_down)
        if reason is None:
            self.known[node] = coordinator.round
        return reason

    def _finish(self) -> dict[str, dict[str, float]]:
        """Send the final network to the sites; return the Dice of those that answer."""
        orders = {node: (FINISH, self._order(self.coordinator.to_send(self.known.get(node)))) for node in self.sites}
        dice = {}
        for node, reply in self._ask(orders, self.round_s):
            try:
                dice[self.sites[node].site] = _scores(_record(reply, "scores"))[AFTER]
            except (DanteError, KeyError, TypeError, ValueError) as error:
                self._say(f"{self.sites[node].site} has not written the final network: {printable(str(error))}")
        return dice

    def _ask(self, contents: Mapping[int, tuple[str, RecordDict]], seconds: float) -> Iterator[tuple[int, Message]]:
        """Send a message to each node, and yield the replies as they arrive, until all are there or time is up."""
        waiting: dict[str, int] = {}
        for node, (kind, content) in contents.items():  # one by one: together they may be too large
            (name,) = self.grid.push_messages([Message(content, dst_node_id=node, message_type=kind, ttl=seconds + 60)])
            if name:
                waiting[name] = node
        until, fetching = time.monotonic() + seconds, dict[str, _Fetch]()
        while waiting and time.monotonic() < until:
            arrived = False
            for name in list(waiting):
                fetch = fetching.pop(name, None) or _Fetch(self.grid, name)
                fetch.join(_LOOK_S)
                if fetch.is_alive():
                    fetching[name] = fetch  # still arriving, or its site was killed while it sent: others go on
                for reply in fetch.result():
                    arrived = True
                    yield waiting.pop(name), reply
            if waiting and not arrived:
                online = set(self.grid.get_node_ids())
                waiting = {name: node for name, node in waiting.items() if node in online}
                time.sleep(self.poll_s)

    def _say(self, text: str) -> None:
        print(printable(text), flush=True)  # `flwr run --stream` shows it


class _Fetch(threading.Thread):
    """Fetches a reply, if it is there, in a thread of its own.

    Flower waits up to two hours for the tensors of a reply whose site was killed while it sent them.
    """

    def __init__(self, grid: Grid, name: str):
        super().__init__(daemon=True)
        self._grid, self._name = grid, name
        self._replies: list[Message] = []
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Fetch; an error is kept for `result`."""
        try:
            self._replies = list(self._grid.pull_messages([self._name]))
        except Exception as error:  # whatever Flower's connection raises
            self._error = error

    def result(self) -> list[Message]:
        """Return the reply if it has arrived whole; raise what Flower has raised."""
        if self._error is not None:
            raise self._error
        return [] if self.is_alive() else self._replies


def _arrays(tensors: ReadOnlyStateDict) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in packed(tensors).items()})


def _bytes(message: Message) -> dict[str, bytes]:
    """Return name -> data of the arrays in a message."""
    return {str(name): array.data for name, array in _record(message, "arrays").items()}


def _is_gone(reply: Message) -> bool:
    """Return whether the SuperLink has answered for a site that it hears no more."""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


def _record(message: Message, name: str) -> Any:
    """Return a record of a message.

    Raises:
        FederationError: the site or Flower could not answer, or the message has no such record.
    """
    if _is_gone(message):
        raise FederationError(_GONE)
    if message.has_error():
        raise FederationError(f"its app has failed (Flower's error code {message.error.code}); its log says why")
    if "error" in message.content:
        raise FederationError(f"it could not do its part ({str(message.content['error']['kind'])[:60]}); its log says "  # type: ignore[index]
                              "why")
    if name not in message.content:
        raise FederationError(f"its message has no record {name!r}")
    return message.content[name]


def _scores(record: Any) -> dict[str, dict[str, float]]:
    """Return {BEFORE: {label: Dice}, AFTER: {label: Dice}} of a metric record."""
    return {kind: {str(key).removeprefix(kind)[:200]: float(value) for key, value in record.items()
                   if str(key).startswith(kind)} for kind in (BEFORE, AFTER)}


def _answering(work: Callable[[Message, Path], RecordDict]) -> Callable[[Message, Context], Message]:
    """Return a handler that answers with what `work` returns, or with the kind of its error.

    The text of an error stays in the site's log: it may name cases or folders.
    """
    def handler(message: Message, context: Context) -> Message:
        try:
            folder = Path(os.environ["nnUNet_preprocessed"], str(context.node_config["dataset"]))  # noqa: SIM112
            content = work(message, folder)
        except Exception as error:  # whatever nnU-Net, torch and the file system raise
            _log.exception("this site could not do its part")
            content = RecordDict({"error": ConfigRecord({"kind": type(error).__name__})})
        return Message(content, reply_to=message)

    return handler


@client_app.query("agree")
@_answering
def agree(message: Message, folder: Path) -> RecordDict:
    """Return what the site is."""
    return RecordDict({"facts": ConfigRecord({"facts": msgspec.json.encode(read_site(folder).facts).decode()})})


@client_app.train()
@_answering
def train(message: Message, folder: Path) -> RecordDict:
    """Train one round."""
    from .site import train_round

    round_, received, digest = _read_order(message, folder)
    trained = train_round(folder, round_, received, digest)
    return RecordDict({"arrays": _arrays(trained.tensors),
                       "scores": _metrics({BEFORE: trained.dice_before, AFTER: trained.dice_after})})


@client_app.evaluate()
@_answering
def finish(message: Message, folder: Path) -> RecordDict:
    """Write the final network."""
    from .site import finish as write_final

    _, received, digest = _read_order(message, folder)
    return RecordDict({"scores": _metrics({AFTER: write_final(folder, received, digest)})})


def _read_order(message: Message, folder: Path) -> tuple[int, ReadOnlyStateDict, str]:
    from .site import shared_start

    order = _record(message, "order")
    received = unpacked(_bytes(message), shared_start(read_site(folder)), whole=False)
    return int(order["round"]), received, str(order["state"])


def _metrics(scores: Mapping[str, Mapping[str, float]]) -> MetricRecord:
    return MetricRecord({f"{kind}{label}": float(value) for kind, dice in scores.items()
                         for label, value in dice.items()})
