"""flower.py through Flower's own app classes and a grid in this process: no network, no ray."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc

import pytest
import torch

pytest.importorskip("flwr", reason="Flower needs Python 3.11")

from federated import activate, made  # noqa: E402
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.serverapp import Grid  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from nnunet_dante.adapters.file import read_adapter  # noqa: E402
from nnunet_dante.errors import FederationError  # noqa: E402
from nnunet_dante.federation import flower  # noqa: E402
from nnunet_dante.federation.coordinator import Coordinator  # noqa: E402
from nnunet_dante.federation.settings import (
    read_settings,  # noqa: E402
    read_site,  # noqa: E402
)
from nnunet_dante.models.checkpoint import load_checkpoint_safely  # noqa: E402


class LocalGrid(Grid):
    """Hands each message to the app of a node in this process. nodes: node -> function from message to reply."""

    def __init__(self, nodes, *, keep: bool = True):
        self.nodes, self.keep, self.count = nodes, keep, 0
        self.waiting, self.sent, self.received = {}, [], []
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *_, **__):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        names = []
        for message in messages:
            self.count += 1
            names.append(f"message {self.count}")
            self.waiting[names[-1]] = message
            self.sent += [message] * self.keep
        return names

    def pull_messages(self, message_ids):
        replies = []
        for name in message_ids:
            message = self.waiting.pop(name)
            if (reply := self.nodes[message.metadata.dst_node_id](message)) is None:
                self.waiting[name] = message
            else:
                replies.append(reply)
        self.received += replies * self.keep
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


def node(number: int, dataset: str):
    """The client app as the SuperNode of this data set runs it."""
    context = Context(run_id=1, node_id=number, node_config={"dataset": dataset}, state=RecordDict(), run_config={},
                      series_id=0)
    return lambda message: flower.client_app(message, context)


def server(sites, nodes, **options) -> flower.Server:
    return flower.Server(LocalGrid(nodes), Coordinator(sites.folder, **({"min_sites": 2} | options)), wait_s=0.2,
                         round_s=5, poll_s=0.01)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A federation of two sites after its rounds."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)
        sites = made(tmp_path_factory.mktemp("flower"), "north", "south")
        activate(sites.root, patch)
        running = server(sites, {i: node(i, name) for i, name in enumerate(sites.datasets.values(), 10)})
        running.run()
        yield sites, running


def test_a_federation_ends_with_model_adapter_history_and_report(trained):
    sites, running = trained
    run = sites.folder / "run"
    history = json.loads((run / "history.json").read_text())
    assert [sorted(entry["sites"]) for entry in history["rounds"]] == [["north", "south"]] * 2
    assert history["final_dice"].keys() == {"north", "south"} and not history["refused"]
    text = (run / "report.md").read_text()
    assert "north" in text and "MiB back" in text and (run / "dice.png").is_file() and (run / "report.html").is_file()
    content = load_checkpoint_safely(run / "result" / "fold_all" / "checkpoint_final.pth")
    assert content["trainer_name"] == "nnUNetTrainer"
    for name, dataset in sites.datasets.items():
        folder = sites.root / "nnUNet_results" / dataset / "nnUNetTrainerLoRA__nnUNetFederationPlans__3d_fullres"
        own = load_checkpoint_safely(folder / "fold_0" / "checkpoint_final.pth")["network_weights"]
        assert all(torch.allclose(own[key], tensor, atol=1e-6) for key, tensor in content["network_weights"].items()), name


def test_the_result_is_exported_to_dafne_with_the_id_of_the_donor(trained, tmp_path):
    from nnunet_dante import export_model
    from nnunet_dante.dafne.model_file import open_model

    sites, _ = trained
    donor = next((sites.root / "nnUNet_results" / "Dataset900_Donor").iterdir())
    for name, folder in (("donor", donor), ("result", sites.folder / "run" / "result")):
        export_model(folder, tmp_path / f"{name}.model", orientation="RAS")
    assert open_model(tmp_path / "donor.model").model_id == open_model(tmp_path / "result.model").model_id


def test_a_message_holds_what_the_threat_model_lists_and_nothing_else(trained):
    sites, running = trained
    settings = read_settings(sites.folder)
    texts = []
    for message in running.grid.received:
        kind = message.metadata.message_type
        assert set(message.content) == {flower.AGREE: {"facts"}, flower.TRAIN: {"arrays", "scores"},
                                        flower.FINISH: {"scores"}}[kind]
        texts += [json.dumps({name: dict(record) for name, record in message.content.items() if name != "arrays"})]
        texts += list(message.content.get("arrays", {}))
        if kind == flower.AGREE:
            assert set(json.loads(message.content["facts"]["facts"])) == {
                "site", "federation", "labels", "draws", "channels", "cases", "version", "nnunetv2", "torch",
                "intensities"}
        for key in message.content.get("scores", {}):
            assert key.removeprefix(flower.BEFORE).removeprefix(flower.AFTER) in settings.foreground
        for name, array in message.content.get("arrays", {}).items():
            assert name in running.coordinator.state and array.stype == "numpy.ndarray"
    for message in running.grid.sent:
        assert set(message.content) <= {"arrays", "order"}
        assert set(message.content.get("order", {})) <= {"round", "state"}
    assert not any(secret in text for text in texts for secret in ("case_", ".nii", str(sites.root), "Dataset"))


def test_bytes_on_the_wire_are_those_of_the_trained_half(trained):
    sites, running = trained
    training = [m for m in running.grid.received if m.metadata.message_type == flower.TRAIN]
    entry = json.loads((sites.folder / "run" / "history.json").read_text())["rounds"][0]["sites"]["north"]
    payload = sum(len(array.data) for array in training[0].content["arrays"].values())
    assert entry["bytes_up"] < payload < entry["bytes_up"] + 256 * len(training[0].content["arrays"])
    assert entry["bytes_down"] == 0  # every site has the start


def fake(sites, name: str, **changes):
    """A site that answers at once with tensors of its own; `changes`: of what it says of itself."""
    facts = json.loads(json.dumps(json.loads((sites.preprocessed("north") / "federation_site.json").read_text())["facts"]))
    facts |= {"site": name, **changes}

    def answer(message: Message) -> Message:
        if message.metadata.message_type == flower.AGREE:
            return Message(RecordDict({"facts": ConfigRecord({"facts": json.dumps(facts)})}), reply_to=message)
        return Message(reply_of(message), reply_to=message)

    def reply_of(message: Message) -> RecordDict:
        scores = {f"{kind}organ": 0.5 for kind in (flower.BEFORE, flower.AFTER)}
        tensors = read_adapter(sites.folder / "start.safetensors")[1] if message.metadata.message_type == flower.TRAIN else {}
        tensors = {k: v + 0.01 for k, v in tensors.items() if not k.endswith("lora_A")}
        return RecordDict({"arrays": flower._arrays(tensors), "scores": MetricRecord(scores)})

    return answer


@pytest.fixture
def fresh(trained, tmp_path, monkeypatch):
    """A federation before its first round."""
    import dataclasses

    sites, _ = trained
    shutil.copytree(sites.folder, tmp_path / "federation", ignore=shutil.ignore_patterns("run"))
    activate(sites.root, monkeypatch)
    return dataclasses.replace(sites, folder=tmp_path / "federation")


def with_arrays(answer, change):
    def changed(message: Message) -> Message:
        reply = answer(message)
        if message.metadata.message_type != flower.TRAIN:
            return reply
        arrays = dict(reply.content["arrays"])
        return Message(RecordDict({**reply.content, "arrays": ArrayRecord(change(arrays))}), reply_to=message)

    return changed


def poisoned(value: float):
    def change(arrays):
        name = next(iter(arrays))
        return {**arrays, name: Array(arrays[name].numpy() * 0 + value)}

    return change


@pytest.mark.parametrize(("change", "reason"), [
    (poisoned(float("nan")), "NaN or infinite"), (poisoned(1e6), "times the median"),
    (lambda arrays: {}, "does not send"), (lambda arrays: arrays | {"../x": next(iter(arrays.values()))}, "sends '../x'"),
    (lambda arrays: {n: Array(a.numpy()[:1]) for n, a in arrays.items()}, "has shape|does not"),
    (lambda arrays: {n: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=a.data[:-4])
                     for n, a in arrays.items()}, "bytes"),
    (lambda arrays: {n: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=b"nothing")
                     for n, a in arrays.items()}, "cannot be read")])
def test_a_site_with_bad_tensors_is_left_out_by_name_and_the_round_goes_on(fresh, change, reason):
    import re

    names = ["a", "b", "c"]
    nodes = {i: fake(fresh, name) for i, name in enumerate(names)} | {9: with_arrays(fake(fresh, "odd"), change)}
    running = server(fresh, nodes)
    running._wait_for_sites()
    running._round()
    assert running.coordinator.close_round()
    (entry,) = running.coordinator.history["rounds"]
    assert sorted(entry["sites"]) == names and re.search(reason, entry["left_out"]["odd"])


@pytest.mark.parametrize(("changes", "reason"), [
    ({"federation": "0" * 64}, "another federation"), ({"version": "9.9.9"}, "nnunet-dante 9.9.9"),
    ({"labels": ["background", "organ"]}, "has the labels background, organ"),
    ({"channels": ["CT"]}, "has the channels CT"), ({"draws": ["spleen"]}, "draws spleen"),
    ({"cases": 0}, "0 training cases"), ({"site": "../up"}, "its name"), ({"cases": "many"}, "cannot say")])
def test_a_site_that_does_not_fit_is_refused_before_anyone_trains(fresh, capsys, changes, reason):
    nodes = {1: fake(fresh, "a"), 2: fake(fresh, "b"), 3: fake(fresh, "odd", **changes)}
    running = server(fresh, nodes)
    running._wait_for_sites()
    assert running._names() == ["a", "b"]
    assert reason in capsys.readouterr().out


def test_a_site_that_never_answers_is_left_out(fresh):
    def silent(message):
        return answer(message) if message.metadata.message_type == flower.AGREE else None

    answer = fake(fresh, "silent")
    running = server(fresh, {1: fake(fresh, "a"), 2: fake(fresh, "b"), 3: silent})
    running.round_s = 0.2
    running._wait_for_sites()
    running._round()
    assert running.coordinator.close_round()
    assert "did not answer" in running.coordinator.history["rounds"][0]["left_out"]["silent"]


@pytest.mark.parametrize(("code", "reason"), [(ErrorCode.NODE_UNAVAILABLE, "went away, or did not answer"),
                                              (ErrorCode.CLIENT_APP_CRASHED, "its app has failed.*8.*its log says why")])
def test_an_error_of_flower_says_whether_the_site_is_gone_or_its_app_has_failed(fresh, code, reason):
    """For a site that hangs, the SuperLink itself answers as soon as it hears it no more."""
    import re

    def failing(message):
        agreed = message.metadata.message_type == flower.AGREE
        return answer(message) if agreed else Message(Error(code=code), reply_to=message)

    answer = fake(fresh, "odd")
    running = server(fresh, {1: fake(fresh, "a"), 2: fake(fresh, "b"), 3: failing})
    running._wait_for_sites()
    running._round()
    assert running.coordinator.close_round()
    assert re.search(reason, running.coordinator.history["rounds"][0]["left_out"]["odd"])


def test_a_site_that_was_away_when_it_was_asked_what_it_is_is_asked_again(fresh):
    answer, away = fake(fresh, "c"), [Error(code=ErrorCode.NODE_UNAVAILABLE)]
    running = server(fresh, {1: fake(fresh, "a"), 2: fake(fresh, "b"),
                             3: lambda message: Message(away.pop(), reply_to=message) if away else answer(message)})
    running._wait_for_sites()
    assert running._names() == ["a", "b"]
    running._wait_for_sites()
    assert running._names() == ["a", "b", "c"]


def test_a_site_that_was_killed_while_it_sent_does_not_hold_up_the_others(monkeypatch):
    """Flower then waits in pull_messages for tensors that never come."""
    monkeypatch.setattr(flower, "_LOOK_S", 0.05)

    def answer(message):
        if message.metadata.dst_node_id == 1:
            time.sleep(30)
        return Message(RecordDict(), reply_to=message)

    running = flower.Server(LocalGrid({1: answer, 2: answer, 3: answer}), None, wait_s=1, round_s=1, poll_s=0.01)
    began = time.monotonic()
    answered = [node for node, _ in running._ask({node: (flower.AGREE, RecordDict()) for node in (1, 2, 3)}, 1.0)]
    assert answered == [2, 3] and time.monotonic() - began < 5


def test_too_few_sites_end_with_an_error_that_names_those_that_came(fresh):
    with pytest.raises(FederationError, match=r"1 sites are there \(a\), and 2 are needed"):
        server(fresh, {1: fake(fresh, "a")}).run()


def test_a_server_that_was_killed_goes_on_from_the_last_finished_round(fresh):
    nodes = {1: fake(fresh, "a"), 2: fake(fresh, "b")}
    first = server(fresh, nodes)
    first._wait_for_sites()
    first._round()
    first.coordinator.close_round()
    first._round()  # and here it is killed
    again = server(fresh, nodes)
    assert again.coordinator.round == 1 and len(again.coordinator.history["rounds"]) == 1
    assert all(torch.equal(again.coordinator.state[n], t) for n, t in first.coordinator.state.items())


def test_an_error_at_a_site_is_told_by_its_kind_alone(fresh):
    """The text of an error may name cases and folders."""
    (dataset,) = {fresh.datasets["north"]}
    app = node(1, dataset)
    running = server(fresh, {})
    order = running._order({})
    order["order"]["state"] = "0" * 64
    reply = app(Message(order, dst_node_id=1, message_type=flower.TRAIN))
    assert dict(reply.content["error"]) == {"kind": "FederationError"} and len(reply.content) == 1
    assert read_site(fresh.preprocessed("north")).facts.site == "north"


@pytest.mark.slow
def test_a_thousand_sites_take_linear_time_and_no_more_memory(fresh):
    facts = json.loads((fresh.preprocessed("north") / "federation_site.json").read_text())["facts"]
    order = Message(server(fresh, {})._order({}), dst_node_id=1, message_type=flower.TRAIN)
    trained = fake(fresh, "a")(order).content  # one answer for all sites

    def site(number: int):
        own = RecordDict({"facts": ConfigRecord({"facts": json.dumps(facts | {"site": f"site{number}"})})})
        return lambda message: Message(trained if message.metadata.message_type == flower.TRAIN else own,
                                       reply_to=message)

    def one_round(count: int) -> tuple[float, float]:
        """Return the seconds and MiB of a round with so many sites."""
        shutil.rmtree(fresh.folder / "run", ignore_errors=True)
        running = server(fresh, {})
        running.grid = LocalGrid({i: site(i) for i in range(count)}, keep=False)
        running._wait_for_sites()
        tracemalloc.start()
        began = time.perf_counter()
        running._round()
        assert running.coordinator.close_round()
        seconds, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(running.coordinator.history["rounds"][0]["sites"]) == count
        return seconds, peak / 2**20

    (few_s, few_mib), (many_s, many_mib) = one_round(100), one_round(1000)
    assert many_s < 30 * few_s
    assert many_mib < few_mib + 12  # what is kept of a site: its name and scores, not its tensors
