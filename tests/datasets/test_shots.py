"""shots.py: folds are nested, different, disjoint from validation and test, and never replaced unasked."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from nnunet_dante.cli import main
from nnunet_dante.datasets.shots import Fold, draw_shots, read_cases, read_groups, read_shots, write_shots
from nnunet_dante.errors import ConfigurationError


def names(n: int) -> list[str]:
    return [f"case_{i:03d}" for i in range(n)]


@st.composite
def asked(draw):
    """Cases in groups, of which whole groups are kept for the test and at least two groups are left."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=12))
    n_test = draw(st.integers(0, len(sizes) - 2))
    numbers = iter(range(sum(sizes)))
    groups = {f"p{g}": [f"case_{next(numbers):03d}" for _ in range(size)] for g, size in enumerate(sizes)}
    return {"cases": names(sum(sizes)), "groups": groups, "seeds": draw(st.integers(1, 5)),
            "test": [c for g in list(groups)[:n_test] for c in groups[g]]}


@given(asked())
def test_sets_are_disjoint_by_group_nested_and_written_once(options):
    pool = draw_shots(shots=["all"], **options).pool
    drawn = draw_shots(shots=[*range(1, len(pool) + 1), "all"], **options)
    group = {case: g for g, cases in options["groups"].items() for case in cases}
    parts = [{group[c] for c in part} for part in (drawn.val, drawn.test, drawn.pool)]
    assert sum(map(len, parts)) == len(set.union(*parts))
    assert sorted([*drawn.val, *drawn.test, *drawn.pool]) == options["cases"] and drawn.val and drawn.pool
    assert [f.fold for f in drawn.folds] == list(range(len(drawn.folds)))
    assert len({frozenset(f.train) for f in drawn.folds}) == len(drawn.folds)
    for f in drawn.folds:
        assert len(f.train) == f.shots and set(f.train) <= set(pool) and f.all == (f.shots == len(pool))
    by_seed = {(f.shots, f.seed): set(f.train) for f in drawn.folds}
    for (k, seed), train in by_seed.items():
        assert all(train <= larger for (more, s), larger in by_seed.items() if s == seed and more > k)


@given(st.integers(2, 40), st.integers(1, 6))
def test_a_draw_depends_on_nothing_but_its_seed_and_k(n, seeds):
    few = draw_shots(names(n), [1], seeds=seeds)
    many = draw_shots(reversed(names(n)), [1, "all"], seeds=seeds + 2)
    assert few.val == many.val and few.pool == many.pool
    assert {(f.seed, f.train) for f in few.folds} <= {(f.seed, f.train) for f in many.folds if f.shots == 1}


@given(st.integers(6, 60), st.integers(2, 4))
def test_seeds_differ_wherever_the_pool_allows(n, seeds):
    pool = draw_shots(names(n), [1]).pool
    drawn = draw_shots(names(n), range(1, len(pool)), seeds=seeds)
    assert len(drawn.folds) == (len(pool) - 1) * seeds and drawn.notes == ()


def test_folds_are_the_same_everywhere():
    drawn = draw_shots(names(10), [1, 2], seeds=2)  # pinned: a change would make every published table another one
    assert drawn.val == ("case_005", "case_008")
    assert [f.train for f in drawn.folds] == [("case_009",), ("case_001",), ("case_003", "case_009"), ("case_001", "case_009")]


def test_one_case_validates_on_itself_and_says_so():
    drawn = draw_shots(["a"], [1, "all"])
    assert drawn.splits() == [{"train": ["a"], "val": ["a"]}]
    assert "a is the only case, so validation is on the training case" in str(drawn)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_cases_leave_one_for_validation(n):
    drawn = draw_shots(names(n), ["all"])
    assert len(drawn.val) == 1 and len(drawn.pool) == n - 1 and len(drawn.folds) == 1
    assert drawn.folds == (Fold(fold=0, shots=n - 1, all=True, seed=0, train=drawn.pool),)


def test_a_pool_too_small_for_different_draws_says_so():
    drawn = draw_shots(names(3), [1, 2], seeds=3)
    assert [f.shots for f in drawn.folds] == [1, 1, 2]
    assert "1 of a pool of 2: 3 seeds give only 2 different, each written once" in str(drawn)


@pytest.mark.parametrize(("shots", "options", "said"), [
    ([9], {}, "-k 9 is not possible: the pool has 8 cases .10 cases, 2 for validation, 0 for the test.*1 to 8.*all"),
    ([0], {}, "-k 0"), ([], {}, "names no number"), (["many"], {}, "-k many"),
    ([1], {"seeds": 0}, "--seeds is 0"), ([1], {"val": 10}, "--val is 10; of 10 cases outside the test, 1 to 9"),
    ([1], {"test": ["case_3"]}, "--test names case_3, which imagesTr does not hold.*such as case_000"),
    ([1], {"test": names(10)}, "names all 10 cases"),
    ([1], {"groups": {"p": ["x"]}}, "--groups names x"),
    ([1], {"groups": {"p": ["case_001"], "q": ["case_001"]}}, "case_001 is in group p and in group q"),
    ([1], {"groups": {"p": ["case_001", "case_002"]}, "test": ["case_001"]}, "names case_001 but not case_002, .*group p"),
    ([1], {"groups": {"p": names(10)}}, "all 10 cases outside the test are of one group p")])
def test_what_cannot_be_is_refused(shots, options, said):
    with pytest.raises(ConfigurationError, match=said):
        draw_shots(names(10), shots, **options)


def test_validation_takes_the_number_asked_for_as_nearly_as_groups_allow():
    assert len(draw_shots(names(10), [1], val=4).val) == 4
    pairs = {f"p{i}": names(10)[2 * i:2 * i + 2] for i in range(5)}
    assert len(draw_shots(names(10), [1], val=3, groups=pairs).val) == 2
    assert len(draw_shots(names(10), [1], val=1, groups=pairs).val) == 2


@pytest.fixture
def preprocessed(nnunet_paths):
    return nnunet_paths["nnUNet_preprocessed"] / tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=6)


def run(*arguments: str):
    return CliRunner().invoke(main, ["shots", "-d", "901", *arguments])


@pytest.mark.parametrize("spelling", [["-k", "1,2,all"], ["-k", "1", "-k", "2", "-k", "all"],
                                      ["-k", "1, 2", "--seeds", "3", "-k", "all"]])
def test_command_writes_folds_and_their_table(preprocessed, spelling):
    done = run(*spelling)
    assert done.exit_code == 0, done.output
    splits = json.loads((preprocessed / "splits_final.json").read_text())
    table = json.loads((preprocessed / "shots.json").read_text())
    assert [{"train": f["train"], "val": table["val"]} for f in table["folds"]] == splits
    assert set(table) == {"format", "dataset", "seed_count", "val", "test", "pool", "folds", "notes"}
    assert (table["format"], table["dataset"], table["seed_count"]) == (1, "Dataset901_Tiny", 3)
    assert [f["shots"] for f in table["folds"]] == [1, 1, 1, 2, 2, 2, 5]
    assert "   6      5     0  " in done.output and "(the whole pool)" in done.output


def test_command_reads_groups_and_test(preprocessed, tmp_path):
    (tmp_path / "test.txt").write_text("case_000\ncase_001\n")
    (tmp_path / "groups.csv").write_text("case_000,p\ncase_001,p\ncase_002,q\ncase_003,q\n")
    done = run("-k", "1", "--test", str(tmp_path / "test.txt"), "--groups", str(tmp_path / "groups.csv"))
    assert done.exit_code == 0, done.output
    table = json.loads((preprocessed / "shots.json").read_text())
    assert table["test"] == ["case_000", "case_001"] and len({"case_002", "case_003"} & set(table["val"])) != 1


def test_command_refuses_what_is_no_number(preprocessed):
    done = run("-k", "1,two")
    assert done.exit_code == 2 and "'two' is neither a number nor the word all" in done.output


def test_numbers_apart_from_one_another_are_refused_with_the_spelling_that_works(preprocessed):
    done = run("-k", "1", "2", "all")
    assert done.exit_code == 2 and "with commas and without spaces: --shots 1,2,all" in " ".join(done.output.split())


def test_the_table_is_read_back_also_without_notes_as_0_1_0_wrote_it(preprocessed):
    drawn = write_shots(901, [1, "all"])
    path = preprocessed / "shots.json"
    assert read_shots(path) == drawn
    old = {key: value for key, value in json.loads(path.read_text()).items() if key != "notes"}
    path.write_text(json.dumps(old))
    assert read_shots(path).folds == drawn.folds


@pytest.mark.parametrize("change", [{"folds": [{"fold": "x"}]}, {"val": 3}, {"test": [1]}, {"format": 2}])
def test_a_table_of_another_form_is_named(preprocessed, change):
    write_shots(901, [1])
    path = preprocessed / "shots.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigurationError, match=r"shots\.json"):
        read_shots(path)


@pytest.mark.parametrize("there", ['[{"train": ["case_000"], "val": ["case_001"]}]', "no JSON"])
def test_other_folds_are_replaced_only_when_told(preprocessed, there):
    preprocessed.mkdir()
    (preprocessed / "splits_final.json").write_text(there)
    with pytest.raises(ConfigurationError, match=r"splits_final.json exists and holds other folds.*--force"):
        write_shots(901, [1])
    assert (preprocessed / "splits_final.json").read_text() == there
    assert not (preprocessed / "shots.json").exists()
    write_shots(901, [1], force=True)
    written = (preprocessed / "splits_final.json").read_text()
    write_shots(901, [1])
    assert (preprocessed / "splits_final.json").read_text() == written
    with pytest.raises(ConfigurationError, match="other folds"):
        write_shots(901, [1, 2])


def test_nnunet_trains_on_the_folds_written(preprocessed):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    drawn = write_shots(901, [2], seeds=2)
    trainer = object.__new__(nnUNetTrainer)
    trainer.fold, trainer.preprocessed_dataset_folder_base = 1, str(preprocessed)
    trainer.preprocessed_dataset_folder = trainer.folder_with_segs_from_previous_stage = None
    trainer.print_to_log_file = lambda *_, **__: None
    trainer.dataset_class = lambda *_, **__: SimpleNamespace(identifiers=names(6))
    assert tuple(map(tuple, trainer.do_split())) == (drawn.folds[1].train, drawn.val)


GROUPS = {"p1": ["a", "b"], "p2": ["c"]}


@pytest.mark.parametrize(("name", "text"), [
    ("groups.json", json.dumps(GROUPS)), ("groups.csv", "case,group\na,p1\nb, p1\n\nc,p2\n"),
    ("groups.csv", "\ufeffa,p1\nb,p1\nc,p2"), ("groups.csv", 'Case,Group\r\n"a",p1\r\nb,p1\r\nc,p2\r\n')])
def test_groups_from_json_and_csv(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_groups(tmp_path / name) == GROUPS


@pytest.mark.parametrize(("name", "text"), [("cases.json", '["a", "b"]'), ("cases.txt", "a\n\n b \n")])
def test_cases_from_json_and_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_cases(tmp_path / name) == ["a", "b"]


@pytest.mark.parametrize(("name", "text", "said"), [
    ("groups.json", '["a"]', "groups.json must hold"), ("groups.json", '{"p": "a"}', "must hold"),
    ("groups.json", "{", "must hold"), ("groups.csv", "a,p1\nb", "holds the line 'b'"),
    ("groups.csv", "a,p1,x", "a,p1,x"), ("groups.csv", "a,", "'a,'")])
def test_groups_of_another_form(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        read_groups(tmp_path / name)


def test_cases_of_another_form_or_missing(tmp_path):
    (tmp_path / "cases.json").write_text('{"a": 1}')
    with pytest.raises(ConfigurationError, match="cases.json must hold a list"):
        read_cases(tmp_path / "cases.json")
    with pytest.raises(ConfigurationError, match=r"--test: .*nothing.txt cannot be read"):
        read_cases(tmp_path / "nothing.txt")
