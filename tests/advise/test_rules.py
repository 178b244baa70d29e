"""rules.py: each situation gets the trainer that its literature names, and every rule can be reached."""

from __future__ import annotations

import pytest

from nnunet_dante.advise.rules import FEW, HOLDS, INPUT_SIDE, MANY, OUTPUT_SIDE, RULES, Situation, choose
from nnunet_dante.training import trainers


def situation(**changes) -> Situation:
    usual = {"cases": 4, "known": ("organ",), "new": (), "zero_shot": 0.9, "zero_shot_inverted": 0.1, "gradient_ratio": 1.1}
    return Situation(**(usual | changes))


CASES = [
    ({}, "HeadOnly", True, "output_first"),
    ({"zero_shot": HOLDS, "cases": FEW}, "HeadOnly", True, "output_first"),
    ({"cases": FEW + 1}, "LoRADecoder", False, "output_first"),
    ({"zero_shot": 0.05, "zero_shot_inverted": 0.8, "gradient_ratio": 0.6}, "LoRA", False, "input_first"),
    ({"zero_shot": 0.05, "zero_shot_inverted": 0.8, "cases": 100}, "LoRA", False, "input_first"),
    ({"cases": MANY}, "FineTune", False, "output_first"),
    ({"zero_shot": 0.5, "gradient_ratio": INPUT_SIDE}, "LoRA", False, "input_first"),
    ({"zero_shot": 0.5, "gradient_ratio": OUTPUT_SIDE}, "DecoderOnly", False, "output_first"),
    ({"zero_shot": 0.5}, "LoRA", False, "output_first"),
    ({"new": ("vessel",)}, "DecoderOnly", False, "output_first"),
    ({"new": ("vessel",), "zero_shot": 0.3, "gradient_ratio": 2.0}, "LoRA", False, "input_first"),
    ({"new_channels": ("T2",)}, "LoRA", False, "input_first"),
    ({"new": ("a",), "known": (), "zero_shot": None, "zero_shot_inverted": None, "gradient_ratio": None}, "DecoderOnly",
     False, "output_first"),
]


@pytest.mark.parametrize(("changes", "trainer", "keep", "order"), CASES)
def test_situation_and_its_trainer(changes, trainer, keep, order):
    rule = choose(situation(**changes))
    assert (rule.trainer, rule.keep, rule.order) == (f"nnUNetTrainer{trainer}", keep, order)


def test_every_rule_is_reached_and_names_a_trainer_and_its_source():
    assert {id(choose(situation(**changes))) for changes, *_ in CASES} == {id(rule) for rule in RULES}
    assert all(hasattr(trainers, rule.trainer) and rule.source and rule.rank > 0 for rule in RULES)


def test_a_donor_that_does_well_either_way_is_not_called_inverted():
    assert not situation(zero_shot=0.7, zero_shot_inverted=0.8).inverted
    assert not situation(zero_shot=None, zero_shot_inverted=None).inverted
