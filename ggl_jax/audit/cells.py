"""What a run is made of: its inputs, checked once, and its cells, named by what they compute."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ggl_jax import grammar, machine
from ggl_jax.adversary.attacks import members
from ggl_jax.adversary.optimizers import OPTIMIZERS
from ggl_jax.adversary.reconstruct import Prepared, prepare
from ggl_jax.audit import identity, metrics
from ggl_jax.audit.lpips import get_backbone
from ggl_jax.client import defenses as client_defenses
from ggl_jax.client.defenses.transformations import as_defense
from ggl_jax.errors import GGLError, check_once, printable
from ggl_jax.files import digest
from ggl_jax.gate.arguments import as_images, as_labels, as_options, as_suspects, check_data
from ggl_jax.gate.defenses import check_defense
from ggl_jax.gate.models import check_model, check_values, check_variables
from ggl_jax.gate.parts import check_attack, check_metric, check_optimizer
from ggl_jax.gate.priors import check_prior
from ggl_jax.grammar import at_least
from ggl_jax.priors import load_prior
from ggl_jax.spec import Client, Search, Seed, Speed, check, checked
from ggl_jax.types import Defense, Model, Public, PyTree

# Streams of the run's key: the federated model's weights, the adversary's public samples, and those
# behind bounds. Instances fold in their image index, which never gets as large.
MODEL_STREAM, PUBLIC_STREAM, BOUND_STREAM = 2**31 - 1, 2**31 - 2, 2**31 - 3


@dataclasses.dataclass(eq=False)
class Inputs:
    """What all cells of a run share: the private images, what is public, and how it is judged.

    Those of a sweep over models or weights differ in these alone.

    Attributes:
        images: [n h w c] the private images, floats in [0, 1].
        labels: [n] integer class labels.
        model: the federated model.
        prior: the generator that the adversary has, or the name or folder of a checkpoint; its
            images must have the model's shape.
        prior_params: the generator's parameters, where ``prior`` is not a name.
        variables: the global model's variables; None for a fresh initialisation by each seed.
        names: [n], different ones, shown in the results, what cannot be printed as an escape; by
            default image-0, image-1, ...
        instance_ids: [n], non-negative numbers that identify the images' random streams, so that a
            subset gives the same rows; by default 0, 1, ...
        others: [m h w c], images of other people among whom the private image is to be told by its
            reconstruction (:func:`ggl_jax.audit.metrics.identification_ranks`); None for no test.
        num_controls: random samples of the prior for the controls.
        ceiling_steps: Adam steps of the prior's direct fit to the private image (the ceiling).
        lpips: backbone of the LPIPS metric: "vgg" (the paper's), "alex" or "squeeze". Where its
            weights are not installed, ``lpips`` is None and ``lpips_note`` says how to get them.
        bound_samples: pairs of images behind the bound of squared error
            (:mod:`ggl_jax.audit.bounds`); 0 for none.
        speed: how losses are computed; no result depends on it but for rounding.
        mesh: of devices to share the searches out to, see :func:`ggl_jax.run_search`; None for one.
        fit: whether rows (of one round) get a ``mismatch``, by which one may choose among attacks
            without the truth (:func:`ggl_jax.adversary.reconstruct.mismatch`).
        about: entries for the folder's ``config.json``: under "options" what was asked for (by
            default these arguments), and the command, say.

    Raises:
        GGLError: for unusable input, in one line.
    """

    images: Any
    labels: Any
    model: Model
    prior: Any = "dcgan32_faces"
    prior_params: PyTree = None
    variables: PyTree | None = None
    names: Any = None
    instance_ids: Any = None
    others: np.ndarray | None = None
    num_controls: int = 400
    ceiling_steps: int = 300
    lpips: str = "vgg"
    bound_samples: int = 0
    speed: Speed = Speed()  # noqa: RUF009 (it cannot change)
    mesh: jax.sharding.Mesh | None = None
    fit: bool = False
    about: Mapping[str, Any] | None = None

    def __post_init__(self):
        if isinstance(self.prior, str):
            self.prior, self.prior_params, _ = load_prior(self.prior)
        self.speed = checked(as_options("speed", self.speed, Speed))
        get_backbone(self.lpips)  # for its error
        at_least(1, num_controls=self.num_controls, ceiling_steps=self.ceiling_steps)
        at_least(0, bound_samples=self.bound_samples)
        machine.settings()  # for its error
        self.images, self.labels = admit(self.model, self.images, self.labels, self.variables)
        check_prior(self.prior, self.prior_params, self.model)
        num = range(len(self.images))
        names = [f"image-{i}" for i in num] if self.names is None else self.names
        self.names = [printable(str(name)) for name in names]
        ids = list(num if self.instance_ids is None else self.instance_ids)
        at_least(0, **{f"instance_ids[{place}]": one for place, one in enumerate(ids)})
        self.instance_ids = [int(one) for one in ids]
        for name in ("names", "instance_ids"):
            if (given := len(getattr(self, name))) != len(num):
                raise GGLError(f"{name}: got {given} of them, allowed: {len(num)}, one per image")
        check_once("names", self.names, "give each image a name of its own")
        if self.others is not None:
            self.others = as_suspects(self.others, self.model)

    @functools.cached_property
    def perceptual(self) -> metrics.Perceptual:
        """LPIPS, as this machine can measure it."""
        return metrics.perceptual(self.lpips, self.model.image_shape)

    @functools.cached_property
    def digests(self) -> dict[str, Any]:
        """What tells these inputs from others, by content; the suspects are not asked of a cell."""
        each = zip(self.names, self.images, self.labels, self.instance_ids, strict=True)
        return {
            "images": {name: _short(image, int(label), i) for name, image, label, i in each},
            "model": identity.model_digest(self.model),
            "prior": _short(identity.prior_digest(self.prior), jax.tree.leaves(self.prior_params)),
            "variables": "" if self.variables is None else _short(jax.tree.leaves(self.variables)),
            "metrics": sorted(metrics.METRICS),
            "suspects": "" if self.others is None else _short(self.others),
            # Only where there are any, so that cells of the command line have one name.
            **({"jax": changed} if (changed := machine.settings()) else {}),
        }

    def public(self, seed: int) -> Public:
        """What both sides have under a seed."""
        variables = self.variables
        if variables is None:
            key = jax.random.fold_in(jax.random.key(seed), MODEL_STREAM)
            variables = jax.jit(self.model.init)(key)
        return Public(self.model, variables, self.prior, self.prior_params)


def _short(*parts: Any) -> str:
    return digest(*parts)[:12]


def admit(
    model: Any, images: Any, labels: Any, variables: PyTree | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images [n h w c] and labels [n] as arrays, once they, the model and its variables fit.

    Raises:
        GGLError: what does not fit, see :mod:`ggl_jax.gate`.
    """
    check_model(model)
    found, classes = as_images("images", images), as_labels(labels)
    check_data(model, found, classes)
    if variables is not None:
        check_variables(model, variables)
    check_values(model, variables)
    for name, function in metrics.own_metrics().items():
        check_metric(function, name, model, variables)
    return found, classes


class Cell(NamedTuple):
    """One unit of work: an update of one batch of images, attacked in one way.

    Attributes:
        id: 16 hexadecimal digits, of everything that determines the result.
        axes: what it is, in plain values: the defense, the seed, the images' names, and whatever
            else the run varies.
        search: how the adversary searches.
        client: the client.
        defense: the client's defense.
        seed: of everything random.
        images: positions of the batch's images.
        evaluations: gradient evaluations of the search; 0 where it cannot be built.
        inputs: what it shares with the run's other cells.
        own: digest of the defense, where it is an object; "" where it is a specification.
        why: its search cannot be built, in one line; "" where it can.
    """

    id: str
    axes: dict[str, Any]
    search: Search
    client: Client
    defense: Defense
    seed: int
    images: tuple[int, ...]
    evaluations: int
    inputs: Inputs
    own: str = ""
    why: str = ""

    @property
    def program(self) -> tuple:
        """Cells of the same program and seed can run in one batch."""
        return (self.search, self.client, self.defense, self.inputs)

    @property
    def key(self) -> jax.Array:
        """Of everything random but the model's weights, whatever else is in the run."""
        number = self.inputs.instance_ids[self.images[0]]
        return jax.random.fold_in(jax.random.key(self.seed), number)

    @property
    def private(self) -> tuple[jax.Array, np.ndarray]:
        """The batch's images [b h w c] and labels [b]."""
        at = list(self.images)
        return jax.numpy.asarray(self.inputs.images[at]), self.inputs.labels[at]


class Cells:
    """Makes cells, each named by what it computes.

    Args:
        inputs: what they share.
        told_apart: whether their names have to follow what own models, defenses and generators
            compute; without, they are good for one run only.
    """

    def __init__(self, inputs: Inputs, *, told_apart: bool = True):
        self.inputs, self.told_apart = inputs, told_apart
        self.defenses: dict[str, str] = {}
        self._parse = functools.cache(client_defenses.parse)  # one object for each text
        self._searched = functools.cache(self._search)

    def defense(self, given: Any) -> Defense:
        """A defense as it is given, by its specification, or of an optax transformation.

        Raises:
            GGLError: two defenses of one name, or one that does not keep the contract.
        """
        given, found = as_defense(given), ""
        defense = self._parse(given) if isinstance(given, str) else given
        if defense is given or identity.names_own(given):
            check_defense(defense, self.inputs.model)
            if self.told_apart:
                found = identity.defense_digest(defense, self.inputs.model)
            elif defense is given:
                found = str(id(given))
        if self.defenses.setdefault(defense.name, found) != found:
            raise GGLError(
                f"defenses: {defense.name!r} names two defenses; give each a name of its own "
                "(from_function and from_optax take name=)"
            )
        return defense

    def ready(self, search: Search, client: Client, defense: Defense) -> Prepared:
        """The search made ready; parts of the user's own are tried first.

        Raises:
            GGLError: options that do not go together, or a part that does not keep its contract.
        """
        inputs, view = self.inputs, defense.view
        for one in members(search, view):
            self.ready(one, client, defense)
        own = identity.names_own(*dataclasses.asdict(search).values())
        if own:
            steps = search.steps
            made = grammar.build(OPTIMIZERS, search.optimizer, what="optimizer", steps=steps)
            check_optimizer(made, search.optimizer)
        found = prepare(inputs.model, inputs.prior, view, client, search)
        if own:
            params, size = inputs.prior_params, client.batch_size
            check_attack(found.stages[0].attack, search.attack, inputs.model, params, view, size)
        return found

    def _search(self, search: Search, client: Client, defense: Defense) -> tuple[int, str, str]:
        """A search's evaluations, the digest of parts of the user's own, why it cannot be built."""
        inputs, own = self.inputs, ""
        try:
            ready = self.ready(search, client, defense)
            if self.told_apart and identity.names_own(*dataclasses.asdict(search).values()):
                params, size = inputs.prior_params, client.batch_size
                own = identity.search_digest(ready, inputs.model, params, defense.view, size)
        except GGLError as error:  # its cells will fail and say it, too
            return 0, "", str(error)
        return ready.evaluations, own, ""

    def make(
        self,
        axes: Mapping[str, Any],
        search: Search,
        client: Client,
        defense: Defense,
        seed: int,
        batch: tuple[int, ...],
    ) -> Cell:
        """One cell; see :class:`Cell`. A search that cannot be built has no evaluations."""
        seed, inputs = check("seed", seed, Seed), self.inputs
        names = [inputs.names[i] for i in batch]
        evaluations, own, why = self._searched(search, client, defense)
        shared = dataclasses.asdict(client)
        if client.rounds == 1:  # so that cells of one round keep their names
            del shared["rounds"]
        parts: list[Any] = [dataclasses.asdict(search), own, shared]
        for one in members(search, defense.view):  # each is what it would be alone
            parts.append(self.make(axes, one, client, defense, seed, batch).id)
        parts += [defense.name, self.defenses[defense.name], seed, names]
        if self.told_apart:
            known = dict(inputs.digests)
            del known["suspects"]  # with more private images there are others; a row says how many
            known["images"] = [known["images"][name] for name in names]
            parts += [known, inputs.num_controls, inputs.ceiling_steps, inputs.lpips]
            # Only where they are asked for, so that cells without keep their names.
            parts += [inputs.bound_samples] if inputs.bound_samples else []
        shown = {**axes, "defense": defense.name, "seed": seed, "image": ", ".join(names)}
        name, known_by = digest(parts)[:16], self.defenses[defense.name]
        how = (search, client, defense, seed, batch, evaluations, inputs, known_by, why)
        return Cell(name, shown, *how)


def image_batches(num_images: int, batch_size: int) -> list[tuple[int, ...]]:
    """Positions of the images of each batch.

    Raises:
        GGLError: the images do not split into batches of that size.
    """
    at_least(1, batch_size=batch_size)
    if num_images % batch_size:
        raise GGLError(
            f"batch_size: {num_images} images cannot be split into batches of {batch_size}; "
            "choose indices whose number is a multiple of it"
        )
    return [tuple(range(i, i + batch_size)) for i in range(0, num_images, batch_size)]
