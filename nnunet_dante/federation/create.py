"""`nnunet-dante federate new`: write the folder of a federation, which is also a Flower app."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .. import __version__
from ..adapters.file import FORMAT as ADAPTER_FORMAT
from ..adapters.file import write_adapter
from ..errors import ConfigurationError, FederationError
from ..files import write_text_atomically
from ..methods import Method
from ..methods.nonlinear import ADDING_TRAINERS
from ..models.checkpoint import file_sha256, save_atomically, unique_tensors, weights_sha256
from ..models.donor import Donor, open_donor
from ..models.labels import channel_names, has_regions, head_names
from ..models.network import build_network, head_rows
from ..models.overrides import checked_overrides
from ..models.settings import new_dante_block
from ..peft.inject import adapted, settings
from ..peft.low_rank import DecomposedLowRank
from ..transfers.match import LabelMatch, match_names
from ..transfers.surgery import head_surgery
from ..types import PathLike, StateDict
from .settings import CHECKPOINT, MODEL, SETTINGS, START, Settings
from .state import trained_tensors

_APP, _APP_NAME = "federated", re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")
_MODULES = {  # file: text
    "__init__.py": '"""The Flower app of this federation; all code is in nnunet_dante.federation."""\n',
    **{f"{side}_app.py": f"from nnunet_dante.federation.flower import {side}_app\n\napp = {side}_app\n"
       for side in ("server", "client")}}
_PYPROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "Federated fine-tuning of {donor}: {method}, {averaging} averaging"
dependencies = []  # every machine has nnunet-dante[flower] {version} installed

[tool.flwr.app]
publisher = "nnunet-dante"
fab-include = ["{app}/*.py"]  # nothing else travels: every site has this folder

[tool.flwr.app.components]
serverapp = "{app}.server_app:app"
clientapp = "{app}.client_app:app"

[tool.flwr.app.config]  # settings of the server; change them here, or with flwr run --run-config
folder = {folder}  # where this folder lies on the server's machine
min-sites = 2  # a round starts and ends with at least so many sites
wait-minutes = 60.0  # how long the server waits for so many sites
round-minutes = 600.0  # a site that has not answered by then is left out of the round
max-length = 10.0  # refuse an update so many times longer than the median of all sites; 0 refuses none
trim = 0  # of each number, leave out so many smallest and largest values; 0 takes the mean weighted by cases
"""


def new_federation(folder: PathLike, donor: PathLike, *, labels: Sequence[str] = (), method: str = "LoRA",
                   averaging: str = "alternating", local: Sequence[str] = (), rounds: int = 10, epochs: int = 5,
                   prox: float = 0.0, overrides: Mapping[str, Any] | None = None, configuration: str | None = None,
                   fold: int | str | None = None, checkpoint: str = "checkpoint_final.pth",
                   trust: bool = False) -> str:
    """Write the folder of a federation that fine-tunes `donor`, and return in lines what it is.

    Args:
        folder: to write; must not hold a federation yet.
        donor: as for `transfer`.
        labels: of all sites together; by default the donor's. A label that the donor does not know needs sites that
            draw it.
        method: name of the method, such as LoRA or FineTune.
        averaging: "alternating" or "frozen", see `aggregate`. It matters for low-rank methods only.
        local: "norms" keeps norms at each site (FedBN, Li 2021, arXiv 2102.07623), "heads" the segmentation heads
            (FedPer, Arivazhagan 2019, arXiv 1912.00818).
        rounds: number of rounds. epochs: of each site in each round. prox: strength of FedProx.
        overrides: numbers and options of the training, such as {"rank": 4}.
        configuration, fold, checkpoint, trust: of the donor, as for `transfer`.

    Raises:
        FederationError: the folder holds a federation, or an option cannot be used.
        DonorError, UntrustedFileError, ConfigurationError: the donor or an override cannot be used.
    """
    folder = Path(folder)
    if not _APP_NAME.fullmatch(folder.resolve().name):
        raise FederationError(f"the folder of the federation is called {folder.resolve().name!r}; Flower allows up to "
                              "32 letters, digits and hyphens, and a letter first. Choose another name.")
    if (folder / SETTINGS).exists():
        raise FederationError(f"{folder} holds a federation already; choose another folder, or delete it if no site "
                              "has joined it.")
    opened = open_donor(donor, configuration=configuration, fold=fold, checkpoint=checkpoint, trust=trust)
    given = checked_overrides(dict(overrides or {}))
    if reserved := given.keys() & {"epochs", "strength", "l2_sp", "ewc", "stop_patience"}:
        raise FederationError(f"--set {min(reserved)} cannot be used in a federation: epochs has a flag of its own, "
                              "prox takes the place of l2_sp and ewc, all that was learned is kept, and no site stops "
                              "early.")
    given |= {"epochs": rounds * epochs, "strength": 1.0}
    trained = _method(method, given)
    content, weights = _with_labels(opened, labels)
    network, names = _adapted(opened, content, weights, trained)
    asked = {"name": folder.resolve().name, "configuration": opened.configuration, "method": method, "rounds": rounds,
             "averaging": averaging, "local": list(dict.fromkeys(local)), "epochs": epochs, "prox": float(prox),
             "overrides": given}
    found = {"labels": head_names(content), "known": head_names(opened.dataset_json),
             "channels": channel_names(content), "kept": [n for n in names if _stays(n, network, local)],
             "heads": {name: dim for name, dim in head_rows(network).items() if name in names}}
    shared = _settings({**asked, **found, "model_sha256": "", "start_sha256": ""})
    _write_model(folder, opened, content, weights, given)
    write_adapter(_header(opened, content, weights, network, trained), names, folder / START)
    shared = msgspec.structs.replace(shared, model_sha256=file_sha256(folder / CHECKPOINT),
                                     start_sha256=file_sha256(folder / START))
    _write_app(folder, opened, shared)
    write_text_atomically(msgspec.json.format(msgspec.json.encode(shared), indent=2).decode(), folder / SETTINGS)
    return _describe(folder, opened, shared, names, weights)


def _settings(content: dict[str, Any]) -> Settings:
    try:
        return msgspec.convert(content, Settings)
    except msgspec.ValidationError as error:
        raise FederationError(f"the federation cannot have these settings: {error}.") from error


def _describe(folder: Path, donor: Donor, shared: Settings, names: StateDict, weights: StateDict) -> str:
    sent = sum(t.nbytes for name, t in names.items() if name not in shared.kept)
    whole = sum(t.nbytes for t in unique_tensors(weights).values())
    return "\n".join([
        f"{folder}: a federation of {shared.rounds} rounds with {shared.epochs} epochs each",
        f"  donor      {donor.source}, configuration {donor.configuration}",
        f"  labels     {', '.join(shared.foreground)}",
        f"  trains     {shared.method}, {shared.averaging} averaging; the trained tensors have {sent / 2**20:.2f} MiB, "
        f"the network {whole / 2**20:.2f} MiB",
        f"  stays      {', '.join(shared.local) or 'nothing of the trained tensors'} at each site",
        "Send the whole folder to every site. There: nnunet-dante federate join FOLDER -d DATASET --site NAME"])


def _with_labels(donor: Donor, labels: Sequence[str]) -> tuple[dict[str, Any], StateDict]:
    """Return dataset.json and start weights for these labels, with the donor's rows where it knows a label."""
    content = {key: value for key, value in donor.dataset_json.items()
               if key in ("channel_names", "modality", "labels", "regions_class_order", "file_ending")}
    content |= {"numTraining": 0}
    if not labels:
        return content, donor.weights
    if has_regions(donor.dataset_json):
        raise FederationError("--labels cannot be used with a donor whose labels are regions; leave it out.")
    names = [name for name in dict.fromkeys(labels) if name != "background"]
    known = head_names(donor.dataset_json)
    spelled = [name if i is None else known[i] for name, i in zip(names, match_names(names, known))]
    content |= {"labels": {name: i for i, name in enumerate(["background", *spelled])}}
    with torch.device("meta"):
        heads = head_rows(build_network(donor.plans, donor.dataset_json, donor.configuration, trust=donor.trust,
                                        trainer_name=donor.network_trainer))
    weights, _ = head_surgery(donor.weights, heads=heads,
                              labels=LabelMatch(target=head_names(content), donor=known))
    return content, weights


def _method(name: str, overrides: Mapping[str, Any]) -> Method:
    from ..training.trainers import TRAINERS

    found = {key.removeprefix("nnUNetTrainer"): trainer.method for key, trainer in TRAINERS.items()
             if key not in ADDING_TRAINERS and trainer.method.uses_start_weights}
    if name not in found:
        raise FederationError(f"--method {name} cannot be federated; choose one of {', '.join(sorted(found))}.")
    return found[name].with_overrides(dict(overrides))


def _adapted(donor: Donor, content: dict[str, Any], weights: StateDict,
             method: Method) -> tuple[nn.Module, StateDict]:
    """Return the network with the method's modules, and the tensors that its sites train, before the first round."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)  # the same factors A for the same donor and labels
        network = build_network(donor.plans, content, donor.configuration, trainer_name=donor.network_trainer,
                                trust=donor.trust)
        network.load_state_dict(weights)
        method.adapt(network)
    if any(isinstance(module.parametrizations["weight"][0], DecomposedLowRank)  # type: ignore[index]
           for module in adapted(network).values()):
        raise ConfigurationError("DoRA cannot be federated: the mean of rescaled weights is not the weight of the mean "
                                 "factors. Use --method LoRA.")
    plan = method.plan(network)
    plan.restrict(network)
    return network, {name: tensor.clone() for name, tensor in trained_tensors(network, plan).items()}


def _stays(name: str, network: nn.Module, local: Sequence[str]) -> bool:
    norms = {f"{prefix}.{inner}" for prefix, module in network.named_modules()
             if isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm)
             for inner, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]}
    return ("norms" in local and name in norms) or ("heads" in local and name in head_rows(network))


def _write_model(folder: Path, donor: Donor, content: dict[str, Any], weights: StateDict,
                 overrides: Mapping[str, Any]) -> None:
    plans = _plans(donor, overrides)
    checkpoint = {
        "network_weights": weights, "trainer_name": donor.network_trainer,
        "init_args": {"plans": plans, "configuration": donor.configuration, "fold": "all", "dataset_json": content,
                      "device": torch.device("cpu")},
        **({} if donor.mirroring_axes is None else {"inference_allowed_mirroring_axes": donor.mirroring_axes or None}),
        "dante": {"format": 1, "version": __version__, "start_source": "transfer", "donor": donor.provenance()}}
    save_atomically(checkpoint, folder / CHECKPOINT)
    write_text_atomically(json.dumps(plans, indent=4), folder / MODEL / "plans.json")
    write_text_atomically(json.dumps(content, indent=4), folder / MODEL / "dataset.json")


def _plans(donor: Donor, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the donor's plans with a "dante" block, by which models of the federation are known as its descendants."""
    entry = {"file": "start.pth", "sha256": "0" * 64, "donor": donor.provenance(),
             "network_trainer": donor.network_trainer}
    return {**donor.plans, "dante": new_dante_block(donor.configuration, entry, overrides)}


def _header(donor: Donor, content: dict[str, Any], weights: StateDict, network: nn.Module,
            method: Method) -> dict[str, Any]:
    """Return the metadata of start.safetensors, which is an adapter file that changes nothing yet."""
    axes = donor.mirroring_axes
    return {
        "format": ADAPTER_FORMAT, "version": __version__, "method": type(method).__name__,
        "options": dataclasses.asdict(method), "base_sha256": weights_sha256(weights), "donor": donor.provenance(),
        "label_map": LabelMatch(target=head_names(content), donor=head_names(donor.dataset_json)).by_name(),
        "start_dice": {}, "updates": settings(network), "strength": None, "trainer_name": donor.network_trainer,
        **({} if axes is None else {"inference_allowed_mirroring_axes": list(axes) or None}),
        "init_args": {"plans": _plans(donor, {}), "configuration": donor.configuration, "fold": "all",
                      "dataset_json": content}}


def _write_app(folder: Path, donor: Donor, shared: Settings) -> None:
    for file, text in _MODULES.items():
        write_text_atomically(text, folder / _APP / file)
    write_text_atomically(_PYPROJECT.format(
        name=shared.name, donor="".join(c for c in donor.source if c not in '"\\'), method=shared.method,
        averaging=shared.averaging, version=__version__, app=_APP,
        folder=json.dumps(str(folder.resolve()))), folder / "pyproject.toml")
