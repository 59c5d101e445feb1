"""The ``ggl-jax`` command line: finds the subcommand, and turns errors into one line.

Everything that can go wrong with a user's input ends in one line and exit code 2; Ctrl-C keeps
what is finished and exits with 130.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata as metadata
import inspect
import io
import itertools
import operator
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import docstring_parser
import tyro
from rich.console import Console

from ggl_jax import files, machine
from ggl_jax.commands import _plugins
from ggl_jax.commands._options import choice_of
from ggl_jax.errors import GGLError, did_you_mean
from ggl_jax.spec import allowed, checked, options_of, replace

#: Subcommands: a module's ``run(options, argv) -> exit code``, whose annotation says the options.
#: Its ``defaults(argv)``, if any, are the options before the user's own, on which they hang. A new
#: one is one file in ``ggl_jax/commands`` and its name here.
_MODULES = (
    "audit attack sweep status report check reproduce leaderboard utility landscape train_model "
    "train_prior train_denoiser sample_prior score_prior import_prior weights info"
)
COMMANDS: dict[str, ModuleType] = {
    name.replace("_", "-"): importlib.import_module(f"ggl_jax.commands.{name}")
    for name in _MODULES.split()
}
OPTIONS: dict[str, type] = {
    name: inspect.get_annotations(one.run)["command"] for name, one in COMMANDS.items()
}


def _hint(value: str) -> str:
    """What a help text ends with; its words say what None stands for."""
    return "" if value == "None" else f"(default: {value})"


def _flowing(text: str) -> str:
    """A docstring with no line breaks but those between paragraphs, for a terminal of any width."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _explained(kind: Any) -> None:
    """Give tyro a command's docstrings so that their lines flow, and show no None."""
    kind.__doc__ = _flowing(inspect.getdoc(kind) or "")
    told = {
        one.arg_name: one.description for one in docstring_parser.parse_from_object(kind).params
    }
    for field in dataclasses.fields(kind):
        # a field of a class that this one goes on from is annotated there
        owner = next(k for k in kind.__mro__ if field.name in inspect.get_annotations(k))
        hint = owner.__annotations__[field.name]
        if dataclasses.is_dataclass(hint):
            _explained(hint)
            continue
        text = told.get(field.name)
        own = tyro.conf.arg(
            help=None if text is None else _flowing(text),
            help_behavior_hint=_hint if field.default is None else None,
        )
        owner.__annotations__[field.name] = Annotated[hint, own]


for _options in OPTIONS.values():
    _explained(_options)


def _refusal(said: str, argv: list[str]) -> str:
    """What tyro says in a box about arguments that it cannot read, in one line."""
    lines = [line.strip(" │") for line in said.splitlines()[1:]]  # without the title
    inside = itertools.dropwhile(lambda line: not line.strip("-"), lines)
    text = " ".join(itertools.takewhile(lambda line: line.strip("-─"), inside))
    # options that another command has are said in another way
    text = re.sub(r" \(applied to [^)]*\)", "", text).replace("or misplaced options", "options")
    command = argv[0] if argv and argv[0] in COMMANDS else ""
    hints = options_of(OPTIONS[command]) if command else {}
    refused = r"(?:Error parsing|Missing value|invalid choice).*?(--|t '(?!-))([\w-]+)"
    wrong = re.match(refused, text)
    name = "" if wrong is None else wrong[2].replace("-", "_")
    if name in hints:
        # A positional argument comes right after the command.
        own = f"--{name.replace('_', '-')}" if wrong and wrong[1] == "--" else command
        last = max(place for place, one in enumerate(argv) if one.partition("=")[0] == own)
        beside = itertools.takewhile(lambda one: not one.startswith("--"), argv[last + 1 :])
        given = argv[last].partition("=")[2] or " ".join(beside)
        words = allowed(hints[name])
        hint = did_you_mean(given, words.split(", "), before="; ")
        return f"{name}: got {repr(given) if given else 'nothing'}, allowed: {words}{hint}"
    unknown = re.match(r"Unrecognized options: ([^\s,]+)", text)
    before = argv[max(argv.index(unknown[1]) - 1, 0)] if unknown and unknown[1] in argv else ""
    plain = before.removeprefix("--").removeprefix("no-")
    if unknown and allowed(hints.get(plain.replace("-", "_"), str)) == allowed(bool):
        return (
            f"{plain}: got {unknown[1]!r}, but a switch takes no value; write --{plain} or "
            f"--no-{plain}"
        )
    known = [f"--{name.replace('_', '-')}" for name in hints] or list(COMMANDS)
    hint = did_you_mean(unknown[1], known, before="; ") if unknown else ""
    return f"{text.rstrip('.')}{hint}; see {' '.join(['ggl-jax', command]).strip()} --help"


def _read(argv: list[str]):
    """The command that the arguments ask for.

    Raises:
        GGLError: what cannot be read.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command = _parse(argv)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise GGLError(_refusal(said.getvalue(), argv)) from None
    print(said.getvalue(), end="", file=sys.stderr)
    return command


def _parse(argv: list[str]):
    # A subcommand's default is given to tyro so that --help shows what will be used.
    name, rest = (argv or [""])[0], argv[1:]
    defaults = getattr(COMMANDS.get(name), "defaults", None)
    own = None if defaults is None else defaults(rest)
    given = {name: {"default": own}} if own else {}
    commands: Any = functools.reduce(
        operator.or_,
        (
            Annotated[options, tyro.conf.subcommand(one, **given.get(one, {}))]
            for one, options in OPTIONS.items()
        ),
    )
    command: Any = tyro.cli(
        commands,
        prog="ggl-jax",
        args=argv,
        description="Audit privacy defenses in federated learning: what does a defended gradient "
        "still leak about the image behind it? Start with: ggl-jax audit\n\n" + _plugins.known(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if own and choice_of(rest).attack == "strongest":
        command = replace(command, attack=own.search.attack)  # with the preset's name
    if own and choice_of(rest).optimizer is not None:
        # with the preset's options of that optimiser, in its canonical spelling
        command = replace(command, optimizer=own.search.optimizer)
    return command


def _set_up_jax() -> None:
    """Fix what results depend on, and keep compiled programs in the user's cache folder."""
    import jax
    import platformdirs

    for name, value in machine.SETTINGS.items():
        jax.config.update(name, value)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    # CPU programs hold instructions of the very processor they were compiled on.
    made_for = files.digest(machine.cpu_name(), jax.__version__)[:8]
    jax.config.update(
        "jax_compilation_cache_dir",
        str(Path(platformdirs.user_cache_dir("ggl_jax")) / f"xla-{made_for}"),
    )


def run(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; None for the process's own.

    Returns:
        The exit code: 0 done, 2 unusable input (one line on stderr), 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    errors = Console(stderr=True, emoji=False)

    def say(message: str) -> int:
        errors.print(f"ggl-jax: {message}", markup=False, soft_wrap=True, highlight=False)
        return 2

    if argv == ["--version"]:
        print(f"ggl-jax {metadata.version('ggl-jax')}")
        return 0
    try:
        command = checked(_read(_plugins.load(argv)))
        _set_up_jax()
        (name,) = (name for name, options in OPTIONS.items() if type(command) is options)
        return COMMANDS[name].run(command, argv)
    except GGLError as error:
        return say(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return say(f"cannot read or write{where}: {error.strerror or error}")
    except (RuntimeError, AssertionError):
        # A device that is missing shows up where JAX first needs it, which may be anywhere.
        try:
            machine.devices()
        except GGLError as error:
            return say(str(error))
        raise
    except KeyboardInterrupt:
        errors.print("ggl-jax: interrupted", markup=False)
        return 130
