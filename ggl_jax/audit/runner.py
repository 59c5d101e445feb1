"""Runs an audit: every image against every defense, one result row for each cell."""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ggl_jax import files
from ggl_jax.adversary import estimation
from ggl_jax.adversary.labels import infer_labels, public_expectations
from ggl_jax.adversary.resume import Checkpoints
from ggl_jax.adversary.search import Stage, run_stages
from ggl_jax.adversary.strategy import AttackSettings, combines, make_stages, result_images
from ggl_jax.audit import metrics, results
from ggl_jax.audit.controls import Controls, prior_controls
from ggl_jax.client import defenses as client_defenses
from ggl_jax.client.gradients import local_update
from ggl_jax.errors import GGLError
from ggl_jax.images import assign
from ggl_jax.priors import load_prior
from ggl_jax.types import (
    OK,
    STATUS_MESSAGES,
    Context,
    Defense,
    Model,
    Prior,
    Problem,
    PyTree,
)

# Streams of an instance's key, so that defense noise and search never share random numbers.
STREAM_DEFENSE, STREAM_SEARCH, STREAM_CONTROLS = 0, 1, 2
# Streams of the run's key: the federated model's weights, and the adversary's public samples.
# Instances fold in their image index, which never gets as large.
MODEL_STREAM, PUBLIC_STREAM = 2**31 - 1, 2**31 - 2


@dataclasses.dataclass(frozen=True)
class ClientSettings:
    """What a client shares: the update of ``batch_size`` images after ``local_steps`` steps.

    With ``share_statistics`` also its batch's mean and variance at every BatchNorm layer, as
    clients do that let the server average their running statistics.
    """

    batch_size: int = 1
    local_steps: int = 1
    local_learning_rate: float = 0.01
    share_statistics: bool = False


class Cell(NamedTuple):
    """One unit of work: a batch of private images under one defense."""

    first: int
    images: jax.Array
    labels: jax.Array
    names: tuple[str, ...]
    defense: Defense


class AuditResult(NamedTuple):
    """What an audit returns.

    Attributes:
        rows: one dict for each image and defense, as in ``results.jsonl``.
        reconstructions: the images [h w c] in the order of ``rows``, float32 in [0, 1].
        controls: the controls of each image, by the image's name.
        originals: the private images by name.
    """

    rows: list[dict[str, Any]]
    reconstructions: list[np.ndarray]
    controls: dict[str, Controls]
    originals: dict[str, np.ndarray]


class AuditInterrupted(KeyboardInterrupt):
    """Ctrl-C during an audit; ``result`` holds the cells that were finished."""

    def __init__(self, result: AuditResult):
        super().__init__("the audit was interrupted")
        self.result = result


#: ``progress(phase, cell_number, num_cells, fraction, loss)``, called often.
Progress = Callable[[str, int, int, float, float | None], None]


def jsonable(value: Any) -> Any:
    """Values for JSON; infinities and NaN become None, since JSON has no such numbers."""
    if isinstance(value, dict):
        return {k: jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (np.ndarray, jax.Array)):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, (np.floating, np.integer, np.bool_)):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


class _Programs(NamedTuple):
    """The compiled client side of one defense, and the attack upon it."""

    share: Callable
    stages: list[Stage]
    search: dict[str, Any]


# Audits of the same objects, one after the other, share their compiled programs.
@functools.lru_cache(maxsize=16)
def build_programs(
    model: Model, prior: Prior, defense: Defense, client: ClientSettings, settings: AttackSettings
) -> _Programs:
    """The programs of one defense; compiled when first called."""
    client_defenses.check_local_steps(defense, client.local_steps)

    def share(key, variables, images, labels):
        update = local_update(
            model,
            variables,
            images,
            labels,
            local_steps=client.local_steps,
            learning_rate=client.local_learning_rate,
        )
        context = Context(model, variables, images, labels)
        return defense.apply(key, update, context)

    stages, search = make_stages(
        settings,
        model,
        prior,
        defense.view,
        batch_size=client.batch_size,
        local_steps=client.local_steps,
        local_learning_rate=client.local_learning_rate,
        instances=settings.instances or default_instances(model),
    )
    return _Programs(jax.jit(share), stages, search)


#: Share of a Linux process' memory mappings at which compiled programs are given up.
MAPPINGS_SHARE = 0.6


def release_programs(share: float = MAPPINGS_SHARE) -> bool:
    """Give up compiled programs before the process runs out of memory mappings.

    XLA's CPU backend maps every compiled function by itself, some thousands for one search, and
    Linux allows a process 65,530 by default: a run of some twenty different searches would die in
    LLVM with "Cannot allocate memory". Programs needed again are compiled again, or read from the
    compilation cache.

    Args:
        share: of the mappings that the system allows, in [0, 1].

    Returns:
        Whether programs were given up; False where the system does not count mappings.
    """
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as file:
            used = sum(1 for _ in file)
    except (OSError, ValueError):
        return False
    if used <= share * limit:
        return False
    jax.clear_caches()
    gc.collect()
    return True


def check_batches(num_images: int, batch_size: int) -> None:
    """Raise :class:`GGLError` unless the images split into batches of that size."""
    if batch_size < 1:
        raise GGLError(f"batch_size: got {batch_size}, allowed: whole numbers of at least 1")
    if num_images % batch_size:
        raise GGLError(
            f"batch_size: {num_images} images cannot be split into batches of {batch_size}; "
            "choose indices whose number is a multiple of it"
        )


def groups_of(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    defenses: Sequence[Defense],
    batch_size: int,
    instances: int,
) -> list[list[Cell]]:
    """The audit's cells, in groups of one defense whose searches run in one batched program.

    Groups of the first images come first, so that these are complete first.
    """
    check_batches(len(images), batch_size)
    if instances < 1:
        raise GGLError(f"instances: got {instances}, allowed: whole numbers of at least 1")
    starts = range(0, len(images), batch_size)

    def cell(start: int, defense: Defense) -> Cell:
        part = slice(start, start + batch_size)
        return Cell(
            first=start,
            images=jnp.asarray(images[part], jnp.float32),
            labels=jnp.asarray(labels[part], jnp.int32),
            names=tuple(names[part]),
            defense=defense,
        )

    return [
        [cell(start, defense) for start in starts[first : first + instances]]
        for first in range(0, len(starts), instances)
        for defense in defenses
    ]


def check_images(model: Model, images: np.ndarray) -> None:
    """Raise :class:`GGLError` unless ``images`` [n h w c] fit the model and lie in [0, 1]."""
    if images.ndim != 4 or images.shape[1:] != model.image_shape:
        raise GGLError(
            f"images: got shape {images.shape}, allowed: (n, *{model.image_shape}), as model "
            f"{model.name!r} takes them"
        )
    if not np.all(np.isfinite(images)) or images.min() < 0.0 or images.max() > 1.0:
        raise GGLError("images: values must be finite and lie in [0, 1]; divide uint8 by 255")


def _check_inputs(model: Model, prior: Prior, images: np.ndarray, labels: np.ndarray) -> None:
    check_images(model, images)
    if prior.image_shape != model.image_shape:
        raise GGLError(
            f"prior: {prior.name!r} makes images of shape {prior.image_shape}, but model "
            f"{model.name!r} takes {model.image_shape}; choose a prior of that size"
        )
    if labels.shape != images.shape[:1]:
        raise GGLError(
            f"labels: got shape {labels.shape}, allowed: ({len(images)},), one per image"
        )
    if labels.min() < 0 or labels.max() >= model.num_classes:
        raise GGLError(
            f"labels: got {labels.min()} to {labels.max()}, allowed: 0 to {model.num_classes - 1}; "
            "raise the model's number of classes"
        )


def audit(
    images,
    labels,
    *,
    model: Model,
    defenses: Sequence[Defense | str],
    prior: Prior | str = "dcgan32_faces",
    prior_params: PyTree = None,
    variables: PyTree | None = None,
    names: Sequence[str] | None = None,
    instance_ids: Sequence[int] | None = None,
    others: np.ndarray | None = None,
    client: ClientSettings | None = None,
    settings: AttackSettings | None = None,
    num_controls: int = 400,
    ceiling_steps: int = 300,
    lpips: str = "vgg",
    seed: int = 0,
    out: str | Path | None = None,
    controls: dict[str, Controls] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    searches: str | Path | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Audit defenses on private images: how much of each does the shared update leak?

    For each image (or batch) and defense: the client's update is computed and defended; the
    adversary infers labels and the defense's parameters from it alone, and searches the prior's
    latents; the audit then compares with the truth, beside its controls.

    Args:
        images: [n h w c], the private images, float in [0, 1].
        labels: [n] integer class labels.
        model: the federated model; see :func:`ggl_jax.from_flax` for your own.
        defenses: specifications such as "clip:4+noise:0.1", or :class:`Defense` objects.
        prior: the generator that the adversary has, or the name or folder of a checkpoint; its
            images must have the model's shape.
        prior_params: the generator's parameters, where ``prior`` is not a name.
        variables: the global model's variables; None for a fresh random initialisation.
        names: [n], shown in the results; default "image-0", ...
        instance_ids: [n], non-negative numbers that identify the images' random streams, so that
            auditing a subset gives the same rows; default 0, 1, ...
        others: [m h w c], images of other people among whom the private image is to be told by its
            reconstruction (:func:`ggl_jax.audit.metrics.identification_ranks`); None for no such
            test.
        client: batch size and local steps.
        settings: the adversary's search.
        num_controls: random samples of the prior for the controls.
        ceiling_steps: Adam steps of the prior's direct fit to the private image (the ceiling).
        lpips: backbone of the LPIPS metric: "vgg" (the paper's), "alex" or "squeeze". Where its
            weights are not installed, ``lpips`` is None and ``lpips_note`` says how to get them.
        seed: of everything random.
        out: folder for ``results.jsonl`` and the reconstructions; None writes nothing. Cells that
            an earlier run of the same audit finished there are kept and not repeated.
        controls: the controls that are known already, by the image's name.
        mesh: of devices to share the searches out to; see :func:`ggl_jax.run_search`.
        searches: folder where searches of more than five minutes keep their state meanwhile, to go
            on from there when they were killed; by default the folder "searches" in ``out``.
        progress: called as the audit goes on.

    Returns:
        An :class:`AuditResult`.

    Raises:
        GGLError: for unusable input, in one line.
    """
    client = client or ClientSettings()
    settings = settings or AttackSettings()
    if isinstance(prior, str):
        prior, prior_params, _ = load_prior(prior)
    images = np.asarray(images, np.float32)
    labels = np.asarray(labels)
    _check_inputs(model, prior, images, labels)
    perceptual = metrics.perceptual(lpips, model.image_shape)
    names = [f"image-{i}" for i in range(len(images))] if names is None else list(names)
    ids = range(len(images)) if instance_ids is None else list(instance_ids)
    parsed = [
        client_defenses.parse(d, fidelity=settings.fidelity, compare=settings.compare)
        if isinstance(d, str)
        else d
        for d in defenses
    ]
    if client.share_statistics and model.statistics is None:
        raise GGLError(
            f"share_statistics: model {model.name} has no BatchNorm layers, so there are none to "
            "share; leave it out"
        )
    key = jax.random.key(seed)
    if variables is None:
        variables = jax.jit(model.init)(jax.random.fold_in(key, MODEL_STREAM))
    # Only the labels of several images need them; one image's label is read off directly.
    public: dict[str, jax.Array] = {}
    if client.batch_size > 1:
        public_key = jax.random.fold_in(key, PUBLIC_STREAM)
        public = jax.jit(public_expectations, static_argnums=(0, 2))(
            model, variables, prior, prior_params, public_key
        )
    at_once = default_instances(model, mesh) if settings.instances is None else settings.instances
    groups = groups_of(images, labels, names, parsed, client.batch_size, at_once)
    num_cells = sum(len(group) for group in groups)
    if searches is None and out is not None:
        searches = Path(out) / "searches"
    programs = {d.name: build_programs(model, prior, d, client, settings) for d in parsed}
    result = AuditResult([], [], dict(controls or {}), dict(zip(names, images, strict=True)))
    done = 0
    store = _Store(Path(out)) if out is not None else None
    try:
        for group in groups:

            def report(phase, fraction=0.0, loss=None, done=done, group=group):
                if progress is not None:
                    work = fraction * len(group)
                    progress(f"{group[0].defense.name}: {phase}", done, num_cells, work, loss)

            keys = [jax.random.fold_in(key, ids[cell.first]) for cell in group]
            for cell, instance in zip(group, keys, strict=True):
                for position, name in enumerate(cell.names):
                    if name not in result.controls:
                        report("controls")
                        stream = jax.random.fold_in(instance, STREAM_CONTROLS)
                        result.controls[name] = prior_controls(
                            prior,
                            prior_params,
                            cell.images[position],
                            cell.labels[position],
                            jax.random.fold_in(stream, position),
                            num_samples=num_controls,
                            ceiling_steps=ceiling_steps,
                        )
            finished = [store.finished(cell) if store else None for cell in group]
            todo = [i for i, found in enumerate(finished) if found is None]
            if todo:
                keeper = None
                if searches is not None:
                    name = f"{group[todo[0]].first:04d}-{len(todo)}-{_file_name(group[0].defense)}"
                    keeper = Checkpoints(Path(searches) / name, write=jax.process_index() == 0)
                fresh = _run_group(
                    [group[i] for i in todo],
                    [keys[i] for i in todo],
                    model,
                    variables,
                    prior_params,
                    programs[group[0].defense.name],
                    client,
                    settings,
                    seed,
                    result.controls,
                    public,
                    others,
                    mesh,
                    keeper,
                    report,
                )
                for i, (rows, recs) in zip(todo, fresh, strict=True):
                    for row, rec, image in zip(rows, recs, group[i].images, strict=True):
                        pictures = result.controls[row["image"]].pictures()
                        row.update(jsonable(perceptual.row(rec, image, pictures)))
                    if store:
                        store.write(group[i], rows, recs)
                    finished[i] = rows, recs
                if keeper is not None:
                    keeper.clear()
                release_programs()
            for found in finished:
                assert found is not None
                result.rows.extend(found[0])
                result.reconstructions.extend(found[1])
            done += len(group)
    except KeyboardInterrupt:
        raise AuditInterrupted(result) from None
    finally:
        if store is not None:
            store.close()
    return result


@functools.lru_cache(maxsize=16)
def _statistics(model: Model) -> Callable:
    return jax.jit(cast(Callable, model.statistics))


def default_instances(model: Model, mesh: jax.sharding.Mesh | None = None) -> int:
    """Searches in one program: one where a single population fills the machine or its memory.

    That is on a CPU, and for images of more than 64x64 pixels. On a mesh, so many for each of its
    devices.
    """
    large = math.prod(model.image_shape[:2]) > 64 * 64
    each = 1 if large or jax.default_backend() == "cpu" else 8
    return each * (1 if mesh is None else mesh.size)


def _run_group(
    group: list[Cell],
    instances: list[jax.Array],
    model: Model,
    variables: PyTree,
    prior_params: PyTree,
    programs: _Programs,
    client: ClientSettings,
    settings: AttackSettings,
    seed: int,
    controls: dict[str, Controls],
    public: dict[str, jax.Array],
    others: np.ndarray | None,
    mesh: jax.sharding.Mesh | None,
    keeper: Checkpoints | None,
    report: Callable,
) -> list[tuple[list[dict], list[np.ndarray]]]:
    """Share, estimate, search and judge the cells of one defense; rows and pictures of each."""
    began = time.perf_counter()
    defense = group[0].defense
    problems, records = [], []
    for cell, instance in zip(group, instances, strict=True):
        report("client's update")
        observed, record = programs.share(
            jax.random.fold_in(instance, STREAM_DEFENSE), variables, cell.images, cell.labels
        )
        estimation.check_finite(observed)
        report("label and defense estimation")
        inferred = infer_labels(
            observed,
            model.head,
            batch_size=client.batch_size,
            num_steps=client.local_steps,
            fidelity=settings.fidelity,
            **public,
        )
        estimated = estimation.estimate(defense.view, observed, model.head)
        noise = estimation.noise_level(defense.view, estimated)
        statistics = None
        if client.share_statistics:
            statistics = _statistics(model)(variables, cell.images)
        problems.append(
            Problem(observed, variables, prior_params, inferred, estimated, noise, statistics)
        )
        records.append(record)
    report("compiling the search")
    search_began = time.perf_counter()
    steps = sum(stage.steps for stage in programs.stages)
    outcome = run_stages(
        programs.stages,
        jnp.stack([jax.random.fold_in(instance, STREAM_SEARCH) for instance in instances]),
        problems,
        mesh=mesh,
        checkpoints=keeper,
        callback=lambda done, losses: report("search", done / steps, float(jnp.mean(losses))),
    )
    reconstructed = result_images(settings, defense.view, programs.stages, outcome)
    # The wall-clock time of a group is shared by its cells.
    search_seconds = (time.perf_counter() - search_began) / len(group)
    seconds = (time.perf_counter() - began) / len(group)
    found = []
    for number, cell in enumerate(group):
        images, problem = reconstructed[number], problems[number]
        # Only the audit may do this: an update does not tell the order of a batch's images.
        order = assign(images, cell.images)
        status = int(outcome.status[number])
        rows, recs = [], []
        for position, name in enumerate(cell.names):
            image = jnp.asarray(images[order[position]])
            scores: dict[str, Any] = {
                metric: function(image, cell.images[position], model, variables)
                for metric, function in metrics.METRICS.items()
            }
            if others is not None:
                scores |= metrics.identification_ranks(
                    image, cell.images[position], jnp.asarray(others), model, variables
                )
                scores["suspects"] = len(others) + 1
            row = {
                "image": name,
                "batch": list(cell.names),
                "label_true": cell.labels[position],
                "label_inferred": outcome.labels[number][order[position]],
                # Of the whole batch, as multisets: an update does not tell the images' order.
                "label_accuracy": metrics.label_accuracy(outcome.labels[number], cell.labels),
                "defense": defense.name,
                "defense_true": client_defenses.summary(records[number]),
                "defense_estimated": client_defenses.summary(problem.estimated),
                "estimation_error": estimation.compare(records[number], problem.estimated),
                "attack": settings.attack,
                "adaptive": programs.search["adaptive"],
                "optimizer": programs.search["optimizer"],
                "combined": combines(settings, defense.view),
                "refined": programs.stages[-1].attack.name == "refine",
                "fidelity": settings.fidelity,
                "seed": seed,
                "evaluations": outcome.evaluations,
                "seconds": seconds,
                "search_seconds": search_seconds,
                "status": STATUS_MESSAGES[status],
                "ok": status == OK,
                # of the best restart, where the result is the mean image of all
                "loss": outcome.losses[number],
                "distance": outcome.distances[number],
                "loss_curve": _curve(np.asarray(outcome.history[number])),
                **scores,
                **controls[name].scores,
            }
            rows.append(jsonable(row))
            recs.append(np.asarray(image))
        found.append((rows, recs))
    return found


def _curve(history: np.ndarray, points: int = 48) -> list[list[float]]:
    """Steps, and the lowest loss so far after them, thinned out for the results."""
    chosen = np.unique(np.linspace(0, len(history) - 1, points).round().astype(int))
    return [(chosen + 1).tolist(), [float(f"{loss:.5g}") for loss in history[chosen]]]


def _file_name(defense: Defense) -> str:
    return "".join(c if c.isalnum() or c in ".-+" else "_" for c in defense.name)


class _Store:
    """The output folder: rows appended and synced as cells finish, pictures written before them.

    Raises:
        GGLError: another run is at work there, or its results are damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "reconstructions").mkdir(parents=True, exist_ok=True)
        self.lock = results.Lock(folder, name="lock")
        try:
            self.journal = results.Journal(folder, name="results.jsonl")
        except GGLError:
            self.lock.release()
            raise
        self.rows = {
            (row["image"], row["defense"]): row for row in results.read_journal(self.journal.path)
        }

    def finished(self, cell: Cell):
        keys = [(name, cell.defense.name) for name in cell.names]
        if not all(key in self.rows for key in keys):
            return None
        rows = [self.rows[key] for key in keys]
        recs = []
        for row in rows:
            path = self.folder / row["reconstruction"]
            if not path.exists():
                return None
            pixels = np.asarray(Image.open(path), np.float32) / 255.0
            recs.append(pixels if pixels.ndim == 3 else pixels[..., None])
        return rows, recs

    def write(self, cell: Cell, rows: list[dict], recs: list[np.ndarray]):
        for position, (row, image) in enumerate(zip(rows, recs, strict=True)):
            defense = _file_name(cell.defense)
            name = f"reconstructions/{cell.first + position:04d}_{defense}.png"
            files.write_png(self.folder / name, image)
            row["reconstruction"] = name
        self.journal.append(rows)

    def close(self) -> None:
        self.journal.close()
        self.lock.release()
