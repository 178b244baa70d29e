"""sources.py: what Dafne's exec makes of the shipped text, and what it would silently spoil."""

from __future__ import annotations

import ast
import inspect
import json
import pickletools
import re
from collections import Counter

import pytest
import tiny
from shipped import settings_of

from nnunet_dante.dafne import sources as module_of_sources
from nnunet_dante.dafne.payload import apply, cases, geometry, learn, network, weights
from nnunet_dante.dafne.sources import function_of, sources
from nnunet_dante.dafne.sources import settings_of as read_settings
from nnunet_dante.errors import DafneError

MODULES = (apply, cases, geometry, learn, network, weights)
ALLOWED = {"__future__", "collections", "copy", "hashlib", "itertools", "math", "time", "traceback", "numpy", "torch",
           "scipy.ndimage", "skimage.transform", "dafne_dl.interfaces"}
FUNCTIONS = {"init_model", "apply_model", "incremental_learn", "weights_to_model", "model_to_weights", "weight_copy",
             "calc_delta", "apply_delta", "factor_multiply"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return settings_of(tiny.write_model_folder(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def shipped(settings):
    return sources(settings)


def test_every_function_of_a_torch_model_is_shipped(shipped):
    assert set(shipped) == {f"{name}_function" for name in FUNCTIONS}


def test_each_source_defines_one_function_when_it_is_run_alone_as_dafne_runs_it(shipped):
    for name, source in shipped.items():
        patched = re.sub("import dl", "import dafne_dl", re.sub("from dl", "from dafne_dl", source))
        assert patched == source
        defined: dict = {}
        exec(source, {"DynamicTorchModel": object}, defined)
        assert [v for v in defined.values() if callable(v)] == [defined[next(k for k in defined if k != "annotations")]], name


def test_functions_take_what_dafne_passes_by_position(shipped):
    counts = {name: len(inspect.signature(function_of(source)).parameters) for name, source in shipped.items()}
    assert counts == {
        "init_model_function": 0, "apply_model_function": 2, "incremental_learn_function": 5,
        "weights_to_model_function": 2, "model_to_weights_function": 1, "weight_copy_function": 1,
        "calc_delta_function": 3, "apply_delta_function": 2, "factor_multiply_function": 2}


def test_what_is_shipped_is_what_the_modules_say(shipped):
    text = "".join(line.strip() for line in shipped["incremental_learn_function"].splitlines())
    for function in (learn.train, apply.window_starts, geometry.normalize, cases.cut):
        assert "".join(line.strip() for line in inspect.getsource(function).splitlines()) in text


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
def test_only_what_every_client_has_is_imported(module):
    nodes = list(ast.walk(ast.parse(inspect.getsource(module))))
    absolute = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    relative = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level}
    assert absolute <= ALLOWED
    assert relative <= {m.__name__.rpartition(".")[2] for m in MODULES} and all(n.level == 1 for n in nodes if isinstance(
        n, ast.ImportFrom) and n.level), "a client has nothing of this package but the payload"


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.split(".")[-1])
def test_the_optimisers_that_abort_a_client_with_tensorflow_are_not_used(module):
    assert not re.search(r"torch\.(optim|compile|_dynamo)", inspect.getsource(module).replace("No torch.optim:", ""))


def test_no_module_hides_a_name_of_another():
    names = Counter(node.name for module in module_of_sources._LEARN for node in ast.parse(inspect.getsource(module)).body
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    assert max(names.values()) == 1


def test_settings_can_be_read_back_without_running_anything(shipped, settings):
    assert read_settings(shipped["init_model_function"]) == json.loads(json.dumps(settings))


@pytest.mark.parametrize("source", ["def f(): return 1", "SETTINGS = open('x')", "SETTINGS = {", ""])
def test_other_sources_have_no_settings(source):
    with pytest.raises(DafneError):
        read_settings(source)


@pytest.mark.parametrize("value", ["-" * 10**5 + "1", "[" * 100 + "]" * 100, "{1:" * 100])
def test_settings_that_python_would_choke_on_are_refused_before_it_sees_them(value):
    with pytest.raises(DafneError, match="nested too deeply"):
        read_settings(f"def f():\n    SETTINGS = {{'a': {value}}}\n")


@pytest.mark.parametrize("name", ["from dl", "import dl"])
def test_words_that_dafne_rewrites_are_refused(settings, name):
    labels = [{"name": f"{name} lesion", "values": [1]}]
    with pytest.raises(DafneError, match="Dafne rewrites"):
        sources(settings | {"labels": labels})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object()])
def test_settings_that_are_not_json_are_refused(settings, value):
    with pytest.raises(DafneError, match="cannot be written into a .model file"):
        sources(settings | {"tile_step": value})


@pytest.mark.parametrize("source", ["x = 1", "import nothing_of_this_name", "def f(:"])
def test_a_source_that_dafne_could_not_use_is_refused(source):
    with pytest.raises(DafneError):
        function_of(source)


def test_the_text_of_a_function_is_kept_for_dafne_to_dump_again(shipped):
    function = function_of(shipped["apply_model_function"])
    assert function.source == shipped["apply_model_function"]
    with pytest.raises(OSError):
        inspect.getsource(function)


def test_pickle_needs_no_class_for_the_sources(shipped):
    import pickle

    assert not [op for op, *_ in pickletools.genops(pickle.dumps(shipped, 4)) if "GLOBAL" in op.name]
