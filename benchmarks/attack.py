"""Seconds of a whole attack, compiled and not: by default the paper's, 800 steps of 50 candidates.

    python -m benchmarks.attack                     # 40,000 evaluations a defense
    python -m benchmarks.attack --steps 40          # 2,000
    python -m benchmarks.attack --instances 8       # eight images in one batch

The victim is a random image, the model a ResNet-18 at 32x32, the prior the shipped one, the search
CMA-ES. Each defense runs twice: the first run holds the compilation (its share is the difference).
The JSON goes to benchmarks/results/.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import ggl_jax as gx
from benchmarks.matching import save, slug
from ggl_jax.adversary import estimation


def problem_of(model, variables, prior, params, defense, seed: int) -> gx.Problem:
    """What the server sees of a client whose image is a sample of the prior."""
    key = jax.random.key(seed)
    label = jnp.zeros((1,), jnp.int32)
    image = prior.apply(params, prior.sample_latent(key, 1), label)

    def share(variables):
        update = gx.gradient(model, variables, image, label)
        return defense.apply(key, update, gx.Context(model, variables, image, label))[0]

    observed = jax.jit(share)(variables)
    estimated = estimation.estimate(defense.view, observed, model.head)
    noise = estimation.noise_level(defense.view, estimated)
    return gx.Problem(observed, variables, params, label, estimated, noise)


def main(argv=None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--steps", type=int, default=800, help="CMA-ES steps")
    parser.add_argument("--population", type=int, default=50, help="candidates per step")
    parser.add_argument("--instances", type=int, default=1, help="images in one batch")
    parser.add_argument(
        "--defenses",
        nargs="+",
        default=["none", "noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8"],
    )
    parser.add_argument("--out", type=Path, help="results file; by default named for the device")
    options = parser.parse_args(argv)
    model = gx.resnet18(num_classes=2, image_shape=(32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0))
    prior, params, _ = gx.load_prior("dcgan32_faces")
    console, rows = Console(), []
    for spec in options.defenses:
        defense = gx.parse(spec)
        problems = [
            problem_of(model, variables, prior, params, defense, seed)
            for seed in range(options.instances)
        ]
        search = gx.Search(optimizer=f"cma_es:{options.population}")
        attack = gx.search_attack(model, prior, search, view=defense.view)
        keys = jax.random.split(jax.random.key(1), options.instances)
        began = time.perf_counter()
        jax.block_until_ready(gx.run_search(attack, keys, problems, steps=options.steps).losses)
        first = time.perf_counter() - began
        began = time.perf_counter()
        found = gx.run_search(attack, keys, problems, steps=options.steps)
        jax.block_until_ready(found.losses)
        seconds = time.perf_counter() - began
        evaluations = found.evaluations * options.instances
        rows.append(
            {
                "defense": spec,
                "evaluations": evaluations,
                "seconds": seconds,
                "candidates_per_second": evaluations / seconds,
                "compilation_seconds": first - seconds,
            }
        )
        console.log(f"{spec}: {seconds:.1f} s")
    table = Table("defense", "evaluations", "seconds", "candidates/s", "compilation, s")
    for row in rows:
        table.add_row(
            row["defense"],
            f"{row['evaluations']:,}",
            f"{row['seconds']:.1f}",
            f"{row['candidates_per_second']:.0f}",
            f"{row['compilation_seconds']:.1f}",
        )
    console.print(table)
    device = jax.devices()[0].device_kind
    result = {
        "steps": options.steps,
        "population": options.population,
        "instances": options.instances,
        "rows": rows,
    }
    about = {"device": device, "jax": jax.__version__}
    save(options.out, f"attack-{slug(device)}", about, result)


if __name__ == "__main__":
    main()
