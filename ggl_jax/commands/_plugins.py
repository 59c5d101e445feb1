"""Parts of the user's own on the command line: ``ggl-jax --plugin FILE.py COMMAND ...``."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.adversary.losses import DISTANCES, REGULARIZERS
from ggl_jax.adversary.optimizers import OPTIMIZERS
from ggl_jax.audit.metrics import METRICS
from ggl_jax.audit.paper import EXPERIMENTS
from ggl_jax.client.defenses import DEFENSES
from ggl_jax.client.models import MODELS
from ggl_jax.errors import GGLError
from ggl_jax.gate.trying import explained
from ggl_jax.priors import PRIORS

#: What a file of the user's can add to, as ``--help`` lists it.
REGISTRIES: dict[str, Mapping[str, Any]] = {
    "defenses": DEFENSES,
    "attacks": ATTACKS,
    "optimizers": OPTIMIZERS,
    "distances": DISTANCES,
    "penalties": REGULARIZERS,
    "models": MODELS,
    "kinds of prior": PRIORS,
    "metrics": METRICS,
    "experiments": EXPERIMENTS,
}


def load(argv: list[str]) -> list[str]:
    """Run the files that ``--plugin`` names, which put their parts into registries.

    Returns:
        The arguments without them.

    Raises:
        GGLError: no such file, or one that fails.
    """
    rest, items = [], iter(argv)
    for item in items:
        name, equals, value = item.partition("=")
        if name != "--plugin":
            rest.append(item)
            continue
        path = value if equals else next(items, "")
        if not Path(path).is_file():
            raise GGLError(f"plugin: got {path!r}, allowed: a Python file that adds to a registry")
        with explained(f"plugin {path}"):
            runpy.run_path(path)
    return rest


def known() -> str:
    """The parts that are known by name, a user's own as well."""
    lines = (f"{what}: {', '.join(names)}" for what, names in REGISTRIES.items())
    return "Known by name (--plugin FILE.py adds your own): " + "; ".join(lines) + "."
