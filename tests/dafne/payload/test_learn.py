"""payload/learn.py: learning keeps what is finite and helps on unseen images, or leaves the model as it was."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
import torch
from shipped import settings_of

from nnunet_dante.dafne.payload import learn
from nnunet_dante.dafne.payload.cases import annotated, completed, cut, prepare
from nnunet_dante.dafne.payload.network import build
from nnunet_dante.models.checkpoint import unique_tensors
from nnunet_dante.models.donor import open_donor

AFFINE = np.array([[0, -1.0, 0, 30], [-1.0, 0, 0, 9], [0, 0, -1.0, 40], [0, 0, 0, 1.0]])


class Model:
    """What `learn` uses of Dafne's model."""

    def __init__(self, folder, **learning):
        donor = open_donor(folder)
        self.model = build(settings_of(folder, **{"min_steps": 12, "epochs": 1, "rank": 2} | learning))
        self.model.load_state_dict(unique_tensors(donor.weights))

    def weights(self):
        return {key: value.clone() for key, value in self.model.state_dict().items()}

    def learn(self, data, outputs):
        """Return whether the weights have changed."""
        before = self.weights()
        learn.learn(self, data, outputs, 2, 5)
        return any(not torch.equal(before[key], value) for key, value in self.weights().items())


@pytest.fixture(scope="module", params=["2d", "3d_fullres"])
def folder(request, tmp_path_factory):
    """A model of the labels organ and lesion, of which only organ is drawn in `corrected`."""
    return tiny.write_model_folder(tmp_path_factory.mktemp("model"), configuration=request.param, features=(4, 8))


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return tiny.write_model_folder(tmp_path_factory.mktemp("model"), features=(4, 8))


def corrected(folder, *, count=3, seed=0):
    """Bright boxes and their masks, as the client hands them over: lists of slices, or volumes with slices first."""
    rng, images, masks = np.random.default_rng(seed), [], []
    for _ in range(count):
        mask = np.zeros((18, 20, 16), np.uint8)
        low = rng.integers(2, 5, 3)
        mask[low[0]:low[0] + 8, low[1]:low[1] + 9, low[2]:low[2] + 7] = 1
        images.append((mask * 100 + rng.normal(50, 10, mask.shape)).astype(np.float32))
        masks.append(mask)
    if folder.name.endswith("2d"):
        slices = [mask[:, :, 7] for mask in masks]
        return ({"resolution": [1.0, 1.0], "image_list": [image[:, :, 7] for image in images]},
                [{"organ": mask, "lesion": 0 * mask, "my own": mask} for mask in slices])
    return ({"resolution": [1.0] * 3, "affine": [AFFINE] * count, "image_list": [np.moveaxis(i, -1, 0) for i in images]},
            {number: {"organ": np.moveaxis(mask, -1, 0)} for number, mask in enumerate(masks)})


def test_what_is_better_is_taken_over(folder, capsys):
    model = Model(folder)
    assert model.learn(*corrected(folder))
    kept, everything, nothing = map(float, re.findall(r"(?:loss|it|none) (\d\.\d+)", capsys.readouterr().out))
    assert kept == everything < nothing and all(torch.isfinite(value).all() for value in model.weights().values())


def test_a_network_that_fits_no_better_is_not_taken_over(folder, capsys):
    assert not Model(folder, learning_rate=-0.01).learn(*corrected(folder))
    assert "left as it was" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [3, 4])
def test_weights_that_are_not_finite_are_not_taken_over(volume, monkeypatch, capsys, value, count):
    def spoilt(student, teacher, trained, *how):
        train(student, teacher, trained, *how)
        trained.tensors[-1].data[0] = value

    train = learn.train
    monkeypatch.setattr(learn, "train", spoilt)
    assert not Model(volume).learn(*corrected(volume, count=count))
    assert "not finite" in capsys.readouterr().out


def with_curve(monkeypatch, curve):
    """Let every update have these losses, at the strengths that are asked for; returns what was asked."""
    asked = []

    def losses(teacher, update, cases, strengths):
        asked.append((update, cases, strengths))
        return [len(cases) * curve[strength] for strength in strengths]

    monkeypatch.setattr(learn, "losses_at", losses)
    return asked


@pytest.mark.parametrize(("curve", "kept"), [((5, 4, 3, 4, 5), 0.5), ((5, 4, 3, 2, 1), 1.0), ((5, 4, 4, 4, 4), 0.25),
                                             ((1, 2, 3, 4, 5), 0.0), ((5, 4, 3, float("nan"), float("nan")), 0.5)])
def test_the_strength_of_the_lowest_loss_on_unseen_images_is_kept_the_smaller_of_equals(volume, monkeypatch, capsys,
                                                                                      curve, kept):
    asked, model = with_curve(monkeypatch, dict(zip(learn.STRENGTHS, curve))), Model(volume)
    start = model.weights()
    assert model.learn(*corrected(volume, count=4)) == (kept > 0)
    (one, _, _), (other, _, _) = asked
    for key, value in model.weights().items():
        torch.testing.assert_close(value, start[key] + kept * (one[key] + other[key]) / 2)
    assert f"Kept {kept:.0%} of" in capsys.readouterr().out


def test_each_half_is_judged_on_the_images_of_the_other(volume, monkeypatch):
    learned, asked = [], with_curve(monkeypatch, {s: 1 - s for s in learn.STRENGTHS})
    train = learn.train

    def watched(student, teacher, trained, cases, *how):
        learned.append(cases)
        train(student, teacher, trained, cases, *how)

    monkeypatch.setattr(learn, "train", watched)
    assert Model(volume).learn(*corrected(volume, count=5))
    judged = [[id(image) for image, _ in cases] for _, cases, _ in asked]
    seen = [[id(image) for image, _ in cases] for cases in learned]
    assert judged == seen[::-1] and [len(half) for half in seen] == [2, 3] and not set(seen[0]) & set(seen[1])


def test_too_few_images_for_halves_are_learned_from_all_or_nothing(volume, monkeypatch):
    asked = with_curve(monkeypatch, {0.0: 1, 1.0: 0})
    assert Model(volume).learn(*corrected(volume, count=learn.FEWEST_IMAGES - 1))
    assert [(len(cases), strengths) for _, cases, strengths in asked] == [(3, (0.0, 1.0))]


def test_learning_twice_gives_the_same_weights(folder):
    one, other = Model(folder), Model(folder)
    one.learn(*corrected(folder, count=4))
    other.learn(*corrected(folder, count=4))
    assert all(torch.equal(value, other.weights()[key]) for key, value in one.weights().items())


def test_an_error_on_the_way_leaves_the_model_as_it_was(volume, monkeypatch, capsys):
    def broken(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(learn.Descent, "step", broken)
    assert not Model(volume).learn(*corrected(volume))
    assert "Learning failed" in capsys.readouterr().out


@pytest.mark.parametrize("outputs", [{}, {0: {"my own": np.ones((16, 18, 20))}}, {0: {"organ": np.zeros((16, 18, 20))}}])
def test_without_a_mask_of_its_labels_nothing_is_learned(volume, outputs, capsys):
    assert not Model(volume).learn(corrected(volume)[0], outputs)
    assert "Nothing to learn from: no mask of organ, lesion" in capsys.readouterr().out


def test_masks_as_a_list_and_as_a_dict_teach_the_same(volume):
    data, outputs = corrected(volume, count=2)
    one, other = Model(volume), Model(volume)
    assert one.learn(data, outputs) and other.learn(data, [outputs[0], outputs[1]])
    assert all(torch.equal(value, other.weights()[key]) for key, value in one.weights().items())


def test_volumes_have_their_slices_first_and_are_turned_to_how_apply_gets_them(volume):
    data, outputs = corrected(volume, count=1)
    ((channels, _, masks),) = annotated(Model(volume).model.settings, data, outputs)
    assert channels[0].shape == masks["organ"].shape == (18, 20, 16) and data["image_list"][0].shape == (16, 18, 20)
    assert channels[0][masks["organ"]].min() > channels[0][~masks["organ"]].mean()


def test_a_label_that_was_not_drawn_is_what_the_network_said_before(folder):
    """Without it, the rest of a volume of which the client sends one label would be learned as background."""
    teacher = Model(folder).model
    settings = teacher.settings
    (case,) = (prepare(settings, *given) for given in annotated(settings, *corrected(folder, count=1)))
    image, target = cut(case, settings["patch"], None)
    drawn, unknown = target[0], target[1]
    assert set(drawn.unique().tolist()) == {0, 1} and unknown.unique().tolist() == [-1]
    logits = teacher(image[None]).detach()
    complete = completed(target[None], logits, settings)[0]
    torch.testing.assert_close(complete.sum(0), torch.ones_like(complete[0]))
    assert complete[:, drawn == 1].T.unique(dim=0).tolist() == [[0, 1, 0]] and bool((complete[1, drawn == 0] == 0).all())
    before = torch.softmax(logits[0, [0, 2]], 0)
    torch.testing.assert_close(complete[[0, 2]][:, drawn == 0], before[:, drawn == 0])


@pytest.mark.parametrize("regions", [[], [1, 2]])
def test_a_label_that_was_not_drawn_and_is_predicted_as_before_has_nothing_to_learn(regions):
    settings, target = {"region_order": regions}, torch.full((1, 2, 6, 6), -1, dtype=torch.int8)
    target[:, 0] = 0  # drawn, and nowhere here
    logits = torch.randn(1, 2 if regions else 3, 6, 6, generator=torch.Generator().manual_seed(0))
    row = 0 if regions else 1
    logits[:, row] = -30.0
    complete, inside = completed(target, logits, settings), target[:, 0] > -2
    student = logits.clone().requires_grad_(True)
    learn.loss_of(student, complete, inside, settings).backward()
    others = [i for i in range(logits.shape[1]) if i != row]
    assert float(student.grad[:, others].abs().max()) < 1e-6
    moved = logits.clone()
    moved[:, -1] += 1
    assert learn.loss_of(moved, complete, inside, settings) > learn.loss_of(logits, complete, inside, settings) + 0.01


def test_the_network_that_the_client_holds_is_trained_as_a_copy(volume, monkeypatch):
    model, seen = Model(volume), []
    before, step = model.weights(), learn.Descent.step

    def watched(self, share):
        step(self, share)
        seen.append(all(torch.equal(before[key], value) for key, value in model.weights().items()))

    monkeypatch.setattr(learn.Descent, "step", watched)
    assert model.learn(*corrected(volume)) and len(seen) >= 12 and all(seen)


def test_patches_are_mirrored_along_the_given_axes_alone_image_and_target_alike():
    image, rng = torch.arange(24.0).reshape(1, 2, 3, 4), np.random.default_rng(0)
    found = [learn.mirrored((image, image.to(torch.int8)), [2], rng) for _ in range(20)]
    assert all(torch.equal(a, b.float()) for a, b in found)
    kinds = [any(torch.equal(a, expected) for a, _ in found) for expected in (image, image.flip(3))]
    assert kinds == [True, True] and all(torch.equal(a, image) or torch.equal(a, image.flip(3)) for a, _ in found)
