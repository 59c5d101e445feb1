"""Write the golden arrays ``resnet18_*.npz`` of ``tests/test_models.py``. Needs torch.

    python tests/golden/make_resnet18.py

Each file holds the images (uint8), labels, logits, features and, for each of the 62 gradients, its
l2 norm, its sum and its entries at a fixed stride (all entries where they are few), computed by the
PyTorch network of ``tests/torch_resnet.py`` in float64, with weights that follow from a rule
instead of being stored.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from torch_resnet import evaluate, hashed_uniform  # noqa: E402

#: name -> (stem, image side, classes, batch, BatchNorm on batch statistics)
CASES = {
    "cifar_b1": ("cifar", 32, 2, 1, False),
    "cifar_b3": ("cifar", 32, 2, 3, False),
    "cifar_b3_train": ("cifar", 32, 2, 3, True),
    "imagenet_b1": ("imagenet", 224, 1000, 1, False),
}
#: Gradients with more entries than this are stored at a stride.
ENTRIES = 600


def stride(size: int) -> int:
    # Odd, so that the entries do not all share a kernel position or a channel.
    return 1 if size <= ENTRIES else (size // ENTRIES) | 1


def main() -> None:
    for case, (stem, side, num_classes, batch, train) in CASES.items():
        u = hashed_uniform(f"images {case}", batch * side * side * 3)
        images = np.floor((u + 1) * 128).astype(np.uint8).reshape(batch, side, side, 3)
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
