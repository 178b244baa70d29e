"""Plans that would run code, or build without end. Each changes the content of a plans.json or a .model file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def plans(canary: Path) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Changes of plans that would run code, or build without end."""
    run = {"args": ["mkdir", str(canary)]}

    def architecture(change: Callable[[dict], None]) -> Callable[[dict], None]:
        return lambda content: change(content["configurations"]["3d_fullres"]["architecture"])

    def arguments(**values: Any) -> Callable[[dict], None]:
        return architecture(lambda a: a["arch_kwargs"].update(values))

    for name in ("subprocess.Popen", "subprocess.call", "torch.utils.cpp_extension.subprocess.Popen",
                 "torch.nn.modules.module.os.mkdir", "torch.nn.functional.importlib.import_module"):
        for place in ("nonlin", "norm_op", "dropout_op", "conv_op"):
            yield f"{name} as {place}", arguments(**{place: name, f"{place}_kwargs": run})
        yield f"{name} as network", architecture(lambda a, n=name: a.update(
            network_class_name=n, arch_kwargs=dict(run), _kw_requires_import=[]))
    for name in ("os.system", "this", "antigravity", "fuzz_canary.Net", "builtins.exec", "torch.nn", "torch.nn.Module", "torch",
                 "dynamic_network_architectures.architectures.unet.torch.load", "torch.hub.load", "torch.nn.Sequential"):
        yield f"network {name}", architecture(lambda a, n=name: a.update(network_class_name=n))
        yield f"nonlin {name}", arguments(nonlin=name)
    for key in ("image_reader_writer", "label_manager", "experiment_planner_used"):
        for name in ("os", "np", "join", "Path", "Union", "../x", "fuzz_canary", 7, []):
            yield f"{key} {name}", lambda p, k=key, n=name: p.update({k: n})
    for key in ("preprocessor_name", "normalization_schemes", "resampling_fn_data", "resampling_fn_probabilities"):
        for name in ("os", "np", "join", "shutil", "torch", "ABC", "fuzz_canary"):
            value = [name] if key == "normalization_schemes" else name
            yield f"{key} {name}", lambda p, k=key, v=value: p["configurations"]["3d_fullres"].update({k: v})
    for name, values in (("features 10**9", {"features_per_stage": [10**9] * 2}), ("stages 10**9", {"n_stages": 10**9}),
                         ("stages 10**6", {"n_stages": 10**6, "features_per_stage": 1, "kernel_sizes": 1, "strides": 1,
                                           "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1}),
                         ("features 10**6", {"features_per_stage": [10**6] * 2}), ("kernel 10**5", {"kernel_sizes": [[10**5] * 3] * 2}),
                         ("convolutions 10**6", {"n_conv_per_stage": [10**6] * 2}), ("stride 0", {"strides": [[0, 0, 0]] * 2}),
                         ("negative", {"features_per_stage": [-4, 4]}), ("float", {"n_stages": 2.5}),
                         ("nan", {"norm_op_kwargs": {"eps": float("nan")}})):
        yield name, arguments(**values)
    for name, value in (("inherits from itself", {"inherits_from": "3d_fullres"}), ("inherits from nothing", {"inherits_from": "x"}),
                        ("previous stage itself", {"previous_stage": "3d_fullres"}), ("patch 10**9", {"patch_size": [10**9] * 3}),
                        ("patch nan", {"patch_size": [float("nan")] * 3}), ("batch 10**12", {"batch_size": 10**12}),
                        ("spacing 0", {"spacing": [0, 0, 0]}), ("spacing inf", {"spacing": [float("inf")] * 3})):
        yield name, lambda p, v=value: p["configurations"]["3d_fullres"].update(v)
    yield "name of a configuration with folders", lambda p: p["configurations"].update(
        {f"3d/../../../../{canary}": p["configurations"]["3d_fullres"]})
    yield "dataset_name with folders", lambda p: p.update(dataset_name="../../../..")
    yield "transpose", lambda p: p.update(transpose_forward=[0, 0, 0])
    yield "cycle of stages", lambda p: p["configurations"]["3d_lowres"].update(inherits_from="3d_cascade_fullres")


def settings(canary: Path) -> Iterator[tuple[str, Callable[[dict], None]]]:
    """Changes of the description in a .model file."""
    for name, change in plans(canary):
        yield f"plans: {name}", lambda s, c=change: c(s["origin"]["plans"])
    for fold in ("../../x", f"0/../../../../../../../{canary}", "", "all/x", "9" * 30, 3, None, ["0"]):
        yield f"fold {str(fold)[:30]!r}", lambda s, f=fold: s["origin"].update(fold=f)
    yield "trainer", lambda s: s["origin"].update(trainer="os")
    yield "axes", lambda s: s["origin"].update(mirroring_axes=[10**9])
