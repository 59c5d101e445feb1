"""Writes defenses.npz: inputs and outputs of every defense, computed with torch.

Run ``python tests/golden/make_defenses.py`` (needs the ``convert`` extra). The formulas are those
of the paper ("paper") and of its published code ("code"), written out anew; no
seed matters for the test, since inputs are stored beside outputs. Kernels are stored in Flax's
layout (HWIO, [d k]).
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

OUT = Path(__file__).with_name("defenses.npz")
RATE, BOUND = 0.8, 1.5


def sparsify_paper(g, rate):
    flat = g.flatten().clone()
    count = int(np.floor(rate * flat.numel() + 1e-9))
    flat[torch.argsort(flat.abs(), stable=True)[:count]] = 0
    return flat.reshape(g.shape)


def sparsify_code(g, rate):
    threshold = torch.quantile(g.abs().flatten(), rate)
    return torch.where(g.abs() < threshold, 0.0, g)


def clip_paper(gradient, bound):
    return [g * min(1.0, bound / g.norm().item()) for g in gradient]


def clip_code(gradient, bound):
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradient]
    for p, g in zip(parameters, gradient, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, bound)
    return [p.grad for p in parameters]


class Net(torch.nn.Module):
    """Two strided convolutions and a linear layer; features are flattened as h, w, c."""

    def __init__(self):
        super().__init__()
        self.conv0 = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.conv1 = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = torch.nn.Linear(32, 3)

    def features(self, x):
        x = functional.softplus(self.conv0(2 * x - 1))
        x = functional.relu(self.conv1(x) + 0.1)
        return x.permute(0, 2, 3, 1).flatten(1)

    def gradient(self, x, y, mask=None):
        features = self.features(x)
        logits = self.fc(features if mask is None else mask * features)
        return torch.autograd.grad(functional.cross_entropy(logits, y), list(self.parameters()))


def jacobian_norms(net, x):
    """One backward pass per feature, as the published code does it."""
    x = x.clone().requires_grad_(True)
    features = net.features(x)
    norms = torch.zeros_like(features)
    for i in range(features.shape[1]):
        (g,) = torch.autograd.grad(features[:, i].sum(), x, retain_graph=True)
        norms[:, i] = g.flatten(1).norm(dim=1)
    return features.detach(), norms


def soteria_paper(features, norms, rate):
    key = torch.where(norms > 0, features.abs() / norms, torch.zeros_like(norms))
    mask = torch.ones_like(features)
    for b in range(len(mask)):
        order = torch.argsort(-key[b], stable=True)
        mask[b, order[: int(np.floor(rate * mask.shape[1] + 1e-9))]] = 0
    return mask


def soteria_code(features, norms, rate):
    score = (norms / (features + 1e-10)).sum(0)
    threshold = np.percentile(score.numpy(), 100 * rate)
    return torch.from_numpy(np.where(np.abs(score.numpy()) < threshold, 0, 1).astype(np.float32))


def flax_layout(name, value):
    value = value.detach()
    if name.endswith("bias"):
        return value.numpy()
    return (value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T).contiguous().numpy()


def main():
    torch.manual_seed(0)
    net = Net()
    names = [n.replace(".", "/").replace("weight", "kernel") for n, _ in net.named_parameters()]
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([2, 0])
    arrays = {
        "images": images.permute(0, 2, 3, 1).numpy(),
        "labels": labels.numpy().astype(np.int32),
        "rate": np.float32(RATE),
        "bound": np.float32(BOUND),
    }

    def store(group, gradient):
        for name, g in zip(names, gradient, strict=True):
            arrays[f"{group}/{name}"] = flax_layout(name, g)

    store("params", net.parameters())
    gradient = [20 * g for g in net.gradient(images, labels)]
    store("gradient", gradient)
    store("clip_paper", clip_paper(gradient, BOUND))
    store("clip_code", clip_code(gradient, BOUND))
    # Sparsified in Flax's layout: among equals, the first in memory order goes.
    laid_out = [torch.from_numpy(flax_layout(n, g)) for n, g in zip(names, gradient, strict=True)]
    for name, g in zip(names, laid_out, strict=True):
        arrays[f"sparsify_paper/{name}"] = sparsify_paper(g, RATE).numpy()
        arrays[f"sparsify_code/{name}"] = sparsify_code(g, RATE).numpy()
    for fidelity, sigma in (("paper", 0.1), ("code", 0.01)):
        noisy = [torch.zeros(g.shape) + sigma * torch.randn(g.shape) for g in gradient]
        store(f"noise_{fidelity}", noisy)

    features, norms = jacobian_norms(net, images)
    mask = soteria_paper(features, norms, RATE)
    arrays.update(features=features.numpy(), norms=norms.numpy(), soteria_paper_mask=mask.numpy())
    store("soteria_plain", net.gradient(images, labels))
    store("soteria_paper", net.gradient(images, labels, mask))
    mask = soteria_code(features, norms, RATE)
    arrays["soteria_code_mask"] = mask.numpy()
    pruned = net.gradient(images, labels)
    pruned = [g * mask if n == "fc/kernel" else g for n, g in zip(names, pruned, strict=True)]
    store("soteria_code", pruned)
    np.savez_compressed(OUT, **arrays)


if __name__ == "__main__":
    main()
