"""What determines a result: one tree of frozen dataclasses, for command line, TOML and Python.

Each field's docstring is its help text, its annotation says what is allowed, and the tree as a
dictionary is what ``config.json`` holds. An option is one field here.
"""

import dataclasses
import functools
import inspect
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np

from ggl_jax.errors import GGLError, about, did_you_mean

Options = ParamSpec("Options")
Made = TypeVar("Made")


class AtLeast(NamedTuple):
    """The lowest value of a finite number, beside its type: ``Annotated[int, AtLeast(1)]``.

    ``below``, if given, must not be reached: ``Annotated[float, AtLeast(0, below=1)]``.
    """

    low: float
    below: float = math.inf


class Above(NamedTuple):
    """What a finite number must exceed, beside its type: ``Annotated[float, Above(0)]``."""

    low: float


Count = Annotated[int, AtLeast(1)]
Number = Annotated[int, AtLeast(0)]
#: JAX draws by the lowest 32 bits of a seed, so that a larger one would repeat another's numbers.
Seed = Annotated[int, AtLeast(0, below=2**32)]
Positive = Annotated[float, Above(0.0)]
Share = Annotated[float, AtLeast(0.0, below=1.0)]
#: Between 0 and 1, both excluded.
Proper = Annotated[float, AtLeast(1e-30, below=1.0)]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What both sides start from."""

    data: str = "embedded"
    """Private images: embedded (a portrait that ships with scikit-image), embedded:faces,
    embedded:nonfaces, a .npz file (uint8 images [n h w 3], labels), a folder of images, or
    tfds:NAME[:SPLIT] such as tfds:celeb_a:test."""
    label: Number | None = None
    """Class label for every image, for data without labels."""
    model: str = "resnet18"
    """Federated model: resnet18, lenet, convnet, mlp, vit, or one of these with a bottleneck
    (precode:convnet, for the defense precode); with options such
    as resnet18:batch_norm=train (each batch's own statistics; eval, the running ones, is the
    published setting), resnet18:norm=group (or layer), convnet:width=32, mlp:width=256,depth=2 or
    vit:patch=4,width=96,depth=4,heads=3."""
    weights: str = "random"
    """The federated model's weights: random (by the seed), a checkpoint folder of ggl-jax
    train-model, or a .npz, .safetensors, .pt or .pth file of tensors, named as the model's
    parameters (fc/kernel, ...) or as in torch (fc.weight, ...); of torch, the whole state dict."""
    num_classes: Count | None = None
    """Classes of the federated model; by default those of its weights or of a class-conditional
    prior, else of the data."""
    prior: str = "dcgan32_faces"
    """The adversary's generator: the name of one that ships with the tool, or a checkpoint folder
    made by ggl-jax train-prior."""
    seed: Seed = 0
    """Seed of the model's weights, the noise and the search."""


@dataclasses.dataclass(frozen=True)
class Client:
    """What a client shares."""

    batch_size: Count = 1
    """Private images in each shared update, of all clients together."""
    local_steps: Count = 1
    """Local steps behind each shared update: 1 for a plain gradient, more for FedAvg."""
    local_learning_rate: Positive = 0.01
    """Step size of the local steps."""
    local_optimizer: str = "sgd"
    """What makes the local steps: sgd, sgd:momentum=0.9 (or with nesterov=True) or adam, with
    b1, b2 and eps. The update is the way that the weights went, over the step size."""
    clients: Count = 1
    """Clients whose mean update is all that the server sees (secure aggregation). Each has an equal
    part of the images and defends its own update."""
    share_statistics: bool = False
    """Clients also share their batch's mean and variance at every BatchNorm layer, for attacks with
    batch_norm among their penalties."""
    rounds: Count = 1
    """Rounds in which the same images are shared at the same weights, each time defended anew, and
    whose updates are attacked together."""


@dataclasses.dataclass(frozen=True)
class Search:
    """How the adversary searches; attacks and presets set it, in Python by gx.search_of."""

    attack: str = "ggl"
    """Attack: map (regression from gradients, then the most probable image), regression alone, ggl
    (generative gradient leakage), or a baseline on pixels: dlg, idlg, ig (inverting gradients), gi
    (GradInversion), with the options below as its authors published them. Or strongest: several of
    the preset's, without options of its own; the result nearest to the update is kept."""
    space: Literal["latents", "pixels", "whitened"] = "latents"
    """What is searched: the prior's latents; pixels, without a prior; or whitened, pixels in the
    coordinates of what the bank leaves uncertain."""
    bank: Number = 0
    """Samples of the prior from whose gradients images are read by regression, at least 2; 0 for
    none. It is computed once for all images, defenses and searches of one model, its weights and a
    label, and kept on disk."""
    labels: Literal["inferred", "smallest", "searched"] = "inferred"
    """Whether labels are read off the update (inferred: counts of each class; smallest, the
    published code's: the classes of smallest row sums, each once), or searched with the images."""
    adaptive: bool = True
    """Whether candidates' gradients go through the estimated defense before they are compared
    (published: for ggl, not for the baselines)."""
    optimizer: str = "cma_es"
    """Search: cma_es, turbo and kalman (without derivatives; kalman sees more of an update than its
    distance), adam, lbfgs (torch's plain form), lbfgs_wolfe (with a line search), or hybrid (cma_es
    whose candidates are refined by gradient steps), with options such as
    adam:0.05,schedule=ramp,signed=False or cma_es:population=20,sigma0=0.5."""
    steps: Count = 800
    """Search steps."""
    restarts: Count = 1
    """Independent searches in one batch; the lowest loss wins."""
    pool: Number = 0
    """Random samples of the prior that are compared first; the best start the searches."""
    start: Literal["zeros", "prior", "uniform", "normal", "reading"] = "zeros"
    """Where searches start without a pool: zeros, a sample of the prior, uniform in [0, 1], normal,
    or, even with a pool, reading (what regression from --bank read, further restarts at draws of
    its errors; latents at the generator's fits to these)."""
    bound: Literal["none", "tanh"] = "none"
    """tanh keeps every latent entry within (-1, 1)."""
    distance: str = "squared_l2"
    """Distance between updates: squared_l2, mean_squared_l2 (over the tensors), cosine, scaled_l2
    (to the nearest multiple of the candidate's update), likelihood (squared_l2 over twice the
    estimated noise's variance, where there is noise), or posterior (likelihood where there is
    noise, else cosine; in whitened pixels it is weighed beside the regression's own error)."""
    surrogate: Annotated[float, AtLeast(0.0)] = 0.0
    """Width of the slope that ReLU's masks get in the search's derivative, relative to what enters
    them; 0 for none, as automatic differentiation has it."""
    relative: bool = False
    """Divide distances by that of an update of zero, so that penalties weigh as much under each
    defense."""
    support: bool = False
    """Adaptive searches compare sparsified updates without noise on the entries that were shared,
    not on each candidate's own largest (published)."""
    regularizer: str = "kld:0.1"
    """Penalties on the candidate, as name:weight joined by +, or none. Names: kld, norm (kld_mean,
    norm_score in the published code), gaussian, total_variation, l2, group (consistency of the
    restarts), batch_norm (distance to the shared statistics, or else to the model's running ones),
    denoised (distance to what the prior's denoiser makes of the images)."""
    finalists: Number = 0
    """So many of the restarts go on by adam, for final-steps; 0 for none."""
    final_steps: Count = 100
    """Adam's steps on the finalists."""
    combine: Literal["best", "mean", "auto"] = "best"
    """What the result is: best (the restart of lowest loss), mean (the mean image of all restarts),
    or auto (mean where noise was added, else best)."""
    refine: Literal["none", "pixels", "generator", "auto"] = "none"
    """What becomes of the result: none, pixels (the search goes on there), generator (the mean of
    the generator's fits to it), or auto (pixels, unless the defense adds noise, which pixels would
    fit; then, after a search of whitened pixels, the mean of the result, the generator's fits to it
    and what regression read)."""
    refine_steps: Count = 300
    """Steps of the refinement in pixels."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """What results stand beside."""

    num_controls: Count = 400
    """Random samples of the prior that are scored; the mean image averages up to 8 times as many
    (at most 2,048), and the ceiling starts from the nearest of up to 16 times as many (4,096)."""
    ceiling_steps: Count = 300
    """Steps of the prior's direct fit to the private image (the ceiling)."""
    lpips: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network behind the LPIPS score: vgg (as in the paper), alex or squeeze. Its weights come with
    ggl-jax weights; without them LPIPS is left out."""
    suspects: Number = 99
    """Other images of the same data, at most, among which the private one is to be told by its
    reconstruction; 0 for none."""
    bound_samples: Number = 0
    """Pairs of images on which rests, for defenses that add Gaussian noise, the smallest squared
    error that any attack can have, and how often any can identify the image; 0 for none, 128 for a
    good one (each costs eight gradients)."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What changes how fast a result comes, but not what it is: no part of a cell's identity."""

    method: Literal["auto", "fused", "direct"] = "auto"
    """How matching losses are computed: fused (without each candidate's gradient), direct, or the
    cheaper of the two."""
    precision: Literal["default", "bfloat16", "tensorfloat32", "float32"] = "default"
    """Precision of the search's matrix products on accelerators (default: JAX's own, TF32 on recent
    GPUs). Finalists and refinement then run in float32."""
    chunk_size: Count | None = None
    """Candidates evaluated at once; by default as many as memory allows."""
    memory: Positive | None = None
    """Gigabytes for the candidates that are evaluated at once, in place of that choice."""
    instances: Count | None = None
    """Images whose searches run in one batch (default: 8 on a GPU, if they have at most 64x64
    pixels, else 1)."""


def flat(spec: Any) -> dict[str, Any]:
    """A spec's options by name; those of its parts have names of their own.

    >>> flat(Client())["batch_size"]
    1
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def replace(spec: Any, **given: Any) -> Any:
    """:func:`dataclasses.replace` that finds each option in the part that has it, and checks it.

    Args:
        spec: a dataclass of this module, or one made of them.
        **given: options by name.

    Raises:
        GGLError: no such option, a value of another type, or one out of its range.

    >>> replace(Search(), steps=5).steps
    5
    """
    known = flat(spec)
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known, after=" ")
            raise GGLError(f"{name}: no such option; {hint}allowed: {', '.join(known)}")
    hints, own = typing.get_type_hints(type(spec), include_extras=True), {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if dataclasses.is_dataclass(value):
            part = {k: v for k, v in given.items() if k in flat(value)}
            own[field.name] = replace(value, **part) if part else value
        elif field.name in given:
            own[field.name] = check(field.name, given[field.name], hints[field.name])
    return dataclasses.replace(spec, **own)


def checked(spec: Any) -> Any:
    """The spec itself, each of its options checked as :func:`replace` does."""
    return replace(spec, **flat(spec))


def check(name: str, value: Any, hint: Any) -> Any:
    """The value (a whole number as a float, where that is wanted), if the annotation allows it.

    Raises:
        GGLError: names the option, the value and what is allowed.
    """
    found = _fit(value.item() if isinstance(value, np.generic) else value, hint)
    if found is _NO:
        raise GGLError(f"{name}: got {value!r}, allowed: {allowed(hint)}")
    return found


def check_fields(spec: Any, what: str, *, but: str = "") -> None:
    """In a frozen dataclass's ``__post_init__``: keep each option as :func:`check` gives it.

    Args:
        spec: the dataclass.
        what: put before an option's name in errors.
        but: one that is left as it is.
    """
    for name, hint in options_of(type(spec)).items():
        if name != but:
            object.__setattr__(spec, name, check(f"{what}{name}", getattr(spec, name), hint))


def made(kind: Callable[..., Made], fields: Any, what: str, *needed: str) -> Made:
    """A dataclass of this kind from its fields, such as a JSON object's.

    Raises:
        GGLError: they are no object, or some are missing or unknown.
    """
    if not isinstance(fields, Mapping) or not set(needed) <= fields.keys():
        raise GGLError(f"{what}: got {fields!r}, allowed: an object with a {' and '.join(needed)}")
    known = sorted(inspect.signature(kind).parameters)
    if unknown := sorted(fields.keys() - known):
        raise GGLError(f"{what}: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return kind(**fields)


def ranged(factory: Callable[Options, Made]) -> Callable[Options, Made]:
    """A factory whose options are checked by their annotations, as :func:`check` does.

    >>> ranged(lambda *, size: size)(size=3)
    3
    """
    hints = typing.get_type_hints(factory, include_extras=True)
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: Options.args, **options: Options.kwargs) -> Made:
        given = signature.bind(*args, **options)
        with about(factory.__name__):
            for name, value in given.arguments.items():
                given.arguments[name] = check(name, value, hints.get(name, Any))
        return factory(*given.args, **given.kwargs)

    return make


_NO = object()


def _fit(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found, bound = _fit(value, args[0]), args[1]
        if found is _NO or not isinstance(bound, AtLeast | Above):
            return found
        if isinstance(bound, AtLeast):
            return found if bound.low <= found < bound.below else _NO
        return found if bound.low < found < math.inf else _NO
    if origin in (typing.Union, types.UnionType):
        return next((one for arg in args if (one := _fit(value, arg)) is not _NO), _NO)
    if origin is Literal:
        fits = any(value == one and type(value) is type(one) for one in args)
        return value if fits else _NO
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _NO
        parts = tuple(_fit(one, args[0]) for one in value)
        return _NO if any(one is _NO for one in parts) else parts
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any:
        return value
    fits = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    return value if fits else _NO


def allowed(hint: Any) -> str:
    """What an annotation allows, in words.

    >>> allowed(Count), allowed(Literal["a", "b"])
    ('whole numbers of at least 1', 'a, b')
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and isinstance(args[1], AtLeast):
        below = f" and below {args[1].below:,}" if args[1].below < math.inf else ""
        return f"{allowed(args[0])} of at least {args[1].low:g}{below}"
    if origin is Annotated and isinstance(args[1], Above):
        return f"{allowed(args[0])} above {args[1].low:g}"
    if origin is Annotated:
        return allowed(args[0])
    if origin is Literal:
        return ", ".join(str(one) for one in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(allowed(one) for one in args)
    if origin in (tuple, list):
        return f"a list of {allowed(args[0])}"
    words = {int: "whole numbers", float: "numbers", str: "text", bool: "True or False"}
    return words.get(hint, "None" if hint is type(None) else getattr(hint, "__name__", str(hint)))


def options_of(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass's options, and of its parts', by name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        part = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        found |= options_of(hint) if part else {name: hint}
    return found


def varying(points: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Names under which points differ, and the values there, in order.

    >>> varying([{"steps": 1, "seed": 0}, {"steps": 2, "seed": 0}])
    {'steps': [1, 2]}
    """
    found: dict[str, dict[str, Any]] = {}
    for point in points:
        for name, value in point.items():
            found.setdefault(name, {}).setdefault(str(value), value)
    return {name: list(seen.values()) for name, seen in found.items() if len(seen) > 1}


def combinations(axes: Mapping[str, typing.Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of the axes' values, the last axis fastest."""
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
