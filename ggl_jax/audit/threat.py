"""What the adversary of an audit knows, in the letters of a published table and in words.

The letters A to H are those of Carletti, Foggia, Mazzocca, Parrella and Vento, "SoK: Gradient
Inversion Attacks in Federated Learning" (USENIX Security 2025), table of threat models. (Issues and
papers sometimes take them for those of "SoK: Gradient Leakage in Federated Learning", arXiv
2404.05403, which has no such letters.)
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ggl_jax.adversary.attacks import ATTACKS
from ggl_jax.audit.tables import WORDS
from ggl_jax.spec import Client, Search
from ggl_jax.types import Model, Prior

#: Threat models by letter, each knowing what those before it know. F, G and H are servers that
#: change the model or choose clients: no audit here plays them.
NAMES = {
    "A": "eavesdropper",
    "B": "informed eavesdropper",
    "C": "parameter-aware eavesdropper",
    "D": "data-enhanced eavesdropper",
    "E": "statistical-informed eavesdropper",
}


class ThreatModel(NamedTuple):
    """What one kind of cells gives its adversary.

    Attributes:
        letter: a key of :data:`NAMES`, the first whose row has all that is used.
        knows: in words, one entry for each kind of knowledge.
    """

    letter: str
    knows: tuple[str, ...]

    def sentence(self) -> str:
        """One line for reports."""
        return f"{self.letter} ({NAMES[self.letter]}), who knows {'; '.join(self.knows)}"


def threat_model(search: Search, client: Client, model: Model, prior: Prior) -> ThreatModel:
    """What an adversary has who searches so, told by what its functions are given and use.

    A: the update, the model and its weights, the number of images. B: besides, what every image is
    like (a penalty such as total variation). C: the client's training, where it is more than one
    plain gradient step. D: public data, wherever the prior is looked at: by the search, by
    regression, by attacks of the user's own, or for the labels of several images. E: the BatchNorm
    statistics of the private batch itself, where clients share them.
    """
    shipped = isinstance(ATTACKS.get(search.attack), Search)
    training = _training(client)
    counted = client.batch_size > 1 and search.labels == "inferred"
    drawn = search.space != "pixels" or search.bank > 0 or search.pool > 0
    public = drawn or search.start == "prior" or counted or not shipped
    penalised = search.regularizer != "none" or search.refine != "none"
    used = {"A": True, "B": penalised, "C": training, "D": public, "E": client.share_statistics}
    letter = max(letter for letter, own in used.items() if own)
    num = client.batch_size
    update = "update" if client.rounds == 1 else f"updates in {client.rounds} rounds at one state"
    knows = [
        f"the model ({model.name}) and its weights",
        f"the {update} of " + ("one image" if num == 1 else f"{num} images and their number"),
        f"the client's training ({', '.join(training)})" if training else "that it is a gradient",
        _statistics(client, model),
        WORDS["labels"][search.labels],
        "the kind of defense, whose parameters are estimated from the update"
        if search.adaptive
        else "nothing of the defense (not adaptive)",
    ]
    if drawn or search.start == "prior" or not shipped:
        knows.append(f"public images, through the prior {prior.name}")
    elif public:
        knows.append(f"public images for the labels alone, through the prior {prior.name}")
    else:
        knows.append("no public images")
    return ThreatModel(letter, tuple(knows))


def _training(client: Client) -> list[str]:
    """What of the client's training is not the default, but for what is told elsewhere."""
    apart, usual = ("batch_size", "share_statistics", "rounds"), dataclasses.asdict(Client())
    given = dataclasses.asdict(client).items()
    found = {name: value for name, value in given if name not in apart and value != usual[name]}
    if client.local_steps > 1:
        found["local_learning_rate"] = client.local_learning_rate
    elif set(found) <= {"local_learning_rate"}:
        return []  # of a single gradient the step size changes nothing
    return [f"{name.replace('_', ' ')} {value}" for name, value in found.items()]


def _statistics(client: Client, model: Model) -> str:
    if model.statistics is None:
        return "that there is no BatchNorm"
    if client.share_statistics:
        return "the batch's own BatchNorm statistics, which the client shares"
    return "of BatchNorm what the model holds, not the batch's statistics"


def declared(entries: Sequence[Mapping[str, Any]]) -> str:
    """One line of a report on the threat models of its cells.

    Args:
        entries: of a ``config.json``, at least one: their dictionaries.
    """
    models = [ThreatModel(one["letter"], tuple(one["knows"])) for one in entries]
    if len(models) == 1:
        return f"Threat model: {models[0].sentence()}."
    letters = ", ".join(
        f"{letter} ({NAMES[letter]}{f', {num} kinds' if num > 1 else ''})"
        for letter, num in sorted(collections.Counter(one.letter for one in models).items())
    )
    common = [part for part in min(models).knows if all(part in one.knows for one in models)]
    every = f" All know {'; '.join(common)}." if common else ""
    return f"Threat models: {letters}; config.json has what each knows.{every}"
