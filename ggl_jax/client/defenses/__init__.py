"""Privacy defenses, from both sides: what the client does and what the server makes of it.

A defense is a :class:`ggl_jax.types.Defense`. To add one, write a module beside these with a
factory whose hyper-parameters are keyword-only, and add it to :data:`DEFENSES`; the first
hyper-parameter is the one that ``"name:value"`` sets.
"""

import inspect
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ggl_jax.client.defenses import _checks, _traits
from ggl_jax.client.defenses.clip import clip
from ggl_jax.client.defenses.noise import identity_factor, noise
from ggl_jax.client.defenses.soteria import soteria
from ggl_jax.client.defenses.sparsify import sparsify
from ggl_jax.errors import GGLError, did_you_mean
from ggl_jax.types import Defense, Factored

__all__ = [
    "DEFENSES",
    "chain",
    "clip",
    "from_function",
    "noise",
    "none",
    "parse",
    "replaces_update",
    "soteria",
    "sparsify",
    "stages_of",
    "summary",
]


def none() -> Defense:
    """No defense: the update is shared as it is. Record and estimate are empty."""
    nothing = from_function(lambda key, update: update, name="none")
    _traits.mark(nothing.apply, shrinks=True, processes=True)
    return nothing


def from_function(
    fn: Callable,
    *,
    name: str,
    simulate: Callable | None = None,
    estimate: Callable | None = None,
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

    Returns:
        A Defense with an empty record; factored (as the identity) only where ``simulate`` is None.

    Raises:
        GGLError: ``fn`` is not callable or cannot take two or three arguments, or the name is
            empty or has a ``+``.
    """
    if not name or "+" in name:
        raise GGLError(f"name={name!r}: give the defense a name without '+', e.g. 'my_defense'")
    wants_context = _takes_context(fn, name)

    def apply(key, update, context):
        return fn(key, update, context) if wants_context else fn(key, update)

    def record(key, update, context):
        del key, update, context
        return {}

    def nothing_estimated(update, head, noise=0.0):
        del update, head, noise
        return {}

    def unchanged(estimated, update):
        del estimated
        return update

    return Defense(
        name,
        apply,
        record,
        estimate or nothing_estimated,
        simulate or unchanged,
        None if simulate else identity_factor(),
    )


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
        A Defense. Record and estimate hold one dict for each stage, under ``"0.name"``,
        ``"1.name"`` and so on (:func:`summary` flattens them). Stage i's key is
        ``fold_in(key, i)``. The factored form exists where every stage has one and no mask follows
        a scaling (a mask after clipping changes the norms that clipping saw).

    Raises:
        GGLError: Soteria in the paper's form is not the first stage. It computes the gradient
            anew from the image, so what earlier stages did would be lost.
    """
    if not defenses:
        return none()
    if len(defenses) == 1:
        return defenses[0]
    name = "+".join(d.name for d in defenses)
    for defense in defenses[1:]:
        if replaces_update(defense):
            raise GGLError(
                f"{name}: {defense.name} recomputes the gradient from the image and must come "
                f"first in a chain; move it to the front or use its fidelity='code' form"
            )
    stages = [(f"{i}.{d.name}", d) for i, d in enumerate(defenses)]

    def steps(key, update, context):
        for i, (stage, defense) in enumerate(stages):
            yield stage, defense, jax.random.fold_in(key, i), update
            update = defense.apply(jax.random.fold_in(key, i), update, context)
        yield None, None, None, update

    def apply(key, update, context):
        *_, (_, _, _, update) = steps(key, update, context)
        return update

    def record(key, update, context):
        return {
            stage: defense.record(own_key, before, context)
            for stage, defense, own_key, before in steps(key, update, context)
            if stage is not None
        }

    def estimate(update, head, noise=0.0):
        estimated = {}
        for stage, defense in reversed(stages):
            estimated[stage] = defense.estimate(update, head, noise=noise)
            if "sigma" in estimated[stage]:
                noise = jnp.hypot(jnp.asarray(noise, jnp.float32), estimated[stage]["sigma"])
        return dict(reversed(estimated.items()))

    def simulate(estimated, update):
        for stage, defense in stages:
            update = defense.simulate(estimated[stage], update)
        return update

    def factor(estimated):
        result = Factored()
        for stage, factor_of in factors:
            result = _compose(result, factor_of(estimated[stage]))
        return result

    _traits.mark(
        apply,
        replaces_update=replaces_update(defenses[0]),
        stages=tuple(one for defense in defenses for one in stages_of(defense)),
    )
    factors = [(stage, d.factor) for stage, d in stages if d.factor is not None]
    factored = len(factors) == len(stages)
    masks = scales = False
    for _, factor_of in factors:
        factored &= not (scales and _traits.has(factor_of, "masks", True))
        masks |= _traits.has(factor_of, "masks", True)
        scales |= _traits.has(factor_of, "scales", True)
    _traits.mark(factor, masks=masks, scales=scales)
    observers = [(stage, d.observe) for stage, d in stages if d.observe is not None]

    def observe(estimated, update):
        for stage, observe_in in observers:
            update = observe_in(estimated[stage], update)
        return update

    first, rewire_first = stages[0][0], defenses[0].rewire

    def rewire(estimated, variables, head):
        assert rewire_first is not None
        return rewire_first(estimated[first], variables, head)

    return Defense(
        name,
        apply,
        record,
        estimate,
        simulate,
        factor if factored else None,
        # Only a first stage can have changed the forward pass.
        None if rewire_first is None else rewire,
        observe if observers else None,
    )


def _compose(first: Factored, second: Factored) -> Factored:
    """``second`` after ``first``; not both a scale in the first and a mask in the second."""
    if first.mask is None or second.mask is None:
        mask = second.mask if first.mask is None else first.mask
    else:
        mask = jax.tree.map(jnp.multiply, first.mask, second.mask)
    if first.scale is None or second.scale is None:
        return Factored(mask, second.scale if first.scale is None else first.scale)
    before, after = first.scale, second.scale

    def scale(squares):
        own = before(squares)
        seen = jax.tree.map(lambda s, n: jnp.square(s) * n, own, squares)
        return jax.tree.map(jnp.multiply, own, after(seen))

    return Factored(mask, scale)


def replaces_update(defense: Defense) -> bool:
    """Whether the defense computes the gradient anew from the image (Soteria, paper's form).

    Such a defense ignores the update it is given; it cannot follow another defense, and defends
    one gradient step rather than the sum of several local ones.
    """
    return _traits.has(defense.apply, "replaces_update", False)


def stages_of(defense: Defense) -> tuple[Defense, ...]:
    """The stages of a chain, in the order in which they are applied; of any other, itself."""
    return _traits.has(defense.apply, "stages", (defense,))


def summary(parameters: Mapping) -> dict[str, float]:
    """The scalars of a record or estimate, as plain numbers for reports.

    Args:
        parameters: what ``record`` or ``estimate`` returned, of one defense or of a chain.

    Returns:
        E.g. ``{"bound": 4.0, "sigma": 0.1}``. Pytrees (layer bounds, masks) are left out. Where
        two stages of a chain share a name, their keys carry the stage: ``"0.clip:4.bound"``.
    """
    stages = {k: summary(v) for k, v in parameters.items() if _is_stage(k)}
    flat = {
        k: float(v)
        for k, v in parameters.items()
        if not isinstance(v, Mapping | list | tuple) and jnp.ndim(v) == 0 and v is not None
    }
    shared = [k for own in stages.values() for k in own]
    for stage, own in stages.items():
        for k, v in own.items():
            flat[f"{stage}.{k}" if shared.count(k) > 1 or k in flat else k] = v
    return flat


def _is_stage(key: str) -> bool:
    return re.match(r"\d+\.", key) is not None


#: Factories by the name used in specifications; hyper-parameters are keyword-only.
DEFENSES: dict[str, Callable[..., Defense]] = {
    "none": none,
    "noise": noise,
    "clip": clip,
    "sparsify": sparsify,
    "soteria": soteria,
}


def parse(spec: str, fidelity: str = "paper", compare: str = "published") -> Defense:
    """Build a defense from its specification, as on the command line.

    Args:
        spec: stages joined by ``+`` and applied in that order; each is ``name``, ``name:value``
            (its first hyper-parameter) or ``name:key=value,key=value``. E.g. ``"none"``,
            ``"clip:4+noise:0.1"``, ``"soteria:rate=0.8,chunk_size=32"``.
        fidelity: ``"paper"`` or ``"code"``, for the stages that do not set their own.
        compare: what the adversary compares: ``"published"``, ``"support"`` (see
            :func:`sparsify`; not under noise) or ``"undefended"`` (see :func:`soteria`).
            ``"likelihood"`` is the attack's business and accepted here.

    Returns:
        A Defense.

    Raises:
        GGLError: unknown name or hyper-parameter, a value that is no number or out of range.
    """
    _checks.fidelity("parse", fidelity)
    _checks.comparison("parse", compare)
    # The + of an exponent (1e+2) joins nothing.
    parts = [part.strip() for part in re.split(r"(?<![0-9.][eE])\+", spec)]
    if compare == "support" and any(part.partition(":")[0] == "noise" for part in parts):
        compare = "published"  # noise leaves no entry at zero
    return chain(*(_parse_stage(part, spec, fidelity, compare) for part in parts))


def _parse_stage(part: str, spec: str, fidelity: str, compare: str) -> Defense:
    name, _, values = part.partition(":")
    factory = DEFENSES.get(name)
    if factory is None:
        hint = did_you_mean(name, DEFENSES, after=" ")
        raise GGLError(
            f"defense {part!r} in {spec!r} is unknown; {hint}known: {', '.join(DEFENSES)}, "
            f"joined by +, e.g. clip:4+noise:0.1"
        )
    known = list(inspect.signature(factory).parameters)
    given: dict = {}
    for i, item in enumerate(values.split(",") if values else []):
        key, equals, text = (s.strip() for s in item.partition("="))
        if not equals:
            key, text = (known[0] if known and i == 0 else ""), key
        if key not in known or key in given:
            raise GGLError(
                f"defense {part!r}: {item!r} is not understood; {name} takes "
                f"{', '.join(known) if known else 'no arguments'}"
                + (f", e.g. {name}:{known[0]}=VALUE" if known else "")
            )
        given[key] = _value(text)
    own_fidelity = "fidelity" in given
    if "fidelity" in known:
        given.setdefault("fidelity", fidelity)
    if "compare" in known:
        given.setdefault("compare", compare)
    defense = factory(**given)
    # Two fidelities side by side must not go by the same name.
    return defense._replace(name=part) if own_fidelity else defense


def _value(text: str):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
