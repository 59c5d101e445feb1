"""Weak scaling: candidates per second over devices, each with the same number of candidates.

    python -m benchmarks.devices --devices 1 2 4
    python -m benchmarks.devices --devices 1 2 --quick      # a smoke run

A CMA-ES search against a ResNet-18 at 32x32 with the shipped prior; each step's candidates are
shared out by ``ggl_jax.run_search(mesh=...)``. Every number of devices has a process of its own.
A step's time is the median after the first steps, which compile.

Without accelerators the devices are fake: XLA splits the host into several, which share its cores
and work no faster together. Constant speed is then the best there can be, and the efficiency, speed
relative to the fewest devices, shows nothing but the overhead of sharing out. On real devices the
efficiency is speed per device, relative to the fewest. The JSON goes to benchmarks/results/.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.matching import SETTINGS, in_a_process, save, slug

#: Steps that are not timed: the first one compiles.
WARM_UP = 2


def measure(devices: int, population: int, repetitions: int, spec: str) -> dict:
    """Seconds of each timed step on so many devices, and what they are; in a process of its own."""
    import jax
    import numpy as np

    import ggl_jax as gx
    from benchmarks.attack import problem_of
    from ggl_jax.commands._shared import environment

    if jax.device_count() < devices:
        raise ValueError(
            f"devices: {devices} are wanted, {jax.device_count()} ({jax.default_backend()}) found"
        )
    model = gx.resnet18(num_classes=2, image_shape=(32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0))
    prior, params, _ = gx.load_prior("dcgan32_faces")
    defense = gx.parse(spec)
    problem = problem_of(model, variables, prior, params, defense, seed=0)
    search = gx.Search(optimizer=f"cma_es:{population * devices}")
    ticks = []

    def tick(done, losses):
        jax.block_until_ready(losses)
        ticks.append(time.perf_counter())

    gx.run_search(
        gx.search_attack(model, prior, search, view=defense.view),
        jax.random.split(jax.random.key(1), 1),
        [problem],
        steps=WARM_UP + repetitions,
        steps_per_call=1,
        mesh=jax.sharding.Mesh(np.asarray(jax.devices()[:devices]), ("devices",)),
        callback=tick,
    )
    return {
        "seconds": np.diff(ticks)[WARM_UP - 1 :].tolist(),
        "fake": jax.default_backend() == "cpu",
        "about": {"kind": jax.devices()[0].device_kind, **environment()},
    }


def rows_of(measured: dict[int, dict], population: int) -> list[dict]:
    """Speed and efficiency by number of devices, from :func:`measure`'s results."""
    rows: list[dict] = []
    for devices, found in sorted(measured.items()):
        seconds = statistics.median(found["seconds"])
        rate = population * devices / seconds
        relative = rate / rows[0]["candidates_per_second"] if rows else 1.0
        more = devices / rows[0]["devices"] if rows else 1.0
        rows.append(
            {
                "devices": devices,
                "population": population * devices,
                "seconds": found["seconds"],
                "candidates_per_second": rate,
                "efficiency": relative if found["fake"] else relative / more,
            }
        )
    return rows


def main(argv=None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.devices", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4], help="how many")
    parser.add_argument("--population", type=int, default=16, help="candidates for each device")
    parser.add_argument("--repetitions", type=int, default=5, help="timed steps")
    parser.add_argument("--defense", default="none", help=f"such as {', '.join(SETTINGS)}")
    parser.add_argument("--quick", action="store_true", help="small counts: does it run at all?")
    parser.add_argument("--out", type=Path, help="results file; by default named for the device")
    options = parser.parse_args(argv)
    if options.quick:
        options.population, options.repetitions = 4, 1
    if min(*options.devices, options.population, options.repetitions) < 1:
        parser.error("devices, population and repetitions are at least 1")
    console, measured = Console(), {}
    flags = os.environ.get("XLA_FLAGS", "")
    for devices in sorted(set(options.devices)):
        # Has to be there before JAX starts; accelerators do not heed it.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
        found = in_a_process(
            measure, devices, options.population, options.repetitions, options.defense
        )
        measured[devices] = found
        console.log(f"{devices} devices: {statistics.median(found['seconds']):.2f} s a step")
    first = next(iter(measured.values()))
    rows = rows_of(measured, options.population)
    table = Table("devices", "candidates", "s a step", "candidates/s", "efficiency")
    for row in rows:
        table.add_row(
            str(row["devices"]),
            str(row["population"]),
            f"{statistics.median(row['seconds']):.2f}",
            f"{row['candidates_per_second']:.1f}",
            f"{100 * row['efficiency']:.0f} %",
        )
    console.print(table)
    if first["fake"]:
        console.print("The devices are fake and share the cores: 100 % is constant speed.")
    suffix = "-quick" if options.quick else ""
    about = first["about"]
    kind = about.pop("kind")
    about.pop("device")
    result = {
        "defense": options.defense,
        "population_per_device": options.population,
        "fake_devices": first["fake"],
        "rows": rows,
    }
    save(options.out, f"devices-{slug(kind)}-32{suffix}", {"device": kind, **about}, result)


if __name__ == "__main__":
    main()
