"""Shipped: incremental learning in Dafne, from the slices or volumes that a user corrected.

The client uploads the model whatever happens here. So a copy is trained, and its weights are taken over only if they
are finite and fit the user's masks better than before. No torch.optim: importing it after TensorFlow
aborts the client where triton is installed.
"""

from __future__ import annotations

import copy
import math
import time
import traceback

import numpy as np
import torch

from .cases import annotated, completed, cut, prepare


def loss_of(logits, target, inside, settings):
    """Cross-entropy plus 1 - soft Dice over the foreground, both over the voxels `inside` the image (batch, *patch)."""
    functional, weight = torch.nn.functional, inside.float()
    if settings["region_order"]:
        entropy = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        probability = torch.sigmoid(logits)
    else:
        entropy = functional.cross_entropy(logits, target, reduction="none")
        probability = torch.softmax(logits, 1)[:, 1:]
        target = functional.one_hot(target, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    axes, weight = [0, *range(2, logits.ndim)], weight[:, None]
    overlap = (probability * target * weight).sum(axes)
    total = ((probability + target) * weight).sum(axes)
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


def batch_loss(student, teacher, batch, device):
    """Loss of a list of (image, target) patches; labels without a mask are taken from the teacher."""
    image, target = (torch.stack(part).to(device) for part in zip(*batch))
    settings = teacher.settings
    with torch.no_grad():
        complete = completed(target, teacher(image), settings)
    return loss_of(student(image), complete, target[:, 0] > -2, settings)


def mirrored(patch, axes, rng):
    """Mirror image and target alike, along each of `axes` with a chance of one half."""
    dims = [a + 1 for a in axes if rng.random() < 0.5]
    return tuple(torch.flip(part, dims) for part in patch)


def train(student, teacher, trained, cases, batch_size):
    """Train for the epochs of the settings, at least `min_steps` steps, at most `max_minutes`."""
    how, patch = teacher.settings["learning"], teacher.settings["patch"]
    rng, device, begin = np.random.default_rng(0), next(teacher.parameters()).device, time.monotonic()
    per_epoch = math.ceil(len(cases) / batch_size)
    steps = max(how["epochs"] * per_epoch, how["min_steps"])
    descent = Descent(trained, rate=how["learning_rate"], pull=how["protection"])
    order: list = []
    for step in range(steps):
        if time.monotonic() - begin > 60 * how["max_minutes"]:
            break
        batch = []
        for _ in range(min(batch_size, len(cases))):
            order = order or rng.permutation(len(cases)).tolist()
            batch.append(mirrored(cut(cases[order.pop()], patch, rng), how["mirroring"], rng))
        trained.compose()
        loss = batch_loss(student, teacher, batch, device)
        loss.backward()
        descent.step(1 - step / steps)


def improve(model, data, outputs, batch_size):
    """Train a copy of the network; return its weights, or None where it does not fit the masks better."""
    teacher = model.model
    settings, teacher.remembered = teacher.settings, (None, None)
    cases = [c for c in (prepare(settings, *case) for case in annotated(settings, data, outputs)) if c is not None]
    if not cases:
        print("Nothing to learn from: no mask of", ", ".join(label["name"] for label in settings["labels"]))
        return None
    student, device = copy.deepcopy(teacher), next(teacher.parameters()).device
    trained = Trained(student, settings)
    train(student, teacher, trained, cases, max(1, int(batch_size)))
    with torch.no_grad():
        merged = trained.compose()
        losses = [[float(batch_loss(network, teacher, [cut(case, settings["patch"], None)], device)) for case in cases]
                  for network in (teacher, student)]
    weights = {key: merged.get(key, value) for key, value in {**student.state_dict(), **merged}.items()}
    before, after = (sum(values) / len(values) for values in losses)
    finite = all(bool(torch.isfinite(value).all()) for value in weights.values())
    print(f"Learned from {len(cases)} images: loss {before:.4f} before, {after:.4f} after.")
    return weights if finite and after < before else None


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
