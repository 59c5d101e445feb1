"""Privacy defenses, from both sides: what the client does and what the server makes of it.

A defense is a :class:`ggl_jax.types.Defense`. To add one, write a module beside these with a
factory whose hyper-parameters are keyword-only, and add it to :data:`DEFENSES`, with its strengths
in :data:`STRENGTHS`; the first hyper-parameter is the one that ``"name:value"`` sets.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from ggl_jax import grammar
from ggl_jax.client.defenses._views import nothing_estimated, unchanged
from ggl_jax.client.defenses.ats import ats
from ggl_jax.client.defenses.censor import censor
from ggl_jax.client.defenses.clip import clip
from ggl_jax.client.defenses.dropped import dropout, randomk
from ggl_jax.client.defenses.graddefense import graddefense
from ggl_jax.client.defenses.laplace import laplace
from ggl_jax.client.defenses.localdp import dpsgd, flower
from ggl_jax.client.defenses.mixup import mixup
from ggl_jax.client.defenses.noise import noise
from ggl_jax.client.defenses.nvflare import percentile, svt
from ggl_jax.client.defenses.outpost import outpost
from ggl_jax.client.defenses.precode import precode
from ggl_jax.client.defenses.qsgd import qsgd
from ggl_jax.client.defenses.sign import sign
from ggl_jax.client.defenses.soteria import soteria
from ggl_jax.client.defenses.sparsify import sparsify
from ggl_jax.client.defenses.ternary import ternary
from ggl_jax.client.defenses.topk import topk
from ggl_jax.client.local import shares_gradient
from ggl_jax.errors import GGLError
from ggl_jax.spec import Client
from ggl_jax.types import Defense, Estimate, Factored, Facts, View


def none() -> Defense:
    """No defense: the update is shared as it is. Record and estimate are empty."""
    facts = Facts(shrinks=True, processes=True)
    return from_function(lambda key, update: update, name="none", facts=facts)


def from_function(
    fn: Callable,
    *,
    name: str,
    simulate: Callable | None = None,
    estimate: Estimate | None = None,
    adds_noise: bool = False,
    noise_std: Callable | None = None,
    facts: Facts | None = None,
) -> Defense:
    """Make a defense of a function of yours.

    The adversary learns nothing of it unless you say what: by default its parameters are not
    estimated and candidates' gradients are compared undefended. Such an attack is not adaptive and
    may understate the leak; give ``simulate`` to make it so.

    Args:
        fn: ``fn(key, update) -> update`` or ``fn(key, update, context) -> update``: pure JAX. The
            update is a pytree like ``variables["params"]``, the context a
            :class:`ggl_jax.types.Context`. Of several arguments, the third counts as the context
            only if it has no default.
        name: shown in results; without ``+``, which joins the stages of a chain.
        simulate: ``simulate(estimated, update) -> update``, the adversary's version of ``fn``,
            differentiable. None leaves candidates alone.
        estimate: ``estimate(update, head, noise=0.0) -> dict`` of arrays, from the observed update.
        adds_noise: ``fn`` adds noise of your own: results are then combined, and pixels left
            alone, as under :func:`noise`. Implied by ``noise_std`` and by ``facts.gaussian``.
        noise_std: ``noise_std(estimated)`` -> standard deviation of that noise on every entry, for
            estimators of earlier stages and for the comparison by likelihood.
        facts: what an accountant of differential privacy may rely on; None for nothing.

    Of several rounds the mean of what ``fn`` gives is attacked as one update of it; where that is
    wrong, say so by ``rounds`` of the defense's :class:`ggl_jax.types.View`.

    Returns:
        A Defense with an empty record; factored (as the identity) only where ``simulate`` is None.

    Raises:
        GGLError: ``fn`` is not callable or cannot take two or three arguments, or the name is
            empty or has a ``+``.

    >>> halved = from_function(lambda key, u: jax.tree.map(lambda g: g / 2, u), name="half")
    >>> halved.apply(jax.random.key(0), {"bias": jnp.ones(2)}, None)
    ({'bias': Array([0.5, 0.5], dtype=float32)}, {})
    """
    if not name or "+" in name:
        raise GGLError(f"name={name!r}: give the defense a name without '+', e.g. 'my_defense'")
    wants_context = _takes_context(fn, name)
    facts = facts or Facts()

    def apply(key, update, context):
        return fn(key, update, context) if wants_context else fn(key, update), {}

    view = View(
        name.partition(":")[0],
        estimate or nothing_estimated,
        simulate or unchanged,
        None if simulate else lambda estimated: Factored(),
        adds_noise=adds_noise or noise_std is not None or bool(facts.gaussian),
        noise_std=noise_std,
    )
    return Defense(name, apply, view, facts)


def _takes_context(fn: Callable, name: str) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except TypeError:
        raise GGLError(
            f"{name}: fn={fn!r} is not a function; give fn(key, update) or fn(key, update, context)"
        ) from None
    except ValueError:  # some callables written in C have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    if any(p.kind == p.VAR_POSITIONAL for p in parameters) and len(positional) < 3:
        return True
    if len(positional) < 2 or required > 3:
        raise GGLError(
            f"{name}: fn takes {len(positional)} arguments; give fn(key, update) or "
            f"fn(key, update, context)"
        )
    return required == 3


def chain(*defenses: Defense) -> Defense:
    """Apply several defenses in order, e.g. clip, then noise.

    The adversary goes through the stages from the last to the first; noise found in one is passed
    to the estimators of those before it, which allow for it. Stages other than noise are not undone
    for the estimators before them: of ``noise + clip`` the noise level that is found is that after
    clipping.

    Args:
        defenses: the stages. None at all gives :func:`none`; a single one is returned as it is.

    Returns:
        A Defense. Record and estimate are tuples of the stages' (:func:`summary` flattens them).
        Stage i's key is ``fold_in(key, i)``. The factored form exists where every stage has one and
        no mask follows a scaling (a mask after clipping changes the norms that clipping saw).

    Raises:
        GGLError: Soteria in the paper's form is not the first stage. It computes the gradient
            anew from the image, so what earlier stages did would be lost.

    >>> chain(clip(bound=2.0), noise(sigma=0.5)).view.name
    'clip+noise'
    """
    if not defenses:
        return none()
    if len(defenses) == 1:
        return defenses[0]
    name = "+".join(d.name for d in defenses)
    for defense in defenses[1:]:
        if defense.facts.replaces_update:
            raise GGLError(
                f"{name}: {defense.name} recomputes the gradient from the image and must come "
                f"first in a chain; move it to the front or use its representation=False form"
            )

    def apply(key, update, context):
        records = []
        for i, defense in enumerate(defenses):
            update, record = defense.apply(jax.random.fold_in(key, i), update, context)
            records.append(record)
        return update, tuple(records)

    facts = Facts(
        replaces_update=defenses[0].facts.replaces_update,
        stages=tuple(one for defense in defenses for one in stages_of(defense)),
    )
    return Defense(name, apply, _chain_views([defense.view for defense in defenses]), facts)


def _chain_views(views: Sequence[View]) -> View:
    def estimate(update, head, noise=0.0):
        estimated = []
        for view in reversed(views):
            estimated.append(view.estimate(update, head, noise=noise))
            if view.noise_std is not None:
                noise = jnp.hypot(jnp.asarray(noise, jnp.float32), view.noise_std(estimated[-1]))
        return tuple(reversed(estimated))

    def simulate(estimated, update):
        for view, own in zip(views, estimated, strict=True):
            update = view.simulate(own, update)
        return update

    def factor(estimated):
        result: Factored | None = Factored()
        for view, own in zip(views, estimated, strict=True):
            after = None if view.factor is None else view.factor(own)
            result = None if result is None or after is None else _compose(result, after)
        return result

    rewire_first = views[0].rewire

    def rewire(estimated, variables, head):
        assert rewire_first is not None
        return rewire_first(estimated[0], variables, head)

    def noise_std(estimated):
        # What a later stage does to an earlier one's noise is not considered.
        own = zip(views, estimated, strict=True)
        levels = [view.noise_std(found) for view, found in own if view.noise_std is not None]
        return functools.reduce(jnp.hypot, levels)

    noisy = any(view.adds_noise for view in views)
    others = any(view.on_support is not None for view in views)
    return View(
        "+".join(view.name for view in views),
        estimate,
        simulate,
        factor if all(view.factor is not None for view in views) else None,
        # Only a first stage can have changed the forward pass.
        None if rewire_first is None else rewire,
        # Noise leaves no entry at zero, so there is no support to compare on.
        None if noisy or not others else _chain_views([view.comparing(True) for view in views]),
        noisy,
        noise_std if any(view.noise_std is not None for view in views) else None,
        _rounds(views),
    )


def _rounds(views: Sequence[View]) -> str | None:
    """:attr:`ggl_jax.types.View.rounds` of a chain."""
    kinds = [view.rounds for view in views]
    for view, after in itertools.pairwise(views):
        # Of what is drawn anew, a later stage has to keep the mean, as noise does.
        drawn = view.adds_noise or view.rounds == "each"
        if drawn and not (after.simulate is unchanged and after.rounds == "mean"):
            return None
    return None if None in kinds else "each" if "each" in kinds else "mean"


def _compose(first: Factored, second: Factored) -> Factored | None:
    """``second`` after ``first``; None for a mask after a scale, which has no such form."""
    if first.scale is not None and second.mask is not None:
        return None
    if first.mask is None or second.mask is None:
        mask = second.mask if first.mask is None else first.mask
    else:
        mask = jax.tree.map(jnp.multiply, first.mask, second.mask)
    if first.scale is None or second.scale is None:
        return Factored(mask, second.scale if first.scale is None else first.scale)
    return Factored(mask, Partial(_scales_of_both, first.scale, second.scale))


def _scales_of_both(before, after, squares):
    own = before(squares)
    seen = jax.tree.map(lambda s, n: jnp.square(s) * n, own, squares)
    return jax.tree.map(jnp.multiply, own, after(seen))


def check_local_steps(defense: Defense, client: Client) -> None:
    """Raise :class:`GGLError` where a defense of single gradients is given another update."""
    if not shares_gradient(client) and defense.facts.replaces_update:
        raise GGLError(
            f"local_steps: {defense.name} recomputes a single gradient step, so it cannot defend "
            f"{client.local_steps} local steps of {client.local_optimizer}; use 1 of sgd, or its "
            "representation=False form"
        )


def stages_of(defense: Defense) -> tuple[Defense, ...]:
    """The stages of a chain, in the order in which they are applied; of any other, itself."""
    return defense.facts.stages or (defense,)


def summary(parameters: Mapping | tuple) -> dict[str, float]:
    """The scalars of a record or estimate, as plain numbers for reports.

    Args:
        parameters: what ``apply`` recorded or ``estimate`` returned, of one defense or of a chain.

    Returns:
        E.g. ``{"bound": 4.0, "sigma": 0.1}``. Pytrees (layer bounds, masks) are left out. Where
        two stages of a chain share a name, their keys carry the stage's number: ``"0.bound"``.
    """
    if isinstance(parameters, tuple):
        return merged([summary(own) for own in parameters])
    return {
        k: float(v)
        for k, v in parameters.items()
        if not isinstance(v, Mapping | list | tuple) and jnp.ndim(v) == 0 and v is not None
    }


def merged(stages: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One dict of several stages'; keys that two of them share carry the stage's number."""
    every = [key for own in stages for key in own]
    return {
        f"{i}.{key}" if every.count(key) > 1 else key: value
        for i, own in enumerate(stages)
        for key, value in own.items()
    }


#: Factories by the name used in specifications; hyper-parameters are keyword-only.
DEFENSES: dict[str, Callable[..., Defense]] = grammar.named(
    *(none, noise, clip, sparsify, soteria, sign, qsgd, ternary),
    *(topk, randomk, dropout, laplace, dpsgd, flower, percentile, svt),
    *(outpost, censor, mixup, ats, precode, graddefense),
)

#: What ``ggl-jax leaderboard`` tries: three strengths of each defense, the weakest first, in the
#: braces of a sweep; fewer where no option is one. A defense that is not here is tried as its name
#: alone makes it. Soteria comes last: training under it is slow.
STRENGTHS: dict[str, tuple[str, ...]] = {
    "none": ("none",),
    "noise": ("noise:{0.01,0.1,1}",),
    "clip": ("clip:{16,4,1}",),
    "clip+noise": ("clip:4+noise:{0.01,0.03,0.1}",),
    "sparsify": ("sparsify:{0.9,0.99,0.999}",),
    "sign": ("sign:scaled=True", "sign"),
    "qsgd": ("qsgd:{16,4,1}",),
    "ternary": ("ternary:{0,2.5,1}",),
    "topk": ("topk:{0.1,0.01,0.001}",),
    "randomk": ("randomk:{0.5,0.1,0.01}",),
    "dropout": ("dropout:{0.5,0.9,0.99}",),
    "laplace": ("laplace:{0.01,0.1,1}",),
    "dpsgd": ("dpsgd:1,multiplier={0.01,0.1,1}",),
    "flower": ("flower:{1000,100,10}",),
    "percentile": ("percentile:{10,50,90}",),
    "svt": ("svt:noise_var={10,1,0.1}",),
    "outpost": ("outpost:{0.2,0.8,3.2}",),
    "censor": ("censor:{1,5,20}", "censor:20,exact=False"),
    "mixup": ("mixup:{0.2,1,8}",),
    "ats": ("ats:{3-1-7,43-18-18,3-1-7/43-18-18}",),
    "graddefense": ("graddefense:0.1,perturbed={2,5,8}",),
    "precode": ("precode",),  # for a model with a bottleneck, whose size is its strength
    "soteria": ("soteria:{0.4,0.8,0.95}", "soteria:0.8,representation=False"),
}


#: The forms that the published code gives to defenses, where they are not the paper's.
IN_CODE: dict[str, str] = {
    "clip": "layerwise=False",
    "sparsify": "percentile=True",
    "soteria": "representation=False",
}


def in_code(spec: str) -> str:
    """A specification in the published code's forms.

    >>> in_code("clip:4+noise:0.1")
    'clip:4,layerwise=False+noise:0.1'
    """
    stages = []
    for part in grammar.split(spec):
        form = IN_CODE.get(part.partition(":")[0])
        stages.append(part if form is None else f"{part}{',' if ':' in part else ':'}{form}")
    return "+".join(stages)


def parse(spec: str) -> Defense:
    """Build a defense from its specification, as on the command line.

    Args:
        spec: stages joined by ``+`` and applied in that order; each is ``name``, ``name:value``
            (its first hyper-parameter) or ``name:key=value,key=value``. E.g. ``"none"``,
            ``"clip:4+noise:0.1"``, ``"soteria:rate=0.8,chunk_size=32"``.

    Returns:
        A Defense.

    Raises:
        GGLError: unknown name or hyper-parameter, a value that is no number or out of range.

    >>> parse("clip:4.0+noise:1e-1").name
    'clip:4+noise:0.1'
    """
    stages = [grammar.build(DEFENSES, part, what="defense") for part in grammar.split(spec)]
    return chain(*stages)
