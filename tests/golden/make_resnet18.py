"""Write the golden arrays ``resnet18_*.npz`` of ``tests/test_models.py``. Needs torch.

    python tests/golden/make_resnet18.py

Each file holds the images (uint8), labels, logits, features and, for each of the 62 gradients, its
l2 norm, its sum and its entries at a fixed stride (all entries where they are few), computed by the
PyTorch network of ``tests/torch_resnet.py`` in float64, with weights that follow from a rule
instead of being stored.

A ReLU whose input is within rounding of zero, or a tie in the max-pooling, makes the gradient jump
by far more than rounding (about one in two random batches has one), and then two right programs
disagree. The images are therefore the first random ones that stay away from every kink.
"""

import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from torch_resnet import as_tensors, evaluate, forward, hashed_uniform  # noqa: E402

#: name -> (stem, image side, classes, batch, BatchNorm on batch statistics)
CASES = {
    "cifar_b1": ("cifar", 32, 2, 1, False),
    "cifar_b3": ("cifar", 32, 2, 3, False),
    "cifar_b2_train": ("cifar", 32, 2, 2, True),
    "imagenet_b1": ("imagenet", 224, 1000, 1, False),
}
#: Gradients with more entries than this are stored at a stride.
ENTRIES = 600
#: Least distance to a kink, in units of the layer's root mean square; float32 errs by about 3e-7.
MARGIN = {"cifar": 4e-6, "imagenet": 2e-6}
#: Random batches to try.
DRAWS = 1000


def stride(size: int) -> int:
    # Odd, so that the entries do not all share a kernel position or a channel.
    return 1 if size <= ENTRIES else (size // ENTRIES) | 1


def choose_images(case: str) -> np.ndarray:
    """The first random images, uint8, that stay away from every kink."""
    stem, side, num_classes, batch, train = CASES[case]
    # In train mode the images of a batch depend on each other: they are drawn together.
    together = batch if train else 1
    state, _ = as_tensors(np.zeros((1, side, side, 3)), stem, num_classes, "float32")
    chosen: list[np.ndarray] = []
    for draw in range(DRAWS):
        u = hashed_uniform(f"images {case} {draw}", together * side * side * 3)
        images = np.floor((u + 1) * 128).astype(np.uint8).reshape(together, side, side, 3)
        margins: list = []
        with torch.no_grad():
            x = 2 * torch.tensor(images).permute(0, 3, 1, 2).float() / 255 - 1
            forward(state, x, stem, train, margins)
        if min(margin.min() for margin in margins) > MARGIN[stem]:
            chosen += list(images)
        if len(chosen) == batch:
            print(case, "chosen after", draw + 1, "draws")
            return np.stack(chosen)
    raise SystemExit(f"{case}: no images with a margin of {MARGIN[stem]} in {DRAWS} draws")


def main() -> None:
    for case, (stem, _, num_classes, batch, train) in CASES.items():
        images = choose_images(case)
        labels = np.arange(1, batch + 1, dtype=np.int32) * 7 % num_classes
        logits, features, gradients = evaluate(
            images.astype(np.float64) / 255, labels, stem, num_classes, train, "float64"
        )
        arrays = {"images": images, "labels": labels, "logits": logits, "features": features}
        for name, g in gradients.items():
            flat = g.reshape(-1)
            arrays[f"entries/{name}"] = flat[:: stride(flat.size)].astype(np.float32)
            arrays[f"norm/{name}"] = np.linalg.norm(flat)
            arrays[f"sum/{name}"] = flat.sum()
        path = HERE / f"resnet18_{case}.npz"
        np.savez_compressed(path, **arrays)
        print(path.name, path.stat().st_size, "bytes", f"{len(gradients)} gradients")


if __name__ == "__main__":
    main()
