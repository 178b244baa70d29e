"""Shipped: incremental learning in Dafne, from the slices or volumes that a user corrected.

The client uploads the model whatever happens here. So copies are trained, and of what they learned as much is taken
over as fits images best that they did not learn from: all, a part, or nothing (WiSE-FT, Wortsman 2022).
No torch.optim: importing it after TensorFlow aborts the client where triton is installed.
"""

from __future__ import annotations

import copy
import math
import time
import traceback

import numpy as np
import torch

from .cases import annotated, completed, cut, prepare

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FEWEST_IMAGES = 4  # to learn from one half and to judge on the other


def loss_of(logits, complete, inside, settings):
    """Cross-entropy plus 1 - soft Dice over the foreground, both over the voxels `inside` the image (batch, *patch).

    `complete` comes from `completed`: masks p, and probabilities where the user drew none. Soft Dice is that of
    Milletari 2016, 2 p q / (p^2 + q^2), which is largest at q = p for both. So a label that was not drawn stays.
    """
    functional, weight = torch.nn.functional, inside.float()
    if settings["region_order"]:
        entropy = functional.binary_cross_entropy_with_logits(logits, complete, reduction="none").mean(1)
        probability = torch.sigmoid(logits)
    else:
        entropy = functional.cross_entropy(logits, complete, reduction="none")
        probability, complete = torch.softmax(logits, 1)[:, 1:], complete[:, 1:]
    axes = [0, *range(2, logits.ndim)]
    overlap = (probability * complete * weight[:, None]).sum(axes)
    total = ((probability.square() + complete.square()) * weight[:, None]).sum(axes)
    dice = (2 * overlap + 1e-5) / (total + 1e-5)
    return (entropy * inside).sum() / weight.sum().clamp_min(1) + 1 - dice.mean()


class Trained:
    """The part of a network that learns: low-rank factors of its convolutions; stem, head, norms and biases in full.

    The weight of an adapted layer is start + alpha / rank * A_k B_k for each kernel offset k, as in nnunet_dante.
    """

    def __init__(self, network, settings):
        how, generator = settings["learning"], torch.Generator().manual_seed(0)
        stem = next(m for m in network.modules() if getattr(m, "weight", None) is not None and m.weight.ndim > 2)
        full = {id(stem), id(network.decoder.seg_layers[-1])}
        self.network, self.scale = network, how["alpha"] / max(how["rank"], 1)
        self.layers: list = []
        self.tensors: list = []
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        for name, module in list(network.named_modules()):
            weight = getattr(module, "weight", None)
            if weight is None or ("seg_layers" in name and id(module) not in full):
                continue
            rows, columns, kernel = (*weight.shape[:2], math.prod(weight.shape[2:])) if weight.ndim > 2 else (0, 0, 0)
            rank = min(how["rank"], (rows * columns * kernel - 1) // max(kernel * (rows + columns), 1))
            if id(module) in full or weight.ndim < 3 or rank < 1:
                self.add(weight)
            else:
                a = torch.empty(kernel, rows, rank).uniform_(-1, 1, generator=generator) / math.sqrt(rank)
                factors = a.to(weight.device), torch.zeros(kernel, rank, columns, device=weight.device)
                del module._parameters["weight"]
                self.layers.append((name, module, weight.detach(), *map(self.add, factors)))
            if getattr(module, "bias", None) is not None:
                self.add(module.bias)
        self.start = [t.detach().clone() for t in self.tensors]

    def add(self, tensor):
        """Let the tensor learn."""
        self.tensors.append(tensor.requires_grad_(True))
        return tensor

    def compose(self):
        """Put start + delta into the adapted layers, once before every forward pass; return {key: merged weight}."""
        merged = {}
        for name, module, start, a, b in self.layers:
            module.weight = start + self.scale * (a @ b).permute(1, 2, 0).reshape(start.shape)
            merged[f"{name}.weight"] = module.weight.detach()
        return merged


class Descent:
    """AdamW (Loshchilov 2019) with decay to the start instead of zero; gradients are scaled to a norm of at most 1."""

    def __init__(self, trained, *, rate, pull):
        self.trained, self.rate, self.pull, self.count = trained, rate, pull, 0
        self.moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in trained.tensors]

    @torch.no_grad()
    def step(self, share):
        """Take one step with the learning rate share * rate, and clear the gradients."""
        tensors = self.trained.tensors
        norm = math.sqrt(sum(float(t.grad.square().sum()) for t in tensors if t.grad is not None))
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite")
        self.count += 1
        rate, one, two = self.rate * share, 1 - 0.9 ** self.count, 1 - 0.999 ** self.count
        for tensor, start, (mean, square) in zip(tensors, self.trained.start, self.moments):
            if tensor.grad is None:
                continue
            gradient = tensor.grad / max(norm, 1.0)
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient.square(), 0.001)
            tensor.sub_(rate * (mean / one) / ((square / two).sqrt() + 1e-8) + rate * self.pull * (tensor - start))
            tensor.grad = None


def exercise(teacher, patches):
    """Return images, what to predict there, and which voxels are inside, of a list of (image, target) patches."""
    device = next(teacher.parameters()).device
    image, target = (torch.stack(part).to(device) for part in zip(*patches))
    with torch.no_grad():
        return image, completed(target, teacher(image), teacher.settings), target[:, 0] > -2


def mirrored(patch, axes, rng):
    """Mirror image and target alike, along each of `axes` with a chance of one half."""
    dims = [a + 1 for a in axes if rng.random() < 0.5]
    return tuple(torch.flip(part, dims) for part in patch)


def train(student, teacher, trained, cases, batch_size, minutes):
    """Train for the epochs of the settings, at least `min_steps` steps, at most `minutes`."""
    how, patch = teacher.settings["learning"], teacher.settings["patch"]
    rng, begin = np.random.default_rng(0), time.monotonic()
    per_epoch = math.ceil(len(cases) / batch_size)
    steps = max(how["epochs"] * per_epoch, how["min_steps"])
    descent = Descent(trained, rate=how["learning_rate"], pull=how["protection"])
    order: list = []
    for step in range(steps):
        if time.monotonic() - begin > 60 * minutes:
            break
        batch = []
        for _ in range(min(batch_size, len(cases))):
            order = order or rng.permutation(len(cases)).tolist()
            batch.append(mirrored(cut(cases[order.pop()], patch, rng), how["mirroring"], rng))
        trained.compose()
        image, complete, inside = exercise(teacher, batch)
        loss_of(student(image), complete, inside, teacher.settings).backward()
        descent.step(1 - step / steps)


def update_from(teacher, cases, batch_size, minutes):
    """Train a copy of the network on the cases; return {key: change of the weight}."""
    student = copy.deepcopy(teacher)
    trained = Trained(student, teacher.settings)
    train(student, teacher, trained, cases, batch_size, minutes)
    with torch.no_grad():
        merged = trained.compose()
    weights, start = {**student.state_dict(), **merged}, teacher.state_dict()
    return {key: weights[key].detach() - value for key, value in start.items()}


def at_strength(start, update, strength):
    """Return start + strength * update, weight by weight."""
    return {key: value + strength * update[key] for key, value in start.items()}


@torch.no_grad()
def losses_at(teacher, update, cases, strengths):
    """Return, for each strength, the sum of the cases' losses on a patch around the masks and one at a random place."""
    trial, start, totals = copy.deepcopy(teacher), teacher.state_dict(), [0.0] * len(strengths)
    patch, rng = teacher.settings["patch"], np.random.default_rng(0)
    for case in cases:
        image, complete, inside = exercise(teacher, [cut(case, patch, None), cut(case, patch, rng)])
        for number, strength in enumerate(strengths):
            trial.load_state_dict(at_strength(start, update, strength))
            totals[number] += float(loss_of(trial(image), complete, inside, teacher.settings))
    return totals


def improve(model, data, outputs, batch_size):
    """Return the old weights plus as much of what was learned as helps on images not learned from; None for nothing.

    One network learns from the first half of the images and is judged on the second, another the other way round.
    With too few images for halves, one network learns from all and is judged on the same ones, all or nothing.
    """
    teacher = model.model
    settings, teacher.remembered = teacher.settings, (None, None)
    cases = [c for c in (prepare(settings, *case) for case in annotated(settings, data, outputs)) if c is not None]
    if not cases:
        print("Nothing to learn from: no mask of", ", ".join(label["name"] for label in settings["labels"]))
        return None
    middle = len(cases) // 2
    halves = [cases[:middle], cases[middle:]] if len(cases) >= FEWEST_IMAGES else [cases]
    strengths = STRENGTHS if len(halves) > 1 else (0.0, 1.0)
    minutes = settings["learning"]["max_minutes"] / len(halves)
    updates = [update_from(teacher, half, max(1, int(batch_size)), minutes) for half in halves]
    if not all(bool(torch.isfinite(value).all()) for update in updates for value in update.values()):
        print("What was learned is not finite.")
        return None
    curves = [losses_at(teacher, update, half, strengths) for update, half in zip(updates, reversed(halves))]
    losses = [sum(values) / len(cases) for values in zip(*curves)]
    best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    print(f"Kept {strengths[best]:.0%} of what was learned from {len(cases)} images: loss {losses[best]:.4f}; "
          f"all of it {losses[-1]:.4f}, none {losses[0]:.4f}.")
    mean = {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
    return at_strength(teacher.state_dict(), mean, strengths[best]) if strengths[best] else None


def learn(model, data, outputs, batch_size=5, min_images=5):
    """Let `model` learn from `data["image_list"]` and the masks in `outputs`, in place; never raises.

    If anything goes wrong, the model stays as it was. `min_images` is not used: the client has counted the images.
    """
    try:
        with torch.enable_grad():
            weights = improve(model, data, outputs, batch_size)
        if weights is None:
            print("The model was left as it was.")
        else:
            model.model.load_state_dict(weights)
    except Exception:
        traceback.print_exc()
        print("Learning failed; the model was left as it was.")
