from __future__ import annotations

import pytest

from nnunet_dante.benchmark.protocol import METHODS, PlannedRun, planned_runs, read_protocol, settings_digest
from nnunet_dante.datasets.shots import Fold, Shots
from nnunet_dante.errors import ConfigurationError

SHOTS = Shots(dataset="Dataset901_Mine", seed_count=2, val=("v",), test=("t",), pool=("a", "b", "c", "d"), folds=(
    Fold(fold=0, shots=1, all=False, seed=0, train=("a",)), Fold(fold=1, shots=1, all=False, seed=1, train=("b",)),
    Fold(fold=2, shots=4, all=True, seed=0, train=("a", "b", "c", "d"))))
TEXT = """
name = "p"
[[experiments]]
name = "Real shift"
dataset = 901
donor = "donor.pth"
"""
LORA = '[[methods]]\nname = "LoRA"\ntrainer = "nnUNetTrainerLoRA"\nset = {rank = 4}\n'


@pytest.fixture
def written(tmp_path):
    (tmp_path / "donor.pth").touch()

    def write(text):
        file = tmp_path / "p.toml"
        file.write_text(text)
        return file
    return write


def runs(protocol):
    return list(planned_runs(protocol, {e.name: SHOTS for e in protocol.experiments}))


def test_the_smallest_protocol_compares_all_methods_with_everything_that_was_drawn(written, tmp_path):
    protocol = read_protocol(written(TEXT))
    assert protocol.methods == METHODS
    assert protocol.experiments[0].donor == str(tmp_path / "donor.pth")
    planned = runs(protocol)
    assert len(planned) == 1 + 3 * (len(METHODS) - 1)
    assert len({run.id for run in planned}) == len(planned)


def test_zero_shot_comes_first_and_is_there_without_being_asked_for(written):
    planned = runs(read_protocol(written(TEXT + LORA)))
    assert [(r.method.name, r.fold) for r in planned] == [("zero-shot", None), ("LoRA", 0), ("LoRA", 2), ("LoRA", 1)]


@pytest.mark.parametrize(("choice", "folds"), [
    ("shots = [1]", {0, 1}), ('shots = ["all"]', {2}), ("shots = [4]", {2}), ("seeds = [1]", {1}),
    ("shots = [1]\nseeds = [0]", {0})])
def test_shots_and_draws_can_be_chosen(written, choice, folds):
    planned = runs(read_protocol(written(choice + TEXT + LORA)))
    assert {r.fold for r in planned if r.fold is not None} == folds


@pytest.mark.parametrize(("text", "message"), [
    ("name = [", "TOML"),
    ("a." * 200 + "b = 1", "100 dots in a line"),
    ('name = "p"', "no \\[\\[experiments\\]\\]"),
    (TEXT.replace("donor.pth", "gone.pth"), "gone.pth, which does not exist"),
    (TEXT.replace("dataset = 901", ""), "missing required field `dataset` - at `\\$.experiments\\[0\\]`, in {'name': 'Real shift'"),
    (TEXT + "colour = 1", "unknown field `colour`.* An \\[\\[experiments\\]\\] table may have name, dataset, donor, "),
    (TEXT + "simulated = 1", "Expected `bool`, got `int` - at `\\$.experiments\\[0\\].simulated`, in 1"),
    ('tolerance_mm = "wide"' + TEXT, "tolerance_mm`, in 'wide'"),
    ("tolerance_mm = -1.0" + TEXT, "tolerance_mm"),
    ('shots = ["few"]' + TEXT, "shots"),
    ("experiments = 3", "Expected `array`, got `int` - at `\\$.experiments`, in 3"),
    ('tolerance_mm = inf' + TEXT, "tolerance_mm"),
    (TEXT + LORA.replace("4", "1979-05-27"), "methods\\[0\\].set"),
    (TEXT + LORA + LORA, "two methods are named 'lora'"),
    (TEXT + '[[methods]]\nname = "mine"', "'mine' names no trainer")])
def test_a_wrong_protocol_is_refused_by_name(written, text, message):
    with pytest.raises(ConfigurationError, match=message):
        read_protocol(written(text))


@pytest.mark.parametrize(("strength", "same"), [("strength = 1", True), ("", False), ("strength = 0.5", False)])
def test_results_of_version_0_1_0_go_on_where_all_that_was_learned_is_kept(written, strength, same):
    """The digests were written by 0.1.0, which kept all: with any other strength its results may not be mixed in."""
    protocol = read_protocol(written(f"""
name = "p"
tolerance_mm = 2
mirroring = true
[training]
epochs = 50
lr = 0.01
{strength}
[[experiments]]
name = "Real shift"
dataset = "Dataset901_Mine"
donor = "donor.pth"
invert = ["MRI"]
simulated = true
[[methods]]
name = "LoRA 4"
trainer = "nnUNetTrainerLoRA"
set = {{rank = 4, ranks = {{"decoder.*" = 2}}, targets = ["encoder"], full_decoder = true}}
"""))
    cases = {"train": ["a"], "val": ["v"], "test": ["t"]}
    assert ({run.id: settings_digest(run, protocol, cases) for run in runs(protocol)[:2]} == {
        "real-shift__zero-shot__k000__s0": "c28ea64999e0c907", "real-shift__lora-4__k001__s0": "623a63a08544079b"}) is same


def test_the_digest_changes_with_what_decides_a_result_and_not_with_paths(written):
    protocol = read_protocol(written(TEXT + LORA))
    run, cases = runs(protocol)[1], {"train": ["a"]}
    same = settings_digest(run, protocol, cases)
    assert settings_digest(run, read_protocol(written("keep_checkpoints = true" + TEXT + LORA)), cases) == same
    for other in (settings_digest(run, protocol, {"train": ["b"]}),
                  settings_digest(run, read_protocol(written(TEXT + LORA + "[training]\nepochs = 2")), cases),
                  settings_digest(runs(read_protocol(written(TEXT + 'geometry = "target"\n' + LORA)))[1], protocol, cases),
                  settings_digest(runs(read_protocol(written(TEXT + LORA.replace("4", "5"))))[1], protocol, cases)):
        assert other != same
    assert isinstance(run, PlannedRun)
