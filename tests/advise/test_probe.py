"""probe.py: patches lie where the labels are, Dice is what its definition says, gradients are those of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from nnunet_dante.advise.probe import Patch, cut_patches, probe
from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods.groups import parameter_groups

PLAIN = tiny.dataset_json()
REGIONS = tiny.dataset_json(labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
IGNORE = tiny.dataset_json(labels={"background": 0, "organ": 1, "ignore": 2})


def patches(n: int = 2, seed: int = 0, values: int = 3) -> list[Patch]:
    generator = torch.Generator().manual_seed(seed)
    return [Patch(image=torch.randn((1, 1, 8, 8, 8), generator=generator),
                  labels=torch.randint(0, values, (1, 1, 8, 8, 8), generator=generator)) for _ in range(n)]


class Fixed(torch.nn.Module):
    """Answers with the logits given, or with their negative where the image was negated."""

    def __init__(self, logits):
        super().__init__()
        self.network, self.logits = tiny.plain_unet(classes=logits.shape[1]), logits
        self.encoder, self.decoder = self.network.encoder, self.network.decoder

    def forward(self, image):
        return [self.network(image)[0] * 0 + self.logits * image.mean().sign()]


def cases_of(nnunet_paths, **options):
    return list(open_target(tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=2, **options)).cases.values())


@pytest.mark.parametrize(("configuration", "size"), [("3d_fullres", (16, 16, 16)), ("2d", (16, 16))])
def test_patches_hold_the_wanted_label_in_turn(nnunet_paths, configuration, size):
    cut = cut_patches(cases_of(nnunet_paths), tiny.plans("D"), configuration, PLAIN, ["organ", "lesion"])
    assert all(p.image.shape == (1, 1, *size) and p.labels.shape == (1, 1, *size) for p in cut)
    assert (cut[0].labels == 1).any() and (cut[1].labels == 2).any()


def test_images_smaller_than_the_patch_are_padded_with_zeros(nnunet_paths):
    cut = cut_patches(cases_of(nnunet_paths, shape=(12, 14, 10)), tiny.plans("D"), "3d_fullres", PLAIN, [])[0]
    assert cut.image.shape == (1, 1, 16, 16, 16)
    assert not cut.image[..., :, 14:, :].any() and not cut.labels[..., :, 14:, :].any() and cut.image[..., :10, :14, :12].any()


def test_a_case_without_the_label_is_cut_all_the_same(nnunet_paths):
    cut = cut_patches(cases_of(nnunet_paths, values=(1,)), tiny.plans("D"), "3d_fullres", PLAIN, ["lesion"])
    assert (cut[0].labels == 1).any() and not (cut[0].labels == 2).any()


def test_second_stage_of_a_cascade_is_refused(nnunet_paths):
    with pytest.raises(ConfigurationError, match="-c 3d_cascade_fullres is the second stage.*ask for 3d_lowres"):
        cut_patches([], tiny.plans("D"), "3d_cascade_fullres", PLAIN, [])


def test_dice_of_a_perfect_answer_is_one_and_negated_images_are_asked_too():
    patch = Patch(image=torch.ones(1, 1, 8, 8, 8), labels=patches()[0].labels)
    logits = torch.nn.functional.one_hot(patch.labels[:, 0], 3).movedim(-1, 1).float()
    measured = probe(Fixed(logits), [patch], PLAIN, known=["organ", "lesion"])
    assert measured.dice == {"organ": 1.0, "lesion": 1.0}
    assert max(measured.dice_inverted.values()) < 0.7


def test_dice_of_labels_by_hand():
    labels, logits = torch.zeros(1, 1, 8, 8, 8, dtype=torch.long), torch.zeros(1, 3, 8, 8, 8)
    labels[..., :2] = 1
    logits[:, 1, ..., 1:3], logits[:, 0, ..., 0], logits[:, 0, ..., 3:] = 1, 1, 1
    measured = probe(Fixed(logits), [Patch(image=torch.ones(1, 1, 8, 8, 8), labels=labels)], PLAIN, known=["organ", "lesion"])
    assert measured.dice == {"organ": 0.5}  # lesion is neither there nor predicted, so its Dice says nothing


def test_regions_are_scored_by_their_values_and_what_is_ignored_is_not_scored():
    labels = patches()[0].labels
    inside = torch.stack([labels[0] > 0, labels[0] == 2], 1).float() - 0.5
    patch = Patch(image=torch.ones(1, 1, 8, 8, 8), labels=labels)
    assert probe(Fixed(inside), [patch], REGIONS, known=["whole", "core"]).dice == {"whole": 1.0, "core": 1.0}
    everywhere = torch.cat([labels == 0, labels > 0], 1).float()
    as_background = Patch(image=patch.image, labels=labels % 2)
    assert probe(Fixed(everywhere), [as_background], IGNORE, known=["organ"]).dice["organ"] < 0.8
    assert probe(Fixed(everywhere), [patch], IGNORE, known=["organ"]).dice == {"organ": 1.0}


@pytest.mark.parametrize(("content", "heads"), [(PLAIN, 3), (REGIONS, 2), (IGNORE, 2)])
@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet])
def test_gradients_are_those_of_one_batch_and_weights_stay(build, content, heads):
    network = build(classes=heads)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    cut = patches()
    together = Patch(image=torch.cat([p.image for p in cut]), labels=torch.cat([p.labels for p in cut]))
    if "ignore" in content["labels"]:  # the loss is a mean over what is not ignored, so unequal patches weigh differently
        cut, together = cut[:1], cut[0]
    one, other = (probe(network, p, content, known=[]) for p in (cut, [together]))
    assert one.gradients.keys() == {g.name for g in parameter_groups(network)}
    assert one.gradients == pytest.approx(other.gradients, rel=1e-3) and min(one.gradients.values()) > 0
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in network.named_parameters())


def test_relative_gradients_by_hand():
    network, cut = tiny.plain_unet(), patches(1)
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    loss = DC_and_CE_loss({"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {},
                          dice_class=MemoryEfficientSoftDiceLoss)
    loss(network.eval()(cut[0].image)[0], cut[0].labels).backward()
    head = network.decoder.seg_layers
    expected = (np.sqrt(sum(float(p.grad.square().sum()) for p in head.parameters() if p.grad is not None))
                / np.sqrt(sum(float(p.detach().square().sum()) for p in head.parameters())))
    network.zero_grad()
    assert probe(network, cut, PLAIN, known=[]).gradients["head"] == pytest.approx(expected, rel=1e-5)


def test_labels_that_were_not_drawn_are_neither_scored_nor_in_the_gradient():
    network, (one, other) = tiny.plain_unet(), patches(values=2)
    hidden = [Patch(image=p.image, labels=p.labels, undrawn=frozenset({"lesion"})) for p in (one, other)]
    assert "lesion" not in probe(network, hidden, PLAIN, known=["organ", "lesion"]).dice
    drawn = probe(network, [one, other], PLAIN, known=["organ", "lesion"])
    assert drawn.dice["lesion"] == 0  # predicted somewhere, and drawn nowhere
    assert probe(network, hidden, PLAIN, known=["organ"]).gradients != drawn.gradients
