"""Our attacks beside the published code's, on the same update from the same start.

    python -m benchmarks.published --code DIR --data celeba32_public.npz
    python -m benchmarks.published --data celeba32_public.npz --attacks dlg idlg --steps 420

DIR holds checkouts of the published repositories, in folders whose names end in
``invertinggradients`` (JonasGeiping/invertinggradients, for ``ig``) and ``GGL`` (zhuohangli/GGL,
for ``ggl`` by Adam). They are imported from there; none of their code is in ours. torchvision,
which they import and the attacks do not use, is stood in for by empty classes. The published
scripts of ``dlg`` (mit-han-lab/dlg) and ``idlg`` (PatrickZH/Improved-Deep-Leakage-from-Gradients)
cannot be imported as functions: here torch.optim.LBFGS with its defaults minimises their loss,
written anew from their arithmetic, and DIR is not needed. GradInversion has no published code.

The model is a ResNet-18 with the weights of ``init(key(SEED))``, the update undefended, the start
N(0, 1) in the networks' range (for ``ggl`` in the shipped generator's latents); weights, update
and start go to both sides, which have to agree on the update. Published is what theirs returns, its
last iterate; ours keeps the iterate of lowest loss. Both run on the CPU, one after the other: set
``OMP_NUM_THREADS`` and ``taskset`` alike for both. The JSON goes to benchmarks/results/.
"""

import argparse
import contextlib
import functools
import importlib
import io
import os
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import ggl_jax as gx
from benchmarks.matching import flat, save, slug
from ggl_jax.types import Attack, Problem

#: An attack's steps by default: published lengths are 6,000, 6,000, 8,000 and 2,500.
STEPS = {"dlg": 420, "idlg": 420, "ig": 300, "ggl": 250}
#: The end of the folder's name that holds the published code.
FOLDERS = {"ig": "invertinggradients", "ggl": "GGL"}
#: Weight of total variation on both sides of ``ig``.
TOTAL_VARIATION = 0.01


class Case(NamedTuple):
    """What both sides get: one client's update, and where the search starts."""

    image: np.ndarray  # [h w c] in [0, 1], to judge by
    label: int
    variables: dict
    observed: dict
    start: np.ndarray  # [p], in the space that the attack searches


class Outcome(NamedTuple):
    """What a side found."""

    image: np.ndarray  # [h w c] in [0, 1]
    losses: np.ndarray  # [evaluations], whole losses in order
    psnrs: np.ndarray  # [evaluations], of the images they belong to
    seconds: float


def psnr(found: np.ndarray, image: np.ndarray) -> float:
    """Of a clipped image, dB, with a peak of 1."""
    return float(-10 * np.log10(np.mean((np.clip(found, 0, 1) - image) ** 2)))


# --------------------------------------------------------------------------------------------------
# Theirs: torch
# --------------------------------------------------------------------------------------------------


def _axes(array: np.ndarray) -> np.ndarray:
    """Flax's axes to torch's."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def torch_network(variables: dict):
    """Our ResNet-18 (3x3 stem, evaluation mode) as a torch module of images in [-1, 1]."""
    import torch
    from torch.nn import functional as f

    arrays = flat(variables)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for path, array in arrays.items():
                value = torch.tensor(np.ascontiguousarray(_axes(array)))
                if path.startswith("params/"):
                    self.register_parameter(path.replace("/", "-"), torch.nn.Parameter(value))
                else:
                    self.register_buffer(path.replace("/", "-"), value)

        def conv(self, x, path, stride=1, padding=1):
            return f.conv2d(x, getattr(self, f"params-{path}-kernel"), None, stride, padding)

        def norm(self, x, path):
            mean, var = (getattr(self, f"batch_stats-{path}-{name}") for name in ("mean", "var"))
            scale, bias = (getattr(self, f"params-{path}-{name}") for name in ("scale", "bias"))
            return f.batch_norm(x, mean, var, scale, bias)

        def forward(self, x):
            x = f.relu(self.norm(self.conv(x, "conv1"), "bn1"))
            for stage in range(1, 5):
                for block in range(2):
                    path, stride = f"layer{stage}_{block}", 2 if stage > 1 and block == 0 else 1
                    y = f.relu(self.norm(self.conv(x, f"{path}-conv1", stride), f"{path}-bn1"))
                    y = self.norm(self.conv(y, f"{path}-conv2"), f"{path}-bn2")
                    if stride > 1:
                        x = self.conv(x, f"{path}-shortcut_conv", stride, 0)
                        x = self.norm(x, f"{path}-shortcut_bn")
                    x = f.relu(x + y)
            kernel, bias = (getattr(self, f"params-fc-{name}") for name in ("kernel", "bias"))
            return f.linear(x.mean((2, 3)), kernel, bias)

    return Network().eval()


def torch_generator(params: dict):
    """Our DCGAN as a torch module: latents [b z] to images [b 3 32 32] in [-1, 1]."""
    import torch
    from torch.nn import functional as f

    arrays = {path: torch.tensor(np.asarray(array)) for path, array in flat(params).items()}

    class Generator(torch.nn.Module):
        def norm(self, x, number):
            mean, var = (arrays[f"batch_stats/norm{number}/{name}"] for name in ("mean", "var"))
            scale, bias = (arrays[f"params/norm{number}/{name}"] for name in ("scale", "bias"))
            return f.relu(f.batch_norm(x, mean, var, scale, bias))

        def up(self, x, number):
            kernel = arrays[f"params/up{number}/kernel"].permute(0, 3, 1, 2)
            return f.conv_transpose2d(x, kernel, arrays[f"params/up{number}/bias"], stride=2)

        def forward(self, z):
            x = z @ arrays["params/dense/kernel"] + arrays["params/dense/bias"]
            x = self.norm(x, 1).reshape(len(z), 4, 4, -1).permute(0, 3, 1, 2)
            x = self.norm(self.up(x, 1), 2)
            return torch.tanh(self.up(self.norm(self.up(x, 2), 3), 3))

    return Generator()


class _Stub(types.ModuleType):
    """A module of which every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextlib.contextmanager
def published(folder: Path):
    """The attacks of a checkout's ``inversefed``: both repositories have a package of this name."""
    names = ("", ".models", ".models.resnet", ".datasets", ".transforms", ".utils")
    stubs = {f"torchvision{name}": _Stub(f"torchvision{name}") for name in names}
    before = dict(sys.modules)
    sys.modules.update(stubs)
    for name, stub in stubs.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(stubs[parent], child, stub)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("inversefed.reconstruction_algorithms")
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - set(before):
            if name.startswith(("inversefed", "torchvision")):
                del sys.modules[name]


def checkout(root: Path | None, attack: str) -> Path:
    """The folder under ``root`` that holds an attack's published code."""
    found = sorted(root.glob(f"*{FOLDERS[attack]}")) if root is not None else []
    if not found:
        raise gx.GGLError(
            f"code: {attack} needs a folder that holds a checkout whose name ends in "
            f"{FOLDERS[attack]!r}, got {root}; clone the repository and give the folder around it"
        )
    return found[0]


def torch_side(case: Case):
    """Network, update (agreed with ours) and start, in torch."""
    import torch

    network = torch_network(case.variables)
    image = torch.tensor(2 * case.image - 1).permute(2, 0, 1)[None]
    label = torch.tensor([case.label])
    loss = torch.nn.functional.cross_entropy(network(image), label)
    update = torch.autograd.grad(loss, list(network.parameters()))
    ours = flat(case.observed)
    for (name, _), theirs in zip(network.named_parameters(), update, strict=True):
        expected = _axes(ours[name.removeprefix("params-").replace("-", "/")])
        error = np.linalg.norm(theirs.numpy() - expected)
        if error > 1e-4 * np.linalg.norm(expected) + 1e-6:
            raise gx.GGLError(f"update: the sides disagree on {name} by {error:.3g}")
    return network, [g.detach() for g in update], label


def picture(x) -> np.ndarray:
    """A torch image [1 3 h w] in [-1, 1] as [h w 3] in [0, 1]."""
    return np.clip((x.detach().numpy()[0].transpose(1, 2, 0) + 1) / 2, 0, 1)


def their_lbfgs(case: Case, steps: int, *, soft_labels: bool) -> Outcome:
    """DLG or iDLG as published: torch's LBFGS, whose iterations take up to 20 evaluations."""
    import torch
    from torch.nn import functional as f

    network, update, label = torch_side(case)
    pixels = case.image.size
    shaped = case.start[:pixels].reshape(case.image.shape).transpose(2, 0, 1)[None]
    x = torch.tensor(np.ascontiguousarray(shaped)).requires_grad_()
    logits = torch.tensor(case.start[None, pixels:]).requires_grad_()
    search = torch.optim.LBFGS([x, logits] if soft_labels else [x])
    losses: list[float] = []
    psnrs: list[float] = []

    def closure():
        search.zero_grad()
        prediction = network(x)
        if soft_labels:
            loss = -(f.softmax(logits, -1) * f.log_softmax(prediction, -1)).sum(-1).mean()
        else:
            loss = f.cross_entropy(prediction, label)
        gradients = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        distance = sum(((g - y) ** 2).sum() for g, y in zip(gradients, update, strict=True))
        distance.backward()
        losses.append(distance.item())
        psnrs.append(psnr(picture(x), case.image))
        return distance

    began = time.perf_counter()
    while len(losses) < steps:
        search.step(closure)
    seconds = time.perf_counter() - began
    return Outcome(picture(x), np.asarray(losses), np.asarray(psnrs), seconds)


def _their_reconstructor(case: Case, folder: Path, name: str, steps: int, config: dict, generator):
    """One of the published reconstructors, started where we say and watched."""
    import torch

    network, update, label = torch_side(case)
    losses: list[float] = []
    psnrs: list[float] = []
    half = torch.full((1, 3, 1, 1), 0.5)
    with published(folder) as algorithms:
        shared = {
            **{"signed": True, "indices": "def", "weights": "equal", "lr": 0.1, "optim": "adam"},
            **{"restarts": 1, "max_iterations": steps, "init": "randn", "filter": "none"},
            **{"lr_decay": True, "scoring_choice": "loss"},
            **config,
        }
        models = (network,) if generator is None else (network, generator)
        machine = getattr(algorithms, name)(*models, (half, half), shared)
        if generator is None:
            shaped = case.start.reshape(case.image.shape).transpose(2, 0, 1)
            start = torch.tensor(np.ascontiguousarray(shaped))[None, None]
        else:
            start = torch.tensor(case.start)[None, None]
        machine._init_images = lambda shape: start.clone()
        closure_of = machine._gradient_closure
        to_image = (lambda x: x) if generator is None else generator

        def watched(optimizer, x, *rest):
            closure = closure_of(optimizer, x, *rest)

            def run():
                with torch.no_grad():
                    psnrs.append(psnr(picture(to_image(x)), case.image))
                loss = closure()
                losses.append(loss.item())
                return loss

            return run

        machine._gradient_closure = watched
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            found, _ = machine.reconstruct(update, label, img_shape=tuple(start.shape[2:]))
        seconds = time.perf_counter() - began
        with torch.no_grad():
            image = picture(to_image(found))
    return Outcome(image, np.asarray(losses), np.asarray(psnrs), seconds)


def their_ig(case: Case, steps: int, folder: Path) -> Outcome:
    """Inverting Gradients by its published code."""
    config = {"boxed": True, "cost_fn": "sim", "total_variation": TOTAL_VARIATION}
    return _their_reconstructor(case, folder, "GradientReconstructor", steps, config, None)


def their_ggl(case: Case, steps: int, folder: Path, params: dict) -> Outcome:
    """GGL by Adam by its published code, with the settings of its 32x32 script."""
    config = {
        **{"boxed": False, "cost_fn": "l2", "total_variation": 0, "optim_noise": 0, "KL": 0.1},
        **{"l2_penalty": 0, "EOT_DP": 0.0, "EOT_C": 0, "perturb_rep": 0},
    }
    name = "GeneratorBasedGradientReconstructor"
    return _their_reconstructor(case, folder, name, steps, config, torch_generator(params))


# --------------------------------------------------------------------------------------------------
# Ours
# --------------------------------------------------------------------------------------------------


def our_attack(name: str, model, prior, steps: int) -> Attack:
    """The attack with the published code's settings, one restart."""
    options: dict[str, Any] = {"restarts": 1, "steps": steps}
    if name == "ig":
        options["regularizer"] = f"total_variation:{TOTAL_VARIATION}"
    if name == "ggl":
        options["optimizer"] = "adam"
    return gx.search_attack(model, prior, gx.search_of("code", name, **options))


def ours(attack: Attack, case: Case, steps: int, prior_params) -> Outcome:
    """Our side, an evaluation a step; compiled before the clock starts."""
    problem = Problem(case.observed, case.variables, prior_params, jnp.asarray([case.label]), {})
    key = jax.random.key(0)
    state = attack.init(key, problem, jnp.asarray(case.start)[None])
    step = jax.jit(attack.step).lower(key, problem, state).compile()
    losses, visited = [], []
    began = time.perf_counter()
    for _ in range(steps):
        state, info = step(key, problem, state)
        losses.append(info.losses[0])
        visited.append(info.latents)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began

    @jax.jit
    def image_of(point):
        here = state._replace(latents=point, losses=jnp.zeros(1))
        return attack.candidates(problem, here).images[0, 0]

    psnrs = [psnr(np.asarray(image_of(point)), case.image) for point in visited]
    found = np.clip(np.asarray(image_of(state.latents)), 0, 1)
    return Outcome(found, np.asarray(losses), np.asarray(psnrs), seconds)


# --------------------------------------------------------------------------------------------------
# Both
# --------------------------------------------------------------------------------------------------


def compare(
    attack: str,
    image: np.ndarray,
    *,
    steps: int,
    code: Path | None = None,
    label: int = 1,
    seed: int = 0,
) -> tuple[Outcome, Outcome]:
    """Theirs and ours on one image's update.

    Args:
        attack: "dlg", "idlg", "ig" or "ggl".
        image: [32 32 3] in [0, 1].
        steps: evaluations, at least 1.
        code: the folder that holds the checkouts; None will do for "dlg" and "idlg".
        label: of the image, 0 or 1.
        seed: of the weights, and with it of the start.

    Raises:
        GGLError: no checkout there, or the sides disagree on the update.
    """
    folder = checkout(code, attack) if attack in FOLDERS else None
    model, prior, params = gx.resnet18(2, image.shape), None, {}
    variables = jax.jit(model.init)(jax.random.key(seed))
    if attack == "ggl":
        prior, params, _ = gx.load_prior("dcgan32_faces")
    update = jax.jit(functools.partial(gx.gradient, model))
    images = jnp.asarray(image, jnp.float32)[None]
    size = image.size if prior is None else prior.latent_dim
    size += 2 if attack == "dlg" else 0
    case = Case(
        image=np.asarray(image, np.float32),
        label=label,
        variables=variables,
        observed=update(variables, images, jnp.asarray([label])),
        start=np.random.default_rng(seed).standard_normal(size).astype(np.float32),
    )
    if folder is None:
        theirs = their_lbfgs(case, steps, soft_labels=attack == "dlg")
    elif attack == "ig":
        theirs = their_ig(case, steps, folder)
    else:
        theirs = their_ggl(case, steps, folder, params)
    return theirs, ours(our_attack(attack, model, prior, steps), case, steps, params)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.published", description=(__doc__ or "").split("\n\n")[0]
    )
    found.add_argument("--code", type=Path, help="folder that holds the published checkouts")
    found.add_argument("--data", type=Path, required=True, help=".npz with images")
    found.add_argument("--attacks", nargs="+", choices=list(STEPS), default=["idlg", "ig", "ggl"])
    found.add_argument("--steps", type=int, help=f"evaluations; by default {STEPS}")
    found.add_argument(
        "--images",
        nargs="+",
        type=int,
        default=[2344, 614, 46],
        help="indices; by default three of those that the shipped prior was not trained on",
    )
    found.add_argument("--label", type=int, default=1, help="of all images")
    found.add_argument("--seed", type=int, default=0, help="of the weights and the start")
    found.add_argument("--out", type=Path, help="results file; by default named for the device")
    return found


def row_of(found: Outcome, image: np.ndarray, steps: int) -> dict[str, Any]:
    """One side's result as the results file has it."""
    quarter = slice(steps // 4 - 1, None, max(1, steps // 4))
    return {
        "evaluations": len(found.losses),
        "seconds": found.seconds,
        "lowest_loss": float(found.losses.min()),
        "psnr": psnr(found.image, image),
        "losses_by_quarter": found.losses[quarter].tolist(),
        "psnrs_by_quarter": found.psnrs[quarter].tolist(),
    }


def show(rows: list[dict[str, Any]], console: Console) -> dict[str, float]:
    """Print the table, and each attack's mean gap in dB, ours minus the published."""
    table = Table("attack", "image", "side", "evaluations", "seconds", "lowest loss", "PSNR, dB")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("attack", "image", "side", "evaluations")),
            f"{row['seconds']:.0f}",
            f"{row['lowest_loss']:.4f}",
            f"{row['psnr']:.2f}",
        )
    console.print(table)
    gaps = {}
    for attack in dict.fromkeys(row["attack"] for row in rows):
        theirs, ours = (
            np.mean([r["psnr"] for r in rows if (r["attack"], r["side"]) == (attack, side)])
            for side in ("published", "ours")
        )
        gaps[attack] = float(ours - theirs)
        console.print(f"{attack}: ours {gaps[attack]:+.2f} dB beside the published, mean")
    return gaps


def main(argv=None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    options, console = parser().parse_args(argv), Console()
    with np.load(options.data) as archive:
        images = archive["images"][options.images].astype(np.float32) / 255
    known = {name: getattr(options, name) for name in ("code", "label", "seed")}
    rows = []
    for attack in options.attacks:
        steps = options.steps or STEPS[attack]
        for index, image in zip(options.images, images, strict=True):
            sides = compare(attack, image, steps=steps, **known)
            for side, found in zip(("published", "ours"), sides, strict=True):
                what = {"attack": attack, "image": index, "side": side}
                rows.append(what | row_of(found, image, steps))
                console.log(f"{attack} {index} {side}: {rows[-1]['psnr']:.2f} dB")
    gaps = show(rows, console)
    import torch

    device = jax.devices()[0].device_kind
    about = {
        "device": device,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
    }
    result = {
        "label": options.label,
        "seed": options.seed,
        "total_variation": TOTAL_VARIATION,
        "ours_minus_published": gaps,
        "rows": rows,
    }
    save(options.out, f"published-{slug(device)}", about, result)


if __name__ == "__main__":
    main()
