"""Read the pretrained model (the donor) from a model folder, an exported zip file or a checkpoint, and check it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError, DanteError, DonorError
from ..files import read_json
from ..types import DatasetJson, PathLike, Plans, StateDict
from .archive import (
    BUNDLE_FACTS,
    DEFAULT_CHECKPOINT,
    V1_ADVICE,
    Model,
    find_models,
    is_archive,
    is_v1_content,
    is_v1_model,
    unpack,
)
from .checkpoint import file_sha256, load_checkpoint_safely, weights_of
from .encoder import (
    ADAPTATION_PLAN,
    ENCODER,
    adaptation_plan,
    encoder_dataset,
    encoder_weights,
    image_kernel,
    nnssl_plans,
)
from .installed import find_donor
from .labels import plain_labels
from .network import UnknownTrainerError, aliased, build_network, differences, network_aliases, with_aliases
from .trusted_plans import check_donor, check_plans

_UNKNOWN = "unknown"
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class Donor:
    """A pretrained nnU-Net whose weights are known to fit its plans.

    weights: the full stock state dict, float32; names of one weight share one tensor, as in the network.
    mirroring_axes: spatial axes along which the training mirrored its images; () for none, None if unknown.
    network_trainer: the nnU-Net trainer that builds this network; it may replace the architecture of the plans.
    started_from: provenance of the donor from which a transfer started this model; {} if none did.
    kept: "strength" of its training's update, and "sum_of": the adapters whose sum it is, if the checkpoint has them.
    trust: whether the user allows plans that name code of any package.
    encoder_only: whether there is no decoder; then `weights` holds only the encoder, and no label is known.
    own_spacing: whether the spacing at which such an encoder was trained is known. If nothing tells its architecture,
        plans and configuration are empty.
    """

    source: str
    plans: Plans
    dataset_json: DatasetJson
    configuration: str
    weights: StateDict
    mirroring_axes: tuple[int, ...] | None
    trainer_name: str
    fold: str
    checkpoint_name: str
    sha256: str
    network_trainer: str = "nnUNetTrainer"
    started_from: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, Any] = field(default_factory=dict)
    trust: bool = False
    encoder_only: bool = False
    own_spacing: bool = True

    @property
    def dataset_name(self) -> str:
        """Name of the data set on which the donor was trained."""
        return str(self.plans.get("dataset_name", "unknown"))

    def provenance(self) -> dict[str, Any]:
        """Return what plans and checkpoints record about the donor, without weights and paths of this machine."""
        return {"source": self.source, "sha256": self.sha256, "trainer": self.trainer_name,
                "configuration": self.configuration, "dataset": self.dataset_name, "fold": self.fold,
                "checkpoint": self.checkpoint_name, **self.kept}


def open_donor(source: PathLike, *, configuration: str | None = None, fold: int | str | None = None,
               checkpoint: str = DEFAULT_CHECKPOINT, trust: bool = False, partial: bool = False) -> Donor:
    """Read the plans, labels and weights of an nnU-Net, and check that they fit each other.

    Args:
        source: a model folder, a zip file of `nnUNetv2_export_model_to_zip`, a bundle of MONAI, a folder or zip file
            that contains one of these, or a checkpoint. A checkpoint with weights alone needs plans.json and
            dataset.json beside it. `totalsegmentator:291` is TotalSegmentator's model of that number.
        configuration: needed if the source holds several models, or if nothing says which configuration was trained.
        fold: number of the fold, or "all"; None takes fold_all, or else the lowest fold.
        checkpoint: name of the file with the weights.
        trust: also read files that execute code. Use it only if you know their author.
        partial: also accept a checkpoint that holds an encoder and no decoder, such as those of nnssl.

    Raises:
        DonorError: the source holds no usable model, or its plans and weights do not fit each other.
        ConfigurationError, TransferError: an entry of plans or dataset.json is missing or cannot be used.
        UntrustedFileError: reading the checkpoint, or building the network, would execute code that belongs neither to
            nnU-Net nor to torch, and `trust` is False.
    """
    path = find_donor(source)
    path = path.resolve() if path.is_dir() else path
    if not path.exists():
        raise DonorError(f"SOURCE {path} does not exist; give an nnU-Net model folder (with plans.json and fold_*), "
                         "a zip from nnUNetv2_export_model_to_zip, or a checkpoint .pth.")
    if is_v1_model(path):
        raise DonorError(f"{path.name}: {V1_ADVICE}")
    if path.is_file() and not is_archive(path):
        folder = next((f for f in (path.parent, path.parent.parent) if (f / "plans.json").is_file()), path.parent)
        return _donor(_Files(path, folder, folder.name, path.name, bare=True), configuration, trust,
                      partial)
    model = _model(path, configuration)
    weights = model.choose_weights(fold, checkpoint)
    if path.is_dir():
        return _donor(_Files(path / weights, path / model.folder, model.name, path.name), configuration, trust,
                      partial)
    with tempfile.TemporaryDirectory() as temporary:
        unpack(path, Path(temporary), also=(weights, model.folder / BUNDLE_FACTS))
        root = Path(temporary)
        return _donor(_Files(root / weights, root / model.folder, model.name, path.name), configuration, trust,
                      partial)


def _model(source: Path, configuration: str | None) -> Model:
    found = find_models(source)
    if source.name.startswith("fold_") and not found and (source.parent / "plans.json").is_file():
        raise DonorError(f"SOURCE {source.name} is one fold of a model; give the folder above it and --fold "
                         f"{source.name.removeprefix('fold_')}.")
    if not found:
        raise DonorError(f"SOURCE {source.name} holds no nnU-Net model: no folder there has a plans.json. Give the "
                         "folder TRAINER__PLANS__CONFIGURATION below nnUNet_results, its zip, or a checkpoint.")
    names = ", ".join(str(model.folder) for model in found)
    chosen = [model for model in found if model.weights] or found
    if len(chosen) > 1 and configuration is not None:
        chosen = [model for model in chosen if model.name.split("__")[-1] == configuration]
    if len(chosen) != 1:
        raise DonorError(f"SOURCE {source.name} holds {len(found)} models, {len(chosen)} of them for configuration "
                         f"{configuration!r}: {names}. Choose with -c, or give one of these folders.")
    return chosen[0]


@dataclass(frozen=True)
class _Files:
    """The file with a donor's weights, the folder with its plans.json, this folder's name, and what the user gave.

    bare: whether the user gave a checkpoint. If it is complete, plans.json and dataset.json beside it do not count.
    """

    weights: Path
    folder: Path
    name: str
    source: str
    bare: bool = False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DonorError(f"{path.name} of the model cannot be read ({error}); the folder or zip must hold the "
                         "plans.json and dataset.json that nnU-Net wrote.") from error
    if not isinstance(content, dict):
        raise DonorError(f"{path.name} of the model holds a {type(content).__name__}, not an object.")
    return content


def _donor(files: _Files, configuration: str | None, trust: bool, partial: bool) -> Donor:
    name, content = files.weights.name, _content(files, trust)
    weights = _stock_keys(content["network_weights"])
    if encoder_only := (encoder := encoder_weights(weights, content, name)) is not None:
        if not partial:
            raise DonorError(f"{name} holds an encoder and no decoder, so it segments nothing yet. `nnunet-dante "
                             "transfer` makes it the start of a training.")
        weights = encoder
    init = content["init_args"] if isinstance(content.get("init_args"), dict) else {}
    if ADAPTATION_PLAN in content:
        init = {}  # nnssl's own
    plans, dataset_json, own_spacing = (_encoder_plans(files, init, content, encoder) if encoder is not None
                                        else (*_plans_and_labels(files, init), True))
    parts, fold = files.name.split("__"), files.weights.parent.name
    trainer = str(content.get("trainer_name") or (parts[0] if len(parts) == 3 else _UNKNOWN))
    donor = Donor(source=files.source, plans=plans, dataset_json=dataset_json, configuration="", weights=weights,
                  mirroring_axes=_mirroring_axes(content, name), trainer_name=trainer, checkpoint_name=name,
                  fold=str(init.get("fold", fold.removeprefix("fold_") if fold.startswith("fold_") else _UNKNOWN)),
                  sha256=file_sha256(files.weights), trust=trust, encoder_only=encoder_only, own_spacing=own_spacing)
    if encoder_only and not plans:
        return donor
    check_plans(plans, trust=trust)
    configured = init.get("configuration", parts[-1] if parts[-1] in plans["configurations"] else None)
    if None not in (configuration, configured) and configuration != configured:
        raise DonorError(f"{name} was trained for configuration {configured!r}; -c asks for {configuration!r}. "
                         "A network cannot change its configuration: leave -c out, or choose another model.")
    known = configured if configured is not None else configuration
    trained_for, state, builder = _fitting(
        donor, list(plans["configurations"]) if known is None else [str(known)])
    return replace(donor, dataset_json=plain_labels(dataset_json), configuration=trained_for, weights=state,
                   network_trainer=builder, started_from=_started_from(plans, content), kept=_kept(content))


def _encoder_plans(files: _Files, init: dict[str, Any], content: dict[str, Any],
                   encoder: StateDict) -> tuple[Plans, DatasetJson, bool]:
    """Return plans, dataset.json and whether their spacing is the donor's; empty plans where nothing says them."""
    name = files.weights.name
    if (plan := adaptation_plan(content, name)) is not None:
        dataset_json = encoder_dataset(plan.pretrain_num_input_channels)
        plans, known = nnssl_plans(plan, name)
        return plans, dataset_json, known
    if {"plans", "dataset_json"} <= set(init) or (files.folder / "plans.json").is_file():
        return *_plans_and_labels(files, init), True
    return {}, encoder_dataset(image_kernel(encoder, name).shape[1]), False


def fit_encoder(donor: Donor, plans: Plans) -> Donor:
    """Return a donor that is an encoder with plans, of one configuration, whose network has this encoder.

    Raises:
        DonorError: the encoder of the plans has other layers or shapes.
    """
    (configuration,) = plans["configurations"]
    weights, _ = _matched(replace(donor, plans=plans), configuration)
    return replace(donor, plans=plans, configuration=configuration, weights=weights)


def _content(files: _Files, trust: bool) -> dict[str, Any]:
    """Return the content of the checkpoint with its weights as "network_weights", and the facts of a MONAI bundle."""
    content = load_checkpoint_safely(files.weights, trust=trust)
    if is_v1_content(content):
        raise DonorError(f"{files.weights.name}: {V1_ADVICE}")
    if (weights := weights_of(content)) is None:
        raise DonorError(f"{files.weights.name} holds no 'network_weights', only {sorted(map(str, content))[:8]}; "
                         "give a checkpoint of an nnU-Net v2 training.")
    facts: dict[str, Any] = {}
    if "init_args" not in content and (files.folder / BUNDLE_FACTS).is_file():
        facts = load_checkpoint_safely(files.folder / BUNDLE_FACTS, trust=trust)
    return facts | content | {"network_weights": weights}


def _plans_and_labels(files: _Files, init: dict[str, Any]) -> tuple[Plans, DatasetJson]:
    complete = {"plans", "configuration", "dataset_json"} <= set(init)
    found = []
    for key, file in (("plans", files.folder / "plans.json"), ("dataset_json", files.folder / "dataset.json")):
        said: Any = _read_json(file) if file.is_file() and not (files.bare and complete) else init.get(key)
        found.append(said)
    if None in found:
        raise DonorError(f"{files.weights.name} holds weights but no 'init_args' with plans, configuration and "
                         "dataset_json, and no plans.json and dataset.json lie beside it, so its network and labels "
                         "are unknown. Give the model folder or a complete checkpoint, or put these files beside it.")
    return found[0], found[1]


def _fitting(donor: Donor, candidates: list[str]) -> tuple[str, StateDict, str]:
    """Return the configuration whose network the weights fit, the weights under its keys, and the trainer for it."""
    fitting, problems = dict[str, tuple[StateDict, str]](), list[DanteError]()
    for candidate in candidates:
        try:
            check_donor(donor.plans, donor.dataset_json, candidate, trust=donor.trust)
            fitting[candidate] = _matched(donor, candidate)
        except (DonorError, ConfigurationError) as error:
            problems.append(error)
    if not fitting:
        raise problems[0]
    if len(fitting) > 1:
        raise DonorError(f"Nothing says for which configuration {donor.checkpoint_name} was trained, and its weights "
                         f"fit {', '.join(fitting)}. Choose with -c.")
    ((configuration, (state, builder)),) = fitting.items()
    return configuration, state, builder


def _started_from(plans: Plans, content: dict[str, Any]) -> dict[str, str]:
    """Return the provenance of the donor from which a transfer started this model; {} if none did."""
    block = content.get("dante")
    if not plans.get("dante") or not isinstance(block, dict) or block.get("start_source") != "transfer":
        return {}
    known = block.get("donor")
    return known if isinstance(known, dict) and "sha256" in known else {}


def _kept(content: dict[str, Any]) -> dict[str, Any]:
    """Return "strength" and "sum_of" (see `Donor.kept`), without what this package would not have written."""
    block = content["dante"] if isinstance(content.get("dante"), dict) else {}
    strength, options = (block[key] if isinstance(block.get(key), dict) else {} for key in ("strength", "options"))
    value, sources = strength.get("value"), options.get("sources")
    return {**({"strength": value} if isinstance(value, float) and 0 <= value < math.inf else {}),
            **({"sum_of": sources} if isinstance(sources, list) and all(isinstance(s, str) for s in sources) else {})}


def _mirroring_axes(content: dict[str, Any], name: str) -> tuple[int, ...] | None:
    """Return the mirroring axes; None if there is no entry. nnU-Net writes None for a training without mirroring."""
    if (key := "inference_allowed_mirroring_axes") not in content:
        return None
    axes = () if content[key] is None else content[key]
    if not (isinstance(axes, (list, tuple)) and all(a in (0, 1, 2) for a in axes)):
        raise DonorError(f"{name} says that the axes {axes!r:.80} may be mirrored; possible are 0, 1 and 2.")
    return tuple(int(a) for a in axes)


def _stock_keys(weights: dict[str, Tensor]) -> StateDict:
    """Remove the prefixes that DDP ("module.") and torch.compile ("_orig_mod.") add to every key."""
    while prefix := next((w for w in _WRAPPERS if all(key.startswith(w) for key in weights)), None):
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _matched(donor: Donor, configuration: str) -> tuple[StateDict, str]:
    """Return the weights under the keys of the network, or encoder, that they fit, and the trainer that builds it.

    The network of the plans is tried first, then that of the trainer. Both are built without memory for weights, so
    plans that describe a huge network cannot use up the memory of the machine.
    """
    problems, found = list[str](), list[str]()
    name, trainer = donor.checkpoint_name, donor.trainer_name
    for builder in dict.fromkeys(("nnUNetTrainer", "nnUNetTrainer" if donor.encoder_only or trainer == _UNKNOWN
                                  else trainer)):
        try:
            with torch.device("cpu" if donor.trust else "meta"):  # a user's own architecture may need numbers
                network = build_network(donor.plans, donor.dataset_json, configuration, trainer_name=builder,
                                        trust=donor.trust)
        except ConfigurationError as error:
            problems.append(str(error))
            if found and isinstance(error, UnknownTrainerError):
                raise DonorError(
                    f"{name} was trained by {trainer!r}, which is not installed, and its weights do not fit the "
                    f"network of the plans (first difference: {found[0]}). If this trainer builds a network of its "
                    "own, copy its Python file into nnunetv2/training/nnUNetTrainer, where nnU-Net is installed. If "
                    "it does not, these plans belong to another model.") from error
            continue
        expected, aliases = network.state_dict(), network_aliases(network)
        if donor.encoder_only:
            aliases = {key: names for key, names in aliases.items() if key.startswith(ENCODER)}
            names = set(chain(*aliases.values()))
            expected = {key: tensor for key, tensor in expected.items() if key in names}
        complete = with_aliases(donor.weights, aliases)
        if not (found := differences(complete, expected)):
            return aliased(complete, aliases, expected, name), builder
        problems += found
    raise DonorError(f"{name} and its plans disagree ({len(problems)} differences; first: {'; '.join(problems[:3])}). "
                     f"Plans: {donor.plans.get('plans_name')!r}, configuration {configuration!r}, trainer {trainer!r}. "
                     "Use the plans.json and dataset.json that belong to this checkpoint.")
