"""From a measured situation to a method: few rules, as data, each with its reason and its source.

The borders between situations are choices of this package, not facts. They come from:

- FEW, MANY: FSEFT (Silva-Rodriguez 2025) studied 1 to 10 cases, MedSeqFT dozens and more.
- HOLDS: lies between the mild and the severe shift that were measured (docs/few-shot.md); where exactly is a guess.
- INPUT_SIDE, OUTPUT_SIDE: benchmarks/results/gradient_side.json, of one hippocampus donor: 1.2 to 1.6 without a change,
  1.2 to 3.0 with blur, noise, gamma or bias field that lower Dice below HOLDS, 0.75 to 1.01 with labels swapped,
  widened or narrowed. Inverted contrast gives 1.0 to 1.1, so this ratio cannot show it.
- INVERTED: in the same measurements, exchanging bright and dark gives Dice 0.79 to 0.85 where contrast is inverted, and
  at most 0.05 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FEW, MANY = 5, 24
HOLDS = 0.75
INPUT_SIDE, OUTPUT_SIDE = 1.2, 1.0
INVERTED = 0.3


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What was measured.

    cases: number of training cases.
    known, new: labels that the donor has, and those that it does not have.
    new_channels: channels that the donor does not have, if it has others of the data set.
    zero_shot: mean Dice of the known labels before training; None if no label is known.
    zero_shot_inverted: the same on images whose bright and dark are exchanged.
    gradient_ratio: mean of ||g|| / ||w|| over the encoder's groups, divided by that over the decoder's. None if no
        label is known: then all rows of the head are alike and let no gradient through.
    """

    cases: int
    known: tuple[str, ...]
    new: tuple[str, ...]
    zero_shot: float | None
    zero_shot_inverted: float | None
    gradient_ratio: float | None
    new_channels: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the donor does well on the known labels."""
        return self.zero_shot is not None and self.zero_shot >= HOLDS

    @property
    def inverted(self) -> bool:
        """Whether the donor does much better with bright and dark exchanged."""
        return (self.zero_shot or 0) + INVERTED <= (self.zero_shot_inverted or 0)

    @property
    def input_side(self) -> bool:
        """Whether the gradients say that the images changed."""
        return self.gradient_ratio is not None and self.gradient_ratio >= INPUT_SIDE

    @property
    def output_side(self) -> bool:
        """Whether the gradients say that the labels changed."""
        return self.gradient_ratio is not None and self.gradient_ratio <= OUTPUT_SIDE


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to train in the situations for which `applies` is true.

    trainer: class name. rank: of the low-rank factors, for trainers that have them. order: in which the network opens,
    for trainers that open it in stages. reason, source: why, and the work that found it.
    keep: use the donor without training; `trainer` changes least, for those who want to train nevertheless.
    """

    applies: Callable[[Situation], bool]
    trainer: str
    reason: str
    source: str
    keep: bool = False
    rank: int = 8
    order: str = "output_first"


RULES = (
    Rule(applies=lambda s: s.inverted, trainer="nnUNetTrainerLoRA", rank=16, order="input_first",
         reason="bright and dark are exchanged between the donor's images and yours: the change is at the input, and "
                "a start that exchanges them back (--invert) is worth more than any method",
         source="Lee 2023 (input shift: first layers); AC-Norm (norm affine carries the domain; LoRA here trains norms "
                "and stem in full)"),
    Rule(applies=lambda s: s.cases >= MANY, trainer="nnUNetTrainerFineTune",
         reason=f"{MANY} cases or more carry the training of all weights", source="MedSeqFT"),
    Rule(applies=lambda s: bool(s.new_channels), trainer="nnUNetTrainerLoRA", rank=16, order="input_first",
         reason="your data set has channels that the donor does not know: they start without effect, and only a method "
                "that trains the first layer can use them",
         source="docs/reference.md, Surgery (LoRA here trains the first layer in full)"),
    Rule(applies=lambda s: bool(s.new) and not s.holds and s.input_side, trainer="nnUNetTrainerLoRA", rank=16,
         order="input_first",
         reason="labels are new, and your images look otherwise than the donor's: encoder and decoder must change",
         source="FSEFT (new organs: the decoder too); Lee 2023 (input shift: first layers)"),
    Rule(applies=lambda s: bool(s.new), trainer="nnUNetTrainerDecoderOnly",
         reason="labels are new, and nothing shows that your images look otherwise than the donor's",
         source="FSEFT (new organs: the decoder too); Karimi 2021 (decoder alone is a strong baseline)"),
    Rule(applies=lambda s: s.holds and s.cases <= FEW, trainer="nnUNetTrainerHeadOnly", keep=True,
         reason=f"the donor does well on your images, and training on {FEW} cases or fewer can make it worse",
         source="FSEFT (known organs: linear probe suffices)"),
    Rule(applies=lambda s: s.holds, trainer="nnUNetTrainerLoRADecoder",
         reason="the donor does well on your images: few weights need to change",
         source="FSEFT (known organs: few trained numbers suffice)"),
    Rule(applies=lambda s: s.output_side, trainer="nnUNetTrainerDecoderOnly",
         reason="gradients are largest in the decoder: your labels seem to be drawn otherwise than the donor's",
         source="Lee 2023 (output shift: last layers); Karimi 2021 (decoder alone is a strong baseline)"),
    Rule(applies=lambda s: s.input_side, trainer="nnUNetTrainerLoRA", rank=16, order="input_first",
         reason="gradients are largest in the encoder: your images look otherwise than the donor's",
         source="Lee 2023 (input shift: first layers); AC-Norm (norm affine carries the domain; LoRA here trains norms "
                "and stem in full); Amiri 2020 (U-Nets for ultrasound: input first)"),
    Rule(applies=lambda s: True, trainer="nnUNetTrainerLoRA", rank=16,
         reason="the donor does badly, and the gradients do not say why: every layer may need a change of low rank",
         source="Minoccheri 2025 (U-Nets, 30 to 124 patients: LoRA above full fine-tuning, higher ranks better)"),
)


def choose(situation: Situation) -> Rule:
    """Return the first of `RULES` that applies; the last one always does."""
    return next(rule for rule in RULES if rule.applies(situation))
