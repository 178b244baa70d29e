"""names.py: rows and channels as nnU-Net itself orders them."""

from __future__ import annotations

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_dante.errors import TransferError
from nnunet_dante.models.labels import channel_names, has_regions, head_names, plain_labels, previous_stage_names

LABELS = {"lesion": 2, "background": 0, "organ": [1], "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": (2, 3), "enhancing": 3, "ignore": 4}


@pytest.mark.parametrize(("labels", "order"), [(LABELS, None), (REGIONS, (1, 2, 3))])
def test_as_many_rows_and_cascade_inputs_as_nnunet_has(labels, order):
    manager = LabelManager(labels, order)
    content = {"labels": labels}
    assert has_regions(content) == manager.has_regions
    assert len(head_names(content)) == manager.num_segmentation_heads
    assert len(previous_stage_names(content)) == len(manager.foreground_labels)


def test_labels_are_ordered_by_number_and_regions_by_file():
    assert head_names({"labels": LABELS}) == ("background", "organ", "lesion")
    assert head_names({"labels": REGIONS, "regions_class_order": [3, 2, 1]}) == ("whole", "core", "enhancing")


def test_values_below_regions_are_named_by_the_regions_they_are_in():
    assert previous_stage_names({"labels": REGIONS}) == ("whole", "core & whole", "core & enhancing & whole")
    assert previous_stage_names({"labels": LABELS}) == ("organ", "lesion")


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_are_ordered_by_number(key):
    assert channel_names({key: {"1": "PET", "0": "CT"}}) == ("CT", "PET")
    assert channel_names({key: {str(i): f"c{i}" for i in range(11)}})[10] == "c10"


@pytest.mark.parametrize(("content", "message"), [
    ({}, "names no channels"), ({"channel_names": {"0": "CT", "2": "PET"}}, "needs 0 to 1")])
def test_bad_channels(content, message):
    with pytest.raises(TransferError, match=message):
        channel_names(content)


@pytest.mark.parametrize(("labels", "message"), [
    (None, "needs \"labels\""), ({"organ": 1}, "background 0"), ({"background": 1}, "background 0"),
    ({"background": 0, "a": 2}, "needs 0 to 1, each once"), ({"background": 0, "a": 1, "b": 1}, "each once")])
def test_bad_labels(labels, message):
    with pytest.raises(TransferError, match=message):
        head_names({"labels": labels})



@pytest.mark.parametrize("labels", [
    {"background": 0, "organ": [1], "lesion": 2}, {"background": "0", "organ": "1", "lesion": "2"},
    {"background": 0, "organ": 1.0, "lesion": ["2"]}, {"lesion": 2, "organ": (1,), "background": 0}])
def test_labels_that_stock_trains_become_plain_numbers_and_mean_the_same(labels):
    plain = plain_labels({"labels": labels, "file_ending": ".png"})
    assert plain == {"labels": {"background": 0, "organ": 1, "lesion": 2}, "file_ending": ".png"}
    assert list(plain["labels"]) == list(labels)
    stock, ours = LabelManager(labels, None), LabelManager(plain["labels"], None)
    assert stock.all_labels == ours.all_labels and stock.has_regions == ours.has_regions is False
    assert head_names({"labels": labels}) == head_names(plain)


def test_regions_become_plain_numbers_and_mean_the_same():
    plain = plain_labels({"labels": {"background": 0, "whole": ["1", 2], "core": ["2"], "ignore": "3"},
                          "regions_class_order": ["1", 2]})
    assert plain["labels"] == {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    assert plain["regions_class_order"] == [1, 2]
    assert LabelManager(plain["labels"], plain["regions_class_order"]).num_segmentation_heads == 2


@pytest.mark.parametrize("order", [[[1], [2]], [[1, 2]], [1], [1, 2, 3], None, 1, "12", [1, None], [1, 1.5]])
def test_a_regions_class_order_that_nnunet_cannot_use_is_refused_by_name(order):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    with pytest.raises(TransferError, match=r"regions_class_order of dataset\.json is .*list of 2 whole.*whole, core"):
        plain_labels({"labels": labels, "regions_class_order": order})


@pytest.mark.parametrize("value", ["one", [], [1, "x"], None, {"a": 1}, 1.5])
def test_labels_that_are_no_numbers_are_refused(value):
    with pytest.raises(TransferError, match="must be a whole number"):
        plain_labels({"labels": {"background": 0, "organ": value}})
