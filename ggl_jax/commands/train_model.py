"""``ggl-jax train-model``: train the federated model, and keep its weights at chosen rounds."""

import dataclasses
from pathlib import Path
from typing import Any

from ggl_jax import grammar
from ggl_jax.audit import trained
from ggl_jax.audit.trained import CheckpointSettings
from ggl_jax.client.models import MODELS
from ggl_jax.commands._shared import AuditBar, about, count_classes, load_labelled, load_model, say
from ggl_jax.spec import Count, Setup


@dataclasses.dataclass(frozen=True)
class TrainModelCommand:
    """Train the federated model on public images, and keep its weights at chosen rounds.

    By federated averaging, under a defense if one is given; with --clients 1 centrally. Each
    checkpoint (out/round-20) is for --weights of ggl-jax audit, sweep, reproduce, utility and
    attack, and has a card with its accuracy. After Ctrl-C the same command
    goes on.
    """

    data: str
    """Public images with labels, as for ggl-jax audit."""
    out: Path = Path("model")
    """Folder for the checkpoints."""
    model: str = "resnet18"
    """Federated model, as for ggl-jax audit. With batch_norm=train the running statistics follow
    the batches', so that the weights serve for batch_norm=eval, too."""
    weights: str = "random"
    """Its first weights, as for ggl-jax audit."""
    num_classes: Count | None = None
    """Its classes (default: those of its weights or of the data)."""
    image_size: Count = 32
    """Pixels of a side that images are scaled to; those of the prior that attacks will have."""
    defense: str = "none"
    """What every client does to its updates, as for ggl-jax audit."""
    training: CheckpointSettings = dataclasses.field(default_factory=CheckpointSettings)


def run(command: TrainModelCommand, argv: list[str]) -> int:
    """``ggl-jax train-model``."""
    dataset = load_labelled(command.data, command.image_size)
    named = ("data", "model", "weights", "num_classes")
    setup = Setup(**{name: getattr(command, name) for name in named})
    classes = count_classes(dataset, dataset.labels, command.num_classes)
    shape = dataset.images.shape[1:]
    model, variables = load_model(setup, classes, shape)
    kept: list[Path] = []
    try:
        with AuditBar() as bar:
            for path, card in trained.train_model(
                dataset.images,
                dataset.labels,
                model=model,
                out=command.out,
                defense=command.defense,
                settings=command.training,
                variables=variables,
                in_eval=_in_eval(command.model, model),
                about={**about(argv), **{name: getattr(command, name) for name in named[:3]}},
                progress=bar,
            ):
                kept.append(path)
                say(f"{path}: {_accuracy(card)}")
    except KeyboardInterrupt:
        say(f"Interrupted. Kept: {', '.join(map(str, kept)) or 'nothing yet'}.")
        return 130
    say(f"Use them with --model {command.model} --weights {kept[-1]}")
    return 0


def _in_eval(text: str, model: Any) -> Any:
    """The model in eval mode, where its text says training mode; else None."""
    sizes = {"num_classes": model.num_classes, "image_shape": model.image_shape}
    kind, options = grammar.read(MODELS, text, what="model", offered=tuple(sizes))
    if options.get("batch_norm") != "train":
        return None
    return MODELS[kind](**sizes, **{**options, "batch_norm": "eval"})


def _accuracy(card: dict[str, Any]) -> str:
    """A checkpoint's accuracy in words."""
    text = f"accuracy {100 * card['accuracy']:.1f} %"
    if card["accuracy_in_eval"] is not None:
        text += f" ({100 * card['accuracy_in_eval']:.1f} % in eval mode)"
    majority = f"commonest class {100 * card['majority']:.1f} %"
    return f"{text} on {card['num_test']:,} images held out; {majority}"
