"""panels.py, overview.py: every kind of result is drawn, nothing covers anything."""

from __future__ import annotations

import math

import numpy as np
import pytest
import synthetic

from nnunet_dante.compare import overview, panels
from nnunet_dante.compare.overview import methods_overview, parameters_overview, shots_overview
from nnunet_dante.compare.panels import curve_panels, shots_panels, unfreezing_timeline
from nnunet_dante.compare.study import studies
from nnunet_dante.datasets.views import COLOURS


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, as matplotlib holds them."""
    drawn = []
    for module in (panels, overview):
        monkeypatch.setattr(module, "save", lambda figure, file, **options: drawn.append(figure))
    return drawn


def whole(**options):
    (study,) = studies(synthetic.results(shots=(1, 2, 8), **options))
    return study


def test_each_method_has_a_panel_and_the_references_are_in_all_of_them(figures):
    study = whole()
    shots_panels(study, "unused")
    curve_panels(study, study.shots[0], "unused")
    for figure in figures:
        visible = [axis for axis in figure.axes if axis.get_visible()]
        assert [axis.get_title("left").split(":")[0] for axis in visible] == [
            m for m in study.methods if m not in ("zero-shot", "scratch", "full")]
        for axis in visible:
            assert {"black", "0.55"} <= {line.get_color() for line in axis.lines}
        assert "simulated images" in figure.get_suptitle()


def test_the_panel_says_at_which_epoch_the_target_was_reached(figures):
    results = [synthetic.result("scratch", 2, 0, curve=[0.1, 0.5, 1.0], start_dice=0.0),
               synthetic.result("LoRA", 2, 0, curve=[0.2, 0.9, 1.0], start_dice=0.1),
               synthetic.result("head", 2, 0, curve=[0.2, 0.3, math.nan], start_dice=None)]
    (study,) = studies(results)
    curve_panels(study, study.shots[0], "unused")
    titles = [axis.get_title("left") for axis in figures[0].axes if axis.get_visible()]
    assert titles == ["LoRA: 2 epochs", "head: never"]
    (dot,) = [line for line in figures[0].axes[0].lines if line.get_marker() == "o" and line.get_color() == COLOURS[5]]
    assert dot.get_xdata()[0] == 2 and dot.get_ydata()[0] == pytest.approx(0.85)


def test_names_beside_points_cover_neither_points_nor_each_other(figures):
    from matplotlib.text import Text

    study = whole()
    assert parameters_overview(study, study.shots[-1], "unused")
    (figure,) = figures
    names = [text for text in figure.axes[0].texts if text.get_text() != "zero-shot"]
    boxes = [Text.get_window_extent(text) for text in names]
    assert sorted(text.get_text() for text in names) == sorted(set(study.methods) - {"zero-shot"})
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])


def test_names_right_of_the_lines_are_apart_in_the_order_of_the_lines(figures):
    shots_overview(whole(), "unused")
    texts = [t for t in figures[0].axes[0].texts if t.get_text() != "zero-shot"]
    heights = np.array([text.xyann[1] for text in texts])
    ends = np.array([text.xy[1] for text in texts])
    assert (np.diff(heights[np.argsort(ends)]) > 0.06).all() and heights.min() >= 0 and heights.max() <= 1


@pytest.mark.parametrize("results", [
    [synthetic.result("LoRA", 2, 0)], [synthetic.result("scratch", 2, 0), synthetic.result("full", 2, 0)],
    [synthetic.result("LoRA", 2, 0, curve=[math.nan] * 3, cases={}, trained_parameters=None)],
    [synthetic.result("LoRA", 2, 0, number=1), synthetic.result("head", 4, 0, number=1, curve=[0.5], seconds=[1.0])]])
def test_few_runs_and_runs_that_lack_something_are_drawn(tmp_path, results):
    (study,) = studies(results)
    for shots in study.shots:
        curve_panels(study, shots, tmp_path / "c.png")
        parameters_overview(study, shots, tmp_path / "p.png")
        methods_overview(study, shots, tmp_path / "m.png")
    shots_panels(study, tmp_path / "s.png")
    shots_overview(study, tmp_path / "o.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in "cmso")


def test_the_timeline_shows_when_groups_open_and_is_left_out_without_stages(tmp_path, figures):
    drawn = figures
    assert unfreezing_timeline(whole(), tmp_path / "t.png")
    shown = {axis.get_title("left"): axis for axis in drawn[0].axes if axis.get_visible()}
    assert set(shown) == {"scratch, full, norm, BitFit, LoRA,\nLP-FT, DoRA", "decoder, LoRA decoder", "head",
                           "GU, GU Dante"}
    opened = shown["GU, GU Dante"].collections[0].get_array().reshape(6, synthetic.EPOCHS)
    assert opened.sum(1).tolist() == [synthetic.EPOCHS - 3 * n for n in range(6)]
    assert [t.get_text() for t in drawn[0].axes[0].get_yticklabels()] == list(synthetic.GROUPS)
    (study,) = studies([synthetic.result("LoRA", 2, 0, stages=[])])
    assert not unfreezing_timeline(study, tmp_path / "t.png") and len(drawn) == 1
