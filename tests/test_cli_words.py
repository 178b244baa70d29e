"""cli_words.py: a list without commas gets its right spelling, and wrong words cost no import of torch."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from nnunet_dante.cli import main


def said(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 2
    return " ".join(done.output.split())


@pytest.fixture
def model(tmp_path):
    (tmp_path / "data").mkdir()
    file = tmp_path / "model.pth"
    file.touch()
    return file


@pytest.mark.parametrize(("words", "right"), [
    (["adapt", "MODEL", "DATA", "-o", "OUT", "--labels", "a=1", "b=2", "c=3"], "--labels a=1,b=2,c=3"),
    (["adapt", "--labels", "a=1", "b=2", "MODEL", "DATA", "-o", "OUT"], "--labels a=1,b=2"),
    (["adapt", "MODEL", "--labels", "a=1", "b=2", "DATA", "-o", "OUT"], "--labels a=1,b=2"),
    (["adapt", "MODEL", "DATA", "-o", "OUT", "--channels", "T1", "T2"], "--channels NAME,..."),
    (["adapt", "MODEL", "DATA", "-o", "OUT", "--set", "lr=1", "rank=4"], "--set lr=1 --set rank=4"),
    (["transfer", "MODEL", "-d", "1", "--rename", "a=b", "c=d"], "--rename a=b --rename c=d"),
    (["transfer", "MODEL", "-d", "1", "--keep-labels", "a", "b"], "--keep-labels NAME,..."),
    (["shots", "-d", "1", "-k", "1", "2", "all"], "--shots 1,2,all"),
    (["dataset", "DATA", "-d", "1", "-n", "A", "--channels", "T1", "T2"], "--channels NAME,..."),
    (["adapter", "merge", "MODEL", "MODEL", "-o", "x.safetensors", "--weights", "0.7", "0.3"], "--weights 0.7,0.3"),
    (["federate", "new", "F", "--donor", "MODEL", "--labels", "a", "b"], "--labels NAME,..."),
    (["export", "MODEL", "-o", "x.model", "--info", "a=1", "b=2"], "--info a=1 --info b=2"),
])
def test_a_list_with_spaces_gets_its_right_spelling(model, words, right):
    places = {"MODEL": model, "DATA": model.parent / "data"}
    assert said(*(places.get(word, word) for word in words)).endswith(right)


def test_other_wrong_words_get_no_hint(model):
    message = said("adapt", model, "nowhere", "-o", "OUT", "--labels", "a=1", "--channels", "CT")
    assert message.endswith("Directory 'nowhere' does not exist.")


def _options(command: click.Command):
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)
    yield from (option for option in command.params if isinstance(option, click.Option))


def test_every_option_with_values_in_pairs_or_lists_is_one_of_several(model):
    named = [o for o in _options(main) if "=" in (o.metavar or "") or "," in (o.metavar or "")]
    assert len(named) > 10 and all(o.multiple or "," in o.metavar for o in named)


@pytest.mark.parametrize("words", [
    ["adapt", "NO_MODEL", ".", "-o", "OUT"], ["adapt", __file__, "NO_FOLDER", "-o", "OUT"],
    ["adapt", __file__, ".", "-o", "OUT", "--groups", "NO_FILE"], ["transfer", "NO_MODEL", "-d", "1"],
    ["predict", "NO_MODEL", ".", "-o", "OUT"], ["suggest", "-d", "1", "--from", "NO_MODEL"], ["inspect", "NO_MODEL"],
    ["export", "NO_MODEL", "-o", "x.model"], ["federate", "new", "F", "--donor", "NO_MODEL"],
    ["shots", "-d", "1", "-k", "one"], ["shots", "-d", "1", "-k", "1", "--groups", "NO_FILE"],
    ["transfer", __file__, "-d", "1", "--rename", "a"], ["export", __file__, "-o", "x.model", "--info", "a"],
    ["adapter", "merge", __file__, "-o", "x", "--weights", "a,b"],
], ids=" ".join)
def test_wrong_words_are_refused_before_torch_is_imported(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = ("import sys; from nnunet_dante.cli import main\ntry: main(sys.argv[1:])\n"
            "finally: assert not {'torch', 'nnunetv2'} & set(sys.modules), 'imported'")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and "imported" not in done.stderr, done.stderr
