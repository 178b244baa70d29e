"""Build the network that the plans describe, and check whether weights fit it."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import nnunetv2
import torch
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from ..errors import ConfigurationError, DonorError
from ..methods.groups import head_modules
from ..methods.nonlinear import ADDING_TRAINERS
from ..types import DatasetJson, Plans, ReadOnlyStateDict, StateDict
from .checkpoint import not_finite
from .labels import channel_names
from .trusted_plans import check_plans

_MAX_MODULES = 20_000  # a large residual U-Net has about a thousand


def build_network(plans: Plans, dataset_json: DatasetJson, configuration: str, *,
                  trainer_name: str = "nnUNetTrainer", trust: bool = False, deep_supervision: bool = True) -> nn.Module:
    """Build the network that nnU-Net trains and predicts with, on the CPU.

    Args:
        plans: content of plans.json.
        dataset_json: content of dataset.json; it gives the numbers of channels and labels.
        configuration: configuration of the plans, such as 3d_fullres.
        trainer_name: trainer whose network it is. This matters for trainers that replace the architecture of the plans
            (nnU-Net's Primus, BatchNorm) or add modules to it (this package's SpatialAdapter and AdaptFormer).
        trust: allow plans that name code of any package.
        deep_supervision: return the logits of every resolution, as in training; otherwise only the finest.

    Raises:
        UntrustedFileError: the plans name code that is neither nnU-Net's nor torch's.
        ConfigurationError: the plans lack the configuration, or its architecture cannot be built.
    """
    check_plans(plans, trust=trust)
    known = plans["configurations"]
    if configuration not in known:
        raise ConfigurationError(f"Configuration {configuration!r} is not in the plans {plans.get('plans_name')!r}; "
                                 f"they hold {sorted(known)}. Choose one of these with -c.")
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _limited():
            warnings.simplefilter("ignore")  # old plans formats make nnU-Net warn; it converts them by itself
            manager = PlansManager(plans)
            config = manager.get_configuration(configuration)
            channels = determine_num_input_channels(manager, config, dataset_json)
            heads = manager.get_label_manager(dataset_json).num_segmentation_heads
            if trainer_name != "nnUNetTrainer" and trainer_name not in ADDING_TRAINERS:
                return trainer_class(trainer_name).build_network_architecture(
                    manager, config, channels, heads, deep_supervision)
            network = get_network_from_plans(
                config.network_arch_class_name, config.network_arch_init_kwargs,
                config.network_arch_init_kwargs_req_import, channels, heads, allow_init=True,
                deep_supervision=deep_supervision)
            if trainer_name in ADDING_TRAINERS:
                ADDING_TRAINERS[trainer_name].adapt(network)
            return network
    except ConfigurationError:
        raise
    except Exception as error:  # a foreign architecture may raise anything; the message must name the architecture
        architecture = known[configuration].get("architecture")
        name = architecture.get("network_class_name") if isinstance(architecture, dict) else "of the plans"
        raise ConfigurationError(f"The network {name!r} of configuration {configuration!r} cannot be built "
                                 f"({type(error).__name__}: {error}). Install the package that defines it, or use "
                                 "a model with one of nnU-Net's own architectures.") from error


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Stop with an error when a network becomes too large; plans may ask for a million stages."""
    built = itertools.count(1)

    def count(*_: Any) -> None:
        if next(built) > _MAX_MODULES:
            raise ConfigurationError(f"The plans describe a network of more than {_MAX_MODULES} modules, which none of "
                                     "nnU-Net's is. Use the plans.json that nnU-Net wrote for this model.")

    handle = nn.modules.module.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


class UnknownTrainerError(ConfigurationError):
    """A trainer belongs neither to nnU-Net nor to this package."""


def trainer_class(name: str) -> Any:
    """Return the class of the nnU-Net trainer `name`.

    Raises:
        UnknownTrainerError: nnU-Net has no trainer of this name.
    """
    folder = Path(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    found = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")
    if found is None:
        raise UnknownTrainerError(
            f"Trainer {name!r} is not part of nnU-Net, so the network that it builds is unknown. Copy its Python "
            f"file into {folder}.")
    return found


def network_aliases(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return {first state-dict key of a tensor: all of its keys}; this also works on the meta device."""
    sets: dict[int, list[str]] = {}
    for key, tensor in network.state_dict(keep_vars=True).items():
        sets.setdefault(id(tensor), []).append(key)
    return {keys[0]: tuple(keys) for keys in sets.values()}


def with_aliases(weights: StateDict, aliases: dict[str, tuple[str, ...]]) -> StateDict:
    """Return the weights under all names of each tensor; slimmed checkpoints may keep only one."""
    complete = dict(weights)
    for names in aliases.values():
        if given := [name for name in names if name in weights]:
            complete |= {name: weights[given[0]] for name in names if name not in weights}
    return complete


def aliased(weights: StateDict, aliases: dict[str, tuple[str, ...]], expected: ReadOnlyStateDict,
            name: str) -> StateDict:
    """Return the weights in the types of `expected`, each tensor once under all of its names.

    Raises:
        DonorError: a tensor holds NaN, or has two values; `name` is the file's, for the message.
    """
    state, tensors = StateDict(), {key: weights[key].to(expected[key].dtype).contiguous() for key in aliases}
    if bad := not_finite(tensors.items()):
        raise DonorError(f"{name} holds NaN or infinite numbers in {bad[0]}; the training it comes from diverged.")
    for key, tensor in tensors.items():
        others = aliases[key]
        if unequal := [k for k in others if not torch.equal(weights[k].to(tensor.dtype), tensor)]:
            raise DonorError(f"{name} gives one weight of the network two values: {key} and {unequal[0]} differ. The "
                             "file was edited by a tool that does not know that these are the same; get the original.")
        state |= dict.fromkeys(others, tensor)
    return {key: state[key] for key in expected}


def differences(weights: ReadOnlyStateDict, expected: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each key or shape in which `weights` and the state dict `expected` differ; [] if none do."""
    lines = [f"{key} is missing" for key in expected if key not in weights]
    lines += [f"{key} is not part of the network" for key in weights if key not in expected]
    lines += [f"{key} has shape {tuple(weights[key].shape)}, the network {tuple(expected[key].shape)}"
              for key in expected if key in weights and weights[key].shape != expected[key].shape]
    return lines


def head_rows(network: nn.Module) -> dict[str, int]:
    """Return {state-dict key: dimension of the rows} of the weights and biases of all segmentation heads.

    A row belongs to one output, and so to one label. Rows are dimension 0 of a convolution's weight, and dimension 1 of
    a transposed convolution's weight (Primus).
    """
    rows: dict[int, int] = {}
    for module in head_modules(network):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        rows |= {id(p): int(transposed and p.ndim > 1) for p in module.parameters()}
    return {name: rows[id(p)] for name, p in network.named_parameters() if id(p) in rows}


def stem_weights(plans: Plans, dataset_json: DatasetJson, configuration: str, *,
                 trainer_name: str = "nnUNetTrainer", trust: bool = False) -> tuple[str, ...]:
    """Return the state-dict keys of the weights, shape (out, in, *kernel), that read the image channels.

    To find them, the network is also built with one channel more: these are the weights whose shapes change. Some
    networks have several (PrimusV2 reads the image in a residual block, which has two). The weights take no memory.
    """
    more = {**dataset_json, "channel_names": dict(enumerate([*channel_names(dataset_json), "one more"]))}
    more.pop("modality", None)  # nnU-Net reads the old key first
    with torch.device("meta"):
        one, other = (build_network(plans, content, configuration, trainer_name=trainer_name, trust=trust).state_dict()
                      for content in (dataset_json, more))
    return tuple(key for key in one if one[key].shape != other[key].shape)
