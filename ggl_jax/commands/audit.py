"""``ggl-jax audit``: reconstruct private images from their defended gradients."""

import dataclasses
import functools
from pathlib import Path

from ggl_jax import files
from ggl_jax.audit.run import lay_out
from ggl_jax.audit.tables import counted
from ggl_jax.client.defenses import in_code, parse
from ggl_jax.commands import _devices
from ggl_jax.commands._options import Parts, Preset, Running, choice_of
from ggl_jax.commands._shared import about, determining, load_inputs, run_grid, say, write_report
from ggl_jax.errors import GGLError
from ggl_jax.spec import flat, replace

DEFENSES = ("none", "noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8", "clip:4+noise:0.1")
#: What each preset sets besides the search. Presets differ in effort, never in what is measured.
_EIGHT = {"indices": ":8", "ceiling_steps": 400}
PRESETS: dict[str, dict] = {
    "standard": _EIGHT,
    "paper": _EIGHT,
    "code": {**_EIGHT, "defenses": tuple(map(in_code, DEFENSES))},
}


@dataclasses.dataclass(frozen=True)
class AuditCommand(Parts):
    """Audit defenses: reconstruct private images from their defended gradients.

    A client shares the (defended) gradient of its private image with a federated-learning server.
    This command plays the server: it searches a face generator for the image whose own gradient
    matches what was shared, and reports how near that comes to the private image, beside what
    could have been guessed without any gradient. Results go to a folder as they are found; the same
    command continues an interrupted run.
    """

    preset: Preset = "quick"
    """How much effort: quick (1 image; minutes on two CPU cores), standard (8 images, a longer
    search), paper (8 images, each attack as published; meant for a GPU) or code (attacks and
    defenses as the published code has them). Options given here as well win over the preset's."""
    config: Path | None = None
    """A config.json of an earlier run: start from all of its options, which others given here
    change; not with --preset, --attack or --optimizer, on which further options depend."""
    indices: str = "0"
    """Which of the private images: a number, a list such as 0,3,5, or a range such as 0:8 or :8
    (the first 8, or all where there are fewer)."""
    defenses: tuple[str, ...] = DEFENSES
    """Defenses to audit, e.g. none noise:0.1 clip:4 sparsify:0.9 soteria:0.8. Join with + to apply
    one after the other. noise: standard deviation; clip: l2 bound; sparsify and soteria: share
    pruned. The published code's forms: clip:4,layerwise=False, sparsify:0.9,percentile=True,
    soteria:0.8,representation=False."""
    running: Running = dataclasses.field(default_factory=Running)
    out: Path | None = None
    """Folder for the results; by default ggl-audit-<fingerprint of the options> here."""


def defaults(argv: list[str]) -> AuditCommand:
    """The audit options before the user's own: a preset's, or those of a ``config.json``.

    They are read first, so that ``--help`` shows the values that will really be used.
    """
    chosen = choice_of(argv)
    if chosen.config is not None:
        for name in ("preset", "attack", "optimizer"):
            if getattr(chosen, name) is not None:
                raise GGLError(
                    f"{name}: got {getattr(chosen, name)!r} beside --config, which has set what "
                    f"depends on it; leave out --config or --{name}"
                )
        return read_config(chosen.config)
    command = AuditCommand(search=chosen.search)
    return replace(command, **PRESETS.get(chosen.preset or "", {}))


def read_config(path: Path) -> AuditCommand:
    """The options of an earlier run.

    Raises:
        GGLError: it is no ``config.json`` of an audit.
    """
    what, known = f"config: {path} is no config.json of ggl-jax audit", flat(AuditCommand())
    options = files.read_json(path, what).get("options")
    if not isinstance(options, dict):
        raise GGLError(f"{what}; it has no options")
    return replace(AuditCommand(), **{k: v for k, v in options.items() if k in known})


def run(command: AuditCommand, argv: list[str]) -> int:
    """``ggl-jax audit``."""
    defenses = tuple(parse(text).name for text in command.defenses)
    options = determining(replace(command, defenses=defenses), "config")
    inputs, card = load_inputs(
        command.setup,
        command.judge,
        command.speed,
        indices=command.indices,
        about={**about(argv), "options": options},
        mesh=_devices.mesh(command.running.shard),
    )
    seed = command.setup.seed
    grid = lay_out(inputs, defenses, search=command.search, client=command.client, seed=seed)
    num, images = counted(len(defenses), "defense"), counted(len(inputs.images), "image")
    say(
        f"Auditing {num} on {images} of {command.setup.data}: {inputs.model.name}, prior "
        f"{card['name']}, attack {command.search.attack}."
    )
    out = command.out or Path(f"ggl-audit-{files.digest(options, inputs.digests)[:8]}")
    return run_grid(grid, out, command.running, functools.partial(write_report, shown=True))
