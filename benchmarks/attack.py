"""Quality over time: our attacks beside PyTorch loops in the published style, on one update.

    python -m benchmarks.attack                                          # the embedded portrait
    python -m benchmarks.attack --data celeba32_public.npz --image 2344

One undefended update of a ResNet-18 at 32x32 with random weights, and four searches one after the
other on the same device: in PyTorch, Inverting Gradients (signed Adam on pixels, cosine distance
and total variation) and GGL by CMA-ES (the shipped generator's latents, one candidate after the
other); by ggl_jax, ``map`` of preset standard at several budgets, and GGL by the same CMA-ES.
Images are judged as a search goes on, but chosen by its loss. Our compilation is left out, and the
bank of ``map``, which serves all updates of a model and label, is timed by itself. The loops are
written from the papers and need no checkout; ``benchmarks.published`` runs the published code.
The JSON goes to benchmarks/results/.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import ggl_jax as gx
from benchmarks.matching import save, slug
from benchmarks.published import Case, picture, psnr, torch_generator, torch_side
from ggl_jax.adversary.bank import bank_of
from ggl_jax.adversary.optimizers import cma_es
from ggl_jax.audit.data import load
from ggl_jax.types import Problem

#: Candidates of CMA-ES in each step, as the paper's code asks for.
POPULATION = 50
#: Steps of the whitened search and of the refinement, and how that is done: budgets of ``map``.
BUDGETS = ((1, 1, "none"), (20, 1, "none"), (60, 1, "none"), (60, 30, "auto"), (60, 150, "auto"))


class Curve(NamedTuple):
    """How far a search was after some time.

    Attributes:
        name: of the search.
        evaluations: [k], rising.
        seconds: [k], rising.
        psnrs: [k], of the image of lowest loss until then.
        losses: [k], the lowest until then.
    """

    name: str
    evaluations: list[int]
    seconds: list[float]
    psnrs: list[float]
    losses: list[float]

    def reaches(self, wanted: float, *, by: str) -> float | None:
        """Seconds until ``psnrs`` are at least, or ``losses`` at most, what is wanted."""
        values = self.psnrs if by == "psnrs" else [-loss for loss in self.losses]
        wanted = wanted if by == "psnrs" else -wanted
        found = zip(self.seconds, values, strict=True)
        return next((seconds for seconds, value in found if value >= wanted), None)


def _recorder(name: str, image: np.ndarray) -> tuple[Curve, Callable]:
    """A curve, and what appends to it after each step; judging is not counted as time."""
    curve = Curve(name, [], [], [], [])
    clock = {"best": np.inf, "spent": 0.0, "since": time.perf_counter(), "psnr": 0.0}

    def tell(evaluations: int, loss: float, image_of: Callable) -> None:
        clock["spent"] += time.perf_counter() - clock["since"]
        if loss < clock["best"]:
            clock.update(best=loss, psnr=psnr(image_of(), image))
        curve.evaluations.append(evaluations)
        curve.seconds.append(clock["spent"])
        curve.psnrs.append(clock["psnr"])
        curve.losses.append(float(clock["best"]))
        clock["since"] = time.perf_counter()

    return curve, tell


def torch_ig(case: Case, steps: int) -> Curve:
    """Inverting Gradients (Geiping et al., 2020) as a PyTorch loop, from normal noise."""
    import torch

    network, update, label = torch_side(case)
    start = np.random.default_rng(0).standard_normal((1, 3, *case.image.shape[:2]))
    x = torch.tensor(start, dtype=torch.float32).requires_grad_()
    search = torch.optim.Adam([x], lr=0.1)
    cuts = [int(steps * share) for share in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(search, cuts, gamma=0.1)
    norm = sum((y**2).sum() for y in update).sqrt()
    curve, tell = _recorder("IG, PyTorch", case.image)
    for step in range(steps):
        search.zero_grad()
        loss = torch.nn.functional.cross_entropy(network(x), label)
        found = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        inner = sum((g * y).sum() for g, y in zip(found, update, strict=True))
        distance = 1 - inner / (norm * sum((g**2).sum() for g in found).sqrt())
        rough = sum(x.diff(dim=dim).abs().mean() for dim in (2, 3))
        total = distance + 0.01 * rough
        total.backward()
        here = x.detach().clone()
        x.grad.sign_()
        search.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(-1, 1)
        tell(step + 1, total.item(), lambda here=here: picture(here))
    return curve


def torch_ggl(case: Case, params: dict, latent_dim: int, steps: int) -> Curve:
    """GGL by CMA-ES (the paper's search) as a PyTorch loop over candidates."""
    import torch

    network, update, label = torch_side(case)
    generator = torch_generator(params)

    def loss_of(z):
        with torch.no_grad():
            image = generator(z)
        loss = torch.nn.functional.cross_entropy(network(image), label)
        found = torch.autograd.grad(loss, list(network.parameters()))
        distance = sum(((g - y) ** 2).sum() for g, y in zip(found, update, strict=True))
        variance = z.var(unbiased=False)
        kld = -0.5 * (1 + torch.log(variance + 1e-10) - z.mean() ** 2 - variance)
        return (distance + 0.1 * latent_dim * kld).item()

    search = cma_es(population=POPULATION)
    state = search.init(jax.random.key(0), jnp.zeros((1, latent_dim)))
    curve, tell = _recorder("GGL by CMA-ES, PyTorch", case.image)
    for step in range(steps):

        def losses_of(latents):
            return jnp.asarray([loss_of(torch.tensor(np.asarray(z)[None])) for z in latents])

        state, info = search.step(jax.random.key(step), state, losses_of)
        best = int(np.argmin(info.losses))
        z = torch.tensor(np.asarray(info.latents[best])[None])
        tell((step + 1) * POPULATION, float(info.losses[best]), lambda z=z: picture(generator(z)))
    return curve


def our_ggl(case: Case, public: gx.Public, problem: Problem, steps: int) -> Curve:
    """GGL by CMA-ES, compiled before the clock starts."""
    search = gx.search_of("paper", "ggl", optimizer=f"cma_es:{POPULATION}", steps=steps)
    attack = gx.search_attack(public.model, public.prior, search)
    state = attack.init(jax.random.key(0), problem)
    step = jax.jit(attack.step).lower(jax.random.key(0), problem, state).compile()
    candidates = jax.jit(attack.candidates)
    candidates(problem, state)
    curve, tell = _recorder("GGL by CMA-ES, ggl_jax", case.image)
    for number in range(steps):
        state, _ = step(jax.random.key(number), problem, state)
        jax.block_until_ready(state)
        best = functools.partial(candidates, problem, state)
        tell(
            (number + 1) * POPULATION,
            float(state.losses[0]),
            lambda best=best: np.asarray(best().images[0, 0]),
        )
    return curve


def our_map(case: Case, public: gx.Public) -> tuple[Curve, float]:
    """``map`` of preset standard, each budget by itself and compiled; and the bank's seconds."""
    began = time.perf_counter()
    bank_of(public, case.label, gx.search_of("standard", "map").bank)
    bank = time.perf_counter() - began
    curve = Curve("map, ggl_jax", [], [], [], [])
    for steps, refine_steps, refine in BUDGETS:
        options = {"steps": steps, "refine_steps": refine_steps, "refine": refine}
        search = gx.search_of("standard", "map", **options)
        for _ in range(2):  # the first time holds the compilation
            began = time.perf_counter()
            shared = [gx.Shared(case.observed)]
            keys = jax.random.split(jax.random.key(0), 1)
            (found,) = gx.reconstruct(
                keys, public, shared, view=gx.parse("none").view, search=search
            )
            seconds = time.perf_counter() - began
        curve.evaluations.append(found.evaluations)
        curve.seconds.append(seconds)
        curve.psnrs.append(psnr(found.images[0], case.image))
        curve.losses.append(float(found.distance))
    return curve, bank


def compare(ours: Curve, theirs: Curve, *, by: str) -> dict:
    """Seconds in which each reaches what the other ends with; None where it does not."""
    last = {curve.name: getattr(curve, by)[-1] for curve in (ours, theirs)}
    return {
        "by": by,
        "ends": last,
        "ends_after": {curve.name: curve.seconds[-1] for curve in (ours, theirs)},
        "reaches_the_others": {
            one.name: one.reaches(last[other.name], by=by)
            for one, other in ((ours, theirs), (theirs, ours))
        },
    }


def in_words(found: dict) -> str:
    """One line of :func:`compare`."""
    unit = "{:.1f} dB" if found["by"] == "psnrs" else "a loss of {:.4g}"
    parts = []
    for name, seconds in found["reaches_the_others"].items():
        (other,) = set(found["ends"]) - {name}
        after = found["ends_after"]
        when = f"not in {after[name]:.1f} s" if seconds is None else f"after {seconds:.1f} s"
        end = f"{unit.format(found['ends'][other])}, where {other} ends ({after[other]:.1f} s)"
        parts.append(f"{name}: {end}, {when}")
    return "; ".join(parts)


def table_of(curves: Sequence[Curve]) -> Table:
    """Each curve at up to six of its points."""
    table = Table("search", "evaluations", "seconds", "PSNR, dB", "lowest loss")
    for curve in curves:
        last = len(curve.seconds) - 1
        for at in sorted({round(last * part / 5) for part in range(6)}):
            table.add_row(
                *(curve.name, f"{curve.evaluations[at]:,}", f"{curve.seconds[at]:.1f}"),
                *(f"{curve.psnrs[at]:.1f}", f"{curve.losses[at]:.4g}"),
            )
    return table


def main(argv=None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--data", default="embedded", help="images, as for ggl-jax audit")
    parser.add_argument("--image", type=int, default=0, help="its number in the data")
    parser.add_argument("--steps", type=int, default=300, help="of Inverting Gradients")
    parser.add_argument("--generations", type=int, default=20, help=f"of CMA-ES, {POPULATION} each")
    parser.add_argument("--label", type=int, default=1, help="of the image, 0 or 1")
    parser.add_argument("--out", type=Path, help="results file; by default named for the device")
    options = parser.parse_args(argv)
    image = np.asarray(load(options.data, indices=[options.image]).images[0], np.float32)
    model = gx.resnet18(num_classes=2)
    variables = jax.jit(model.init)(jax.random.key(0))
    prior, params, _ = gx.load_prior("dcgan32_faces")
    public = gx.Public(model, variables, prior, params)
    labels = jnp.asarray([options.label])
    observed = jax.jit(gx.gradient, static_argnums=0)(model, variables, image[None], labels)
    case = Case(image, options.label, variables, observed, np.zeros(0, np.float32))
    problem = Problem(observed, variables, params, labels, {})
    console = Console()
    ours, bank = our_map(case, public)
    curves = [ours, torch_ig(case, options.steps)]
    curves.append(our_ggl(case, public, problem, options.generations))
    curves.append(torch_ggl(case, params, prior.latent_dim, options.generations))
    found = [compare(*curves[:2], by="psnrs"), compare(*curves[2:], by="losses")]
    console.print(table_of(curves))
    console.print(f"bank of {gx.search_of('standard', 'map').bank} samples, once: {bank:.1f} s")
    for one in found:
        console.print(in_words(one), soft_wrap=True)
    import torch

    device = jax.devices()[0].device_kind
    about = {"device": device, "jax": jax.__version__, "torch": torch.__version__}
    about["threads"] = torch.get_num_threads()
    result = {
        **{"data": Path(options.data).name, "image": options.image, "label": options.label},
        "bank_seconds": bank,
        "curves": [curve._asdict() for curve in curves],
        "compared": found,
    }
    save(options.out, f"attack-{slug(device)}", about, result)


if __name__ == "__main__":
    main()
