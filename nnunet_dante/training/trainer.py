"""The mixin that turns any stock nnU-Net trainer into a fine-tuning trainer.

Each override is short and calls super(): network, data, losses, validation and prediction stay nnU-Net's.

    configure_optimizers   load the start weights, adapt the network, audit the gradients, make parameter groups (after
                           nnU-Net has built and compiled the network, before it wraps it for DDP)
    on_train_start         score the start weights, and save them as the first checkpoint_best
    on_train_epoch_start   enter the stage of this epoch
    save_checkpoint        write stock keys, the stock trainer's name, and provenance under "dante", atomically
    load_checkpoint        restore base, factors and random state, so that a training continues as if it had not stopped

The mixins from which it is derived serve any method: further terms of the loss (objective.py), labels that were drawn
in some cases only (partial.py), the early end of a training (guards.py), results that survive a kill (storage.py), how
much of what was learned is kept (strength.py), and logs for TensorBoard (live.py).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, ClassVar

from ..versions import refuse_unsupported

refuse_unsupported()  # comes before imports that fail in other versions of nnU-Net with an unclear message

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from ..adapters.adapter import extract
from ..adapters.strength import trained_weights
from ..errors import ConfigurationError
from ..methods import Method, ParameterEfficient
from ..methods.groups import stages, stem_modules
from ..methods.nonlinear import ADDING_TRAINERS
from ..models.checkpoint import save_atomically, unique_tensors, weights_sha256
from ..models.labels import head_names
from ..models.memory import PeakMemory
from ..models.network import trainer_class
from ..models.settings import read_dante_block
from ..peft.audit import audit_on_small_patch
from ..peft.inject import adapted, load_split
from ..peft.recompute import recompute
from ..types import StateDict
from .guards import StoppingMixin
from .live import LiveMixin
from .lr import WarmupPolyLR
from .objective import ObjectiveMixin
from .partial import PartialLabelsMixin
from .provenance import load_start_weights, provenance, refuse_other_names
from .resume import describe_cases, random_state, refuse_changes, restore_random_state
from .storage import StorageMixin
from .strength import StrengthMixin


class DanteMixin(StorageMixin, StoppingMixin, ObjectiveMixin, PartialLabelsMixin, LiveMixin, StrengthMixin):
    """Fine-tune with `method`.

    Example: `class nnUNetTrainerMine(DanteMixin, nnUNetTrainer): method = LoRA()`; the mixin comes first.

    Start weights and overrides come from the "dante" block of the plans, which `nnunet-dante transfer` writes;
    -pretrained_weights replaces these start weights. A method that fine-tunes refuses to train random weights.
    """

    method: ClassVar[Method] = Method()

    weights_from_checkpoint = False

    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    logger: Any
    network: Any

    def __new__(cls, plans: dict | None = None, configuration: str = "", *_: Any, **__: Any) -> Any:
        """Return a trainer that builds the donor's network, also if the donor's trainer describes it and not the plans.

        For a donor of nnUNetTrainerBN, this is `class X(cls, nnUNetTrainerBN)` under the name of `cls`.
        """
        entry = read_dante_block(plans or {})["start_weights"].get(configuration, {})
        name = entry.get("network_trainer", "nnUNetTrainer")
        if name not in ("nnUNetTrainer", *ADDING_TRAINERS) and not issubclass(cls, builder := trainer_class(name)):
            cls = cls.built_by(builder)
        return super().__new__(cls)

    @classmethod
    def built_by(cls, builder: type[nnUNetTrainer]) -> type[DanteMixin]:
        """Return this trainer with the network of `builder`, a trainer of nnU-Net."""
        return type(cls.__name__, (cls, builder), {"__module__": cls.__module__, "__doc__": cls.__doc__})

    def initialize(self) -> None:
        """Read the plans' "dante" block before nnU-Net builds network and optimiser."""
        self.memory = PeakMemory(self.device)
        block = read_dante_block(self.plans_manager.plans)
        overrides = block.get("overrides", {})
        self.run_method = self.method.with_overrides(overrides)
        self.start_entry: dict | None = block.get("start_weights", {}).get(self.configuration_name)
        if (self.start_entry or {}).get("encoder_only") and self.run_method.uses_start_weights:
            self.run_method = self.run_method.for_new_decoder()
            self.print_to_log_file("The donor is an encoder: the decoder starts at random, and all of it is trained "
                                   "from the first epoch on.")
        self.start_source = "random"
        self.base: StateDict = {}
        self.base_sha256 = ""
        self.start_dice: dict[str, float] = {}
        self.cases: dict[str, str] = {}  # what `describe_cases` returned when the training began
        self.resume_random_state: dict | None = None
        self.num_epochs = self.run_method.epochs
        self.num_iterations_per_epoch = overrides.get("iterations", self.num_iterations_per_epoch)
        self.num_val_iterations_per_epoch = overrides.get("val_iterations", self.num_val_iterations_per_epoch)
        self.initial_lr, self.weight_decay = self.run_method.lr, self.run_method.weight_decay
        self.save_every = 10
        used = {k: v for k, v in overrides.items() if k in self.run_method.known_overrides() | {*self.steps}}
        if used:
            self.print_to_log_file("Overrides in the plans:", used)
        if ignored := {k: v for k, v in overrides.items() if k not in used}:
            self.print_to_log_file("Overrides in the plans that are no options of this trainer, ignored:", ignored)
        super().initialize()

    @property
    def steps(self) -> dict[str, int]:
        """The numbers of steps of an epoch, by the names of their overrides."""
        return {"iterations": self.num_iterations_per_epoch, "val_iterations": self.num_val_iterations_per_epoch}

    @property
    def bare_network(self) -> nn.Module:
        """The network without DDP and torch.compile around it."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return getattr(network, "_orig_mod", network)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupPolyLR]:
        """Load the start weights, adapt the network, audit its gradients, and return AdamW and the schedule."""
        network, method = self.bare_network, self.run_method
        if method.uses_start_weights and self.start_entry is not None:
            refuse_other_names(self.start_entry, self.dataset_json)
            if not self.weights_from_checkpoint:
                load_start_weights(network, Path(self.preprocessed_dataset_folder_base), self.start_entry)
                self.start_source = "transfer"
        method.adapt(network)
        self.training_plan = method.plan(network)
        self.training_plan.restrict(network)
        if method.recompute:
            recompute(stages(network))
        self.audit = audit_on_small_patch(network, self.num_input_channels, self.configuration_manager.patch_size)
        self.print_to_log_file(f"{self.run_method}\n{self.audit}\n{self.training_plan.table()}", add_timestamp=False)
        self._warn_of_new_channels(network)
        self.training_plan.set_stage(0)
        self._listening = network.register_load_state_dict_post_hook(self._weights_were_loaded)
        optimizer = torch.optim.AdamW(self.training_plan.optimiser_groups(), lr=method.lr,
                                      weight_decay=0.0 if method.l2_sp else method.weight_decay)
        return optimizer, WarmupPolyLR(optimizer, initial_lr=method.lr, epochs=method.epochs,
                                       warmup_epochs=method.warmup_epochs)

    def _warn_of_new_channels(self, network: nn.Module) -> None:
        channels = (self.start_entry or {}).get("channel_map", {})
        new = [name for name, known in channels.items() if known is None]
        if new and not any(p.requires_grad for module in stem_modules(network) for p in module.parameters()):
            self.print_to_log_file(f"WARNING: the donor does not know the channels {', '.join(new)}, and this method "
                                   f"never trains the stem that reads them; they cannot be learned.")

    def _weights_were_loaded(self, *_: object) -> None:
        self.start_source = "-pretrained_weights"

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:
        """Mirror in augmentation and prediction only along axes that both the transfer and the stock trainer allow."""
        rotation, dummy_2d, patch_size, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        chosen = (self.start_entry or {}).get("mirroring_axes")
        if chosen is not None:  # None: the donor's checkpoint did not tell its axes
            axes = tuple(axis for axis in axes or () if axis in chosen) or None
            self.inference_allowed_mirroring_axes = axes
        return rotation, dummy_2d, patch_size, axes

    def on_train_start(self) -> None:
        """Score the start weights before the first step; after --c, restore the state of the random numbers."""
        super().on_train_start()
        self._listening.remove()
        if self.resume_random_state is not None:
            if not self.is_ddp:  # the state is rank 0's: under DDP all ranks would draw the same patches
                restore_random_state(self.resume_random_state)
            return
        if self.run_method.uses_start_weights and self.start_source == "random":
            raise ConfigurationError(
                f"{type(self).__name__} fine-tunes, but the plans {self.plans_manager.plans_name!r} hold no start "
                f"weights for configuration {self.configuration_name!r} and no -pretrained_weights was given. Run "
                f"`nnunet-dante transfer MODEL -d {self.plans_manager.dataset_name} -c {self.configuration_name}` and "
                f"train with -p nnUNetDantePlans, or train with nnUNetTrainerFromScratch.")
        if isinstance(self.run_method, ParameterEfficient):
            self._remember_base()
        self._score_before_training()

    def _remember_base(self) -> None:
        """Keep the start values of everything that will change, for the adapter."""
        state = self.bare_network.state_dict()
        trained = [name for group in self.training_plan.groups for name, _ in group.parameters]
        statistics = [f"{prefix}.{name}" for prefix, module in self.bare_network.named_modules()
                      if isinstance(module, _NormBase) for name, _ in module.named_buffers(recurse=False)]
        self.base = {name: state[name].detach().cpu().clone()
                     for name in [*adapted(self.bare_network), *trained, *statistics] if name in state}
        self.base_sha256 = weights_sha256(state)

    def _score_before_training(self) -> None:
        """Validate the start weights as nnU-Net validates an epoch, and save them as the first checkpoint_best."""
        mean, self.start_dice = self.validation_dice()
        self.print_to_log_file(f"Pseudo dice before training: {mean:.4f}",
                               {name: round(d, 4) for name, d in self.start_dice.items()})
        self._best_ema = mean if mean == mean else None
        self.set_aside()
        self.keep_start()
        self.save_after(self.current_epoch, "checkpoint_best.pth")

    def validation_dice(self) -> tuple[float, dict[str, float]]:
        """Return nnU-Net's pseudo Dice of the network as it is, mean and by label; the log does not show it."""
        logger, self.logger = self.logger, LocalLogger()
        with torch.no_grad():
            self.on_validation_epoch_start()
            self.on_validation_epoch_end([self.validation_step(next(self.dataloader_val))
                                          for _ in range(self.num_val_iterations_per_epoch)])
        scored, self.logger = self.logger, logger
        mean = float(scored.get_value("mean_fg_dice", step=-1))
        dice = scored.get_value("dice_per_class_or_region", step=-1)
        return mean, dict(zip(self.foreground_names, map(float, dice)))

    @property
    def foreground_names(self) -> list[str]:
        """The names of labels or regions in the order of nnU-Net's Dice list."""
        return [name for name in head_names(self.dataset_json) if name != "background"]

    def on_train_epoch_start(self) -> None:
        """Enter the stage of this epoch; frozen norms do not change their running statistics."""
        stage = self.training_plan.schedule.stage(self.current_epoch)
        if self.training_plan.set_stage(self.current_epoch):
            self._renew_wrappers()
        super().on_train_epoch_start()
        self.print_to_log_file("Trained groups:", ", ".join(stage.trainable))
        for module in self.bare_network.modules():
            if isinstance(module, _NormBase) and not any(p.requires_grad for p in module.parameters()):
                module.eval()

    def _renew_wrappers(self) -> None:
        """Make dynamo and DDP use the new set of trainable parameters, which they do not notice by themselves."""
        torch._dynamo.reset()
        if isinstance(self.network, DistributedDataParallel):
            devices = [self.local_rank] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network.module, device_ids=devices)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return nnU-Net's split; refuse a fold that is not in splits_final.json, where it would draw one at random."""
        file = Path(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold != "all" and file.is_file() and self.fold >= (n := len(load_json(str(file)))):
            raise ConfigurationError(f"fold {self.fold} is not in {file}, which holds folds 0 to {n - 1}; train one "
                                     f"of these, or `all`.")
        split = super().do_split()
        special = {"rehearsed": self.rehearsal.get("cases", []), "partly drawn": [
            f"{case}: {', '.join(sorted(names))}" for case, names in self.undrawn.items()]}
        self.cases = self.cases or {use: describe_cases(names) for use, names in (
            *zip(("training", "validation"), split), *special.items()) if names or use not in special}
        return split

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint with the stock trainer's name and the "dante" block, atomically."""
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)  # type: ignore[arg-type]
        if buffer.tell() == 0:  # not rank 0, or checkpointing is disabled
            return
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
        self.refuse_not_finite(unique_tensors(checkpoint["network_weights"]), filename)
        checkpoint["trainer_name"] = self.stock_trainer_name
        checkpoint["dante"] = provenance(self) | {"random_state": random_state()}
        save_atomically(checkpoint, filename)

    @property
    def stock_trainer_name(self) -> str:
        """The trainer to name in checkpoints. Prediction looks it up, so it must not belong to this package."""
        return next(c.__name__ for c in type(self).__mro__
                    if issubclass(c, nnUNetTrainer) and not issubclass(c, DanteMixin))

    def initialize_for_checkpoint(self) -> None:
        """Build the network for the weights of a checkpoint; for --val, the start weights are not needed."""
        if not self.was_initialized:
            self.weights_from_checkpoint = not self.logger.resume
            self.initialize()

    def load_checkpoint(self, file: str, /) -> None:
        """Load a checkpoint. After --c, the training continues as if it had not stopped, or it is refused."""
        checkpoint = self.read_checkpoint(file)
        self.initialize_for_checkpoint()
        if self.logger.resume:  # --c; validation (--val) takes the weights as they are
            self.do_split()
            refuse_changes(checkpoint, file, method=self.run_method, plans=self.plans_manager.plans,
                           dataset_json=self.dataset_json, steps=self.steps, cases=self.cases,
                           mirroring_axes=self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1])
        super().load_checkpoint(file)  # by position: nnU-Net has renamed this argument
        dante = checkpoint.get("dante", {})
        if self.logger.resume:  # validation takes the weights as they are, at the strength that was chosen
            self.bare_network.load_state_dict(trained_weights(checkpoint))
        if self.logger.resume and (adapter := dante.get("adapter")):
            self.base, self.base_sha256 = adapter["base"], dante["base_sha256"]
            load_split(self.bare_network, base={name: self.base[name] for name in adapted(self.bare_network)},
                       factors=adapter["factors"])
        self.start_dice, self.start_source = dante.get("start_dice", {}), dante.get("start_source", "unknown")
        self.resume_random_state, self.resumed_penalty = dante.get("random_state"), dante.get("penalty")
        self.kept_strength = dante.get("strength")
        self.keep_best()

    def on_train_end(self) -> None:
        """Write the adapter beside checkpoint_final."""
        super().on_train_end()
        final = Path(self.output_folder, "checkpoint_final.pth")
        if isinstance(self.run_method, ParameterEfficient) and self.local_rank == 0 and not self.disable_checkpointing:
            extract(final, final.with_name("adapter.safetensors"))
