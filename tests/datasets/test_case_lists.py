"""case_lists.py: both file forms say the same, and a file of another form is refused by name."""

from __future__ import annotations

import json

import pytest

from nnunet_dante.datasets.case_lists import read_cases, read_groups
from nnunet_dante.errors import ConfigurationError

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
