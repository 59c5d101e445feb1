"""ResNet-18 in PyTorch, written out for parity checks, and weights by a fixed rule.

Two namings of the same network: torchvision's (7x7 stem, ``downsample``, ``fc``) and that of the
CIFAR network (3x3 stem, ``shortcut``, ``linear``). Torch is imported only inside the functions that
need it, so that the default tests can use the rule without it.

The weights follow from integer arithmetic on the entry's index: 11 million floats need not be
stored, and numpy gives the same bits everywhere.
"""

import zlib

import numpy as np

NAMINGS = {
    "cifar": {"shortcut": "shortcut", "classifier": "linear"},
    "imagenet": {"shortcut": "downsample", "classifier": "fc"},
}


def hashed_uniform(name: str, size: int) -> np.ndarray:
    """``size`` numbers in [-1, 1) that depend on ``name`` and the index alone (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, size + 1, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    # 24 bits: every value is exact in float32.
    return (z >> np.uint64(40)).astype(np.float64) / 2.0**23 - 1.0


def shapes(stem: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Torch's names and shapes of a ResNet-18's parameters and running statistics, in order."""
    naming = NAMINGS[stem]
    out: dict[str, tuple[int, ...]] = {}

    def bn(name, features):
        for entry in ("weight", "bias", "running_mean", "running_var"):
            out[f"{name}.{entry}"] = (features,)

    kernel = 3 if stem == "cifar" else 7
    out["conv1.weight"] = (64, 3, kernel, kernel)
    bn("bn1", 64)
    channels = 64
    for stage, features in enumerate((64, 128, 256, 512), start=1):
        for block in range(2):
            name = f"layer{stage}.{block}"
            out[f"{name}.conv1.weight"] = (features, channels, 3, 3)
            bn(f"{name}.bn1", features)
            out[f"{name}.conv2.weight"] = (features, features, 3, 3)
            bn(f"{name}.bn2", features)
            if channels != features:
                out[f"{name}.{naming['shortcut']}.0.weight"] = (features, channels, 1, 1)
                bn(f"{name}.{naming['shortcut']}.1", features)
            channels = features
    out[f"{naming['classifier']}.weight"] = (num_classes, 512)
    out[f"{naming['classifier']}.bias"] = (num_classes,)
    return out


def state_dict(stem: str, num_classes: int) -> dict[str, np.ndarray]:
    """A full set of weights and non-trivial running statistics, float32."""
    out = {}
    for name, shape in shapes(stem, num_classes).items():
        u = hashed_uniform(name, int(np.prod(shape))).reshape(shape)
        entry = name.rsplit(".", 1)[1]
        if len(shape) > 1:
            # Variance 2 / fan_in for convolutions, so that activations neither vanish nor explode;
            # far less in the classifier, so that the softmax does not saturate.
            gain = 6 if len(shape) == 4 else 0.03
            value = u * np.sqrt(gain / np.prod(shape[1:]))
        elif entry in ("weight", "running_var"):
            value = 1 + 0.3 * u
        else:
            value = 0.2 * u
        out[name] = value.astype(np.float32)
    return out


def is_parameter(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var"))


def forward(state, images, stem: str, train: bool, margins: list | None = None):
    """Logits and features of images [b 3 h w] in [-1, 1]; ``state`` maps names to tensors.

    ``margins`` collects, for every ReLU and the max-pooling, each image's [b] smallest distance to
    a kink, in units of the layer's root mean square.
    """
    import torch
    import torch.nn.functional as F

    naming = NAMINGS[stem]

    def relu(x):
        if margins is not None:
            margins.append(x.abs().flatten(1).amin(1) / x.square().mean().sqrt())
        return F.relu(x)

    def max_pool(x):
        if margins is not None:
            windows = F.unfold(x.flatten(0, 1)[:, None], 3, padding=1, stride=2)
            first, second = windows.topk(2, dim=1).values.unbind(1)
            # A window of zeros has no gradient, whichever of them wins.
            gap = torch.where(first > 0, first - second, torch.inf)
            margins.append(gap.reshape(len(x), -1).amin(1) / x.square().mean().sqrt())
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)

    def bn(name, x):
        # Cloned, because torch updates the running statistics in place in training.
        return F.batch_norm(
            x,
            state[f"{name}.running_mean"].clone(),
            state[f"{name}.running_var"].clone(),
            state[f"{name}.weight"],
            state[f"{name}.bias"],
            training=train,
            momentum=0.1,
            eps=1e-5,
        )

    if stem == "cifar":
        x = F.conv2d(images, state["conv1.weight"], stride=1, padding=1)
        x = relu(bn("bn1", x))
    else:
        x = F.conv2d(images, state["conv1.weight"], stride=2, padding=3)
        x = max_pool(relu(bn("bn1", x)))
    for stage in range(1, 5):
        for block in range(2):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            y = relu(bn(f"{name}.bn1", y))
            y = F.conv2d(y, state[f"{name}.conv2.weight"], stride=1, padding=1)
            y = bn(f"{name}.bn2", y)
            shortcut = f"{name}.{naming['shortcut']}"
            if f"{shortcut}.0.weight" in state:
                x = F.conv2d(x, state[f"{shortcut}.0.weight"], stride=stride)
                x = bn(f"{shortcut}.1", x)
            x = relu(y + x)
    features = F.adaptive_avg_pool2d(x, 1).flatten(1)
    classifier = naming["classifier"]
    logits = F.linear(features, state[f"{classifier}.weight"], state[f"{classifier}.bias"])
    return logits, features


def as_tensors(images, stem: str, num_classes: int, dtype: str):
    """The weights, and images [b h w 3] in [0, 1] as the network takes them."""
    import torch

    kind = getattr(torch, dtype)
    state = {
        name: torch.tensor(value, dtype=kind, requires_grad=is_parameter(name))
        for name, value in state_dict(stem, num_classes).items()
    }
    return state, 2 * torch.tensor(np.asarray(images), dtype=kind).permute(0, 3, 1, 2) - 1


def evaluate(images, labels, stem: str, num_classes: int, train: bool, dtype: str):
    """Torch's logits, features and gradients for images [b h w 3] in [0, 1], as numpy arrays."""
    import torch
    import torch.nn.functional as F

    state, x = as_tensors(images, stem, num_classes, dtype)
    logits, features = forward(state, x, stem, train)
    loss = F.cross_entropy(logits, torch.tensor(np.asarray(labels), dtype=torch.long))
    names = [name for name in state if is_parameter(name)]
    gradients = torch.autograd.grad(loss, [state[name] for name in names])
    return (
        logits.detach().numpy(),
        features.detach().numpy(),
        {name: g.numpy() for name, g in zip(names, gradients, strict=True)},
    )
