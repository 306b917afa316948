"""The command line: a table of verbs. It parses, calls and prints; the work is done elsewhere.

A verb's options are the fields of its settings (`secateurs.settings`), each of which `--config run.yaml` may
give as well. A user's mistake is one line on standard error and exit status 2. An interrupted run exits with
130.
"""

import contextlib
import dataclasses
import io
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_args, get_origin

import torch
import tyro

from secateurs import ranks
from secateurs.demo import DemoSettings, demo
from secateurs.evaluation.inspect import InspectSettings, inspect, print_tables
from secateurs.evaluation.measure import EvaluateSettings, evaluate
from secateurs.evaluation.plot import PlotSettings, plot
from secateurs.evaluation.speed import BenchSettings, bench
from secateurs.evaluation.speed import table as table_of_costs
from secateurs.planning.plan import plan
from secateurs.planning.report import table as table_of_plan
from secateurs.planning.settings import PlanSettings
from secateurs.pruning.record import Report
from secateurs.pruning.settings import PruneSettings
from secateurs.pruning.walk import prune
from secateurs.recovery.report import RecoveryReport
from secateurs.recovery.run import recover
from secateurs.recovery.settings import RecoverSettings
from secateurs.report import CompareSettings, ReportSettings, SweepSettings, compare, report, sweep
from secateurs.report.compare import print_comparison
from secateurs.report.sweep import rich_table
from secateurs.runtime.chat import chat
from secateurs.runtime.convert import compress, decompress
from secateurs.runtime.generate import Pace, generate
from secateurs.runtime.serve import serve
from secateurs.runtime.settings import (
    ChatSettings,
    CompressSettings,
    DecompressSettings,
    GenerateSettings,
    ServeSettings,
)
from secateurs.settings import Option, options, read_config
from secateurs.training.profile import ProfileSettings, profile
from secateurs.training.profile import table as table_of_activity
from secateurs.training.run import train
from secateurs.training.settings import TrainSettings
from secateurs.version import __version__

MODEL = "A Hugging Face model folder with safetensors, a .gguf file, or a name on the hub. It is only read."


class Verb(NamedTuple):
    """A command."""

    settings: type[Any]
    run: Callable[..., None]
    """Given the subject, if there is one, and the settings."""
    subject: str | None = "model"
    """What it works on, the command's positional argument."""
    about: str = MODEL
    kind: Any = str
    """Of the subject, as it is typed: a tuple where there is more than one."""


def _prune(model: str, settings: PruneSettings) -> None:
    report: Report = prune(model, settings, progress=True)
    parts = [f"{report.kept_experts} kept"] if report.choice else []
    if report.layers:
        parts += [
            f"{report.sparsity:.2%} zeros in {len(report.layers)} layers",
            f"mean relative error {report.error:.4f}",
        ]
        if report.is_rounded:
            to = f" to int{report.values.bits}" if report.values else ""
            parts.append(f"of rounding{to} {report.rounding:.4f}")
    if report.tables:
        parts.append(f"{report.tabled} in int{report.settings['embedding']['bits']}")
    print(f"{report.output}: {', '.join(parts)}, {report.seconds:.1f} s")
    if report.forms:
        print(f"chosen for each matrix: {report.forms}")
        print(report.forms.against)
        print(f"{report.fitted}: secateurs compress {report.output} --output ...")
    if not report.layers:
        return
    for name, why in report.dense.items():
        print(f"left dense: {name} ({why})")
    if report.alone and report.settings["method"]["name"] == "sparsellm":
        print(f"pruned by the local solver alone: {', '.join(report.alone)}")
    if settings.recover:
        print(RecoveryReport.read(report.output))


def _plan(model: str, settings: PlanSettings) -> None:
    from rich.console import Console

    planned = plan(model, settings)
    Console().print(table_of_plan(planned))
    for line in planned.warnings:
        warnings.warn(line, stacklevel=2)


def _recover(model: str, settings: RecoverSettings) -> None:
    print(recover(model, settings, progress=True))


def _profile(model: str, settings: ProfileSettings) -> None:
    from rich.console import Console

    Console().print(table_of_activity(profile(model, settings)))


def _train(model: str, settings: TrainSettings) -> None:
    print(train(model, settings, progress=True))


def _evaluate(model: str, settings: EvaluateSettings) -> None:
    for measurement in evaluate(model, settings):
        print(measurement, flush=True)


def _inspect(model: str, settings: InspectSettings) -> None:
    print_tables(inspect(model, settings))


def _plot(folder: str, settings: PlotSettings) -> None:
    for file in plot(folder, settings):
        print(file)


def _report(folders: tuple[str, ...], settings: ReportSettings) -> None:
    print(report(folders, settings))


def _sweep(model: str, settings: SweepSettings) -> None:
    from rich.console import Console

    Console().print(rich_table(sweep(model, settings, progress=True)))
    print(Path(settings.output) / "report.html")


def _compare(models: tuple[str, ...], settings: CompareSettings) -> None:
    print_comparison(compare(*models, settings))
    if settings.output is not None:
        print(settings.output)


def _compress(model: str, settings: CompressSettings) -> None:
    print(f"{settings.output}: {compress(model, settings)}")


def _decompress(model: str, settings: DecompressSettings) -> None:
    decompress(model, settings)
    print(settings.output)


@dataclass(frozen=True)
class _GenerateSettings(GenerateSettings):
    __doc__ = GenerateSettings.__doc__

    stats: bool = False
    """Also print tokens per second and memory, on standard error."""


def _generate(model: str, settings: _GenerateSettings) -> None:
    pace = Pace()
    pieces = generate(model, settings, pace=pace)
    print(settings.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if settings.stats:
        print(pace, file=sys.stderr)


def _bench(model: str, settings: BenchSettings) -> None:
    print(table_of_costs(bench(model, settings)))


def _demo(settings: DemoSettings) -> None:
    demo(settings)


VERBS: dict[str, Verb] = {
    "prune": Verb(PruneSettings, _prune),
    "plan": Verb(
        PlanSettings,
        _plan,
        about="A model folder, of which config.json will do, a .gguf file, or a name on the hub.",
    ),
    "recover": Verb(RecoverSettings, _recover),
    "profile": Verb(ProfileSettings, _profile),
    "train": Verb(TrainSettings, _train),
    "eval": Verb(EvaluateSettings, _evaluate),
    "inspect": Verb(InspectSettings, _inspect),
    "plot": Verb(PlotSettings, _plot, "folder", "A folder that `secateurs prune` made."),
    "sweep": Verb(SweepSettings, _sweep),
    "report": Verb(ReportSettings, _report, "folders", "Folders that other verbs made.", tuple[str, ...]),
    "compare": Verb(CompareSettings, _compare, "models", f"Two of one vocabulary. {MODEL}", tuple[str, str]),
    "compress": Verb(CompressSettings, _compress),
    "decompress": Verb(DecompressSettings, _decompress),
    "generate": Verb(_GenerateSettings, _generate),
    "chat": Verb(ChatSettings, chat),
    "bench": Verb(BenchSettings, _bench),
    "serve": Verb(ServeSettings, serve),
    "demo": Verb(DemoSettings, _demo, None),
}

OVER_RANKS = ("prune", "eval")
"""Verbs that several processes work on together."""

BY_TRAINER = ("train", "recover")
"""Verbs that leave that to Trainer."""

CONFIG = Option("config", "config", Path | None, None, "A YAML file with any of these options.")


def main() -> None:
    """Entry point of the `secateurs` command."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    with contextlib.ExitStack() as stack:
        try:
            name = next(iter(sys.argv[1:]), "")
            if name in OVER_RANKS:
                stack.enter_context(ranks.together())
            if not ranks.is_main() or (name in BY_TRAINER and os.environ.get("RANK", "0") != "0"):
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            _run(sys.argv[1:])
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough; what is still to be flushed goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as a shell has it: 128 and the signal's number
        except KeyboardInterrupt:
            _end(130, "interrupted: run the same command again")
        except torch.OutOfMemoryError as error:
            line = str(error).partition(". GPU")[0]
            _end(2, f"secateurs: {line}: make batch_size or length smaller, or use --device cpu")
        except (ValueError, FloatingPointError, OSError) as error:
            _end(2, f"secateurs: {' '.join(str(error).split())}")


def _end(status: int, line: str) -> NoReturn:
    ranks.say_last(line)
    sys.exit(status)


def _run(arguments: list[str]) -> None:
    name = next(iter(arguments), "")
    if name == "--version":
        print(f"secateurs {__version__}")
        return
    commands: dict[str, Callable[..., Any]] = {known: _summary(known, verb) for known, verb in VERBS.items()}
    if name in VERBS:
        verb = VERBS[name]
        written = _from_config(verb, arguments)
        lacks_subject = verb.subject not in (None, *written) and verb.kind is str
        arguments = [name, *_arranged(verb, arguments[1:], subject_first=lacks_subject)]
        commands[name] = _command(name, verb, written)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed = tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="secateurs",
                description="Prune, train and run sparse large language models. Start with: secateurs demo",
                args=arguments,
            )
    except SystemExit as end:
        if not end.code:
            raise
        see = f"secateurs {name} --help" if name in VERBS else "secateurs --help"
        raise ValueError(f"{_unboxed(said.getvalue())} (see {see})") from None
    verb = VERBS[name]
    given = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(verb.settings)}
    subject = [] if verb.subject is None else [getattr(parsed, verb.subject)]
    verb.run(*subject, settings=verb.settings(**given))


def _arranged(verb: Verb, arguments: list[str], *, subject_first: bool) -> list[str]:
    """As they are to be parsed: what an option of several values is given in several places, in one.

    Args:
        verb: whose options they are.
        arguments: as typed, without the verb.
        subject_first: put the subject in front, where it would be taken for the last of several values.
    """
    known = {option.name: option.type for option in [*options(verb.settings), CONFIG]}

    def most(flag: str) -> float:
        """How many values may follow."""
        kind = known.get(_name(flag), bool)
        several = any(get_origin(each) is tuple for each in (kind, *get_args(kind)))
        return math.inf if several else 0 if kind is bool else 1

    free: list[str] = []
    parts: list[list[str]] = []  # each an option with its values
    for argument in arguments:
        if argument.startswith("--"):
            parts.append([argument])
        elif parts and "=" not in parts[-1][0] and len(parts[-1]) <= most(parts[-1][0]):
            parts[-1].append(argument)
        else:
            free.append(argument)
    if subject_first and not free and (swallowed := [part for part in parts if len(part) > 2]):
        free.append(swallowed[-1].pop())
    names = [_name(part[0]) for part in parts]
    told: dict[Any, list[str]] = {}
    for place, (name, part) in enumerate(zip(names, parts, strict=True)):
        if names.count(name) > 1 and most(name) > 1:
            flag, inline, value = part[0].partition("=")
            told.setdefault(name, [flag]).extend([value] if inline else part[1:])
        else:
            told[place] = part
    return [*free, *itertools.chain(*told.values())]


def _name(flag: str) -> str:
    """Of an option, as its dataclass has it on the command line."""
    return flag.removeprefix("--").partition("=")[0].replace("_", "-")


def _unboxed(text: str) -> str:
    """What tyro says in a box, as far as it says what is wrong, in a line.

    Where standard output is not UTF-8 the box is one of dashes, and what is wrong comes after the first.
    """

    def is_rule(line: str) -> bool:
        return bool(line) and set(line) <= set("─╰╯-")

    lines = [line.strip("│ ") for line in text.splitlines()[1:]]
    told = itertools.takewhile(lambda line: not is_rule(line), itertools.dropwhile(is_rule, lines))
    return " ".join(" ".join(told).split())


def _from_config(verb: Verb, arguments: list[str]) -> dict[str, Any]:
    """What the file that `--config` names says, if there is one; ValueError if there are several."""
    if sum(argument.partition("=")[0] == "--config" for argument in arguments) > 1:
        raise ValueError("--config names one file")
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, _, file = argument.partition("=")
        if flag == "--config" and (file or following):
            known: dict[str, Any] = {option.field: option.type for option in options(verb.settings)}
            if verb.subject:
                known[verb.subject] = verb.kind
            return read_config(Path(file or following), known)
    return {}


def _summary(name: str, verb: Verb) -> type[Any]:
    """What the overview says of a verb."""
    made = dataclasses.make_dataclass(name, [])
    made.__doc__ = str(verb.settings.__doc__).partition("\n")[0]
    return made


def _command(name: str, verb: Verb, written: dict[str, Any]) -> type[Any]:
    """A dataclass of what a verb takes, for tyro: its defaults are those that were written."""
    takes = [*options(verb.settings), CONFIG]
    if verb.subject:
        text: Any = tyro.conf.Positional[verb.kind]  # type: ignore[misc,name-defined]
        takes.insert(0, Option(verb.subject, verb.subject, text, dataclasses.MISSING, verb.about))
    fields = [
        (
            option.field,
            Annotated[option.type, tyro.conf.arg(help=option.help)],
            dataclasses.field(default=_shown(written.get(option.field, option.default), option.type)),
        )
        for option in takes
    ]
    made = dataclasses.make_dataclass(name, fields, kw_only=True, frozen=True)
    made.__doc__ = verb.settings.__doc__
    return made


def _shown(default: Any, annotation: Any) -> Any:
    """A default as the option's type has it: what may be other things in Python is text here."""
    if default in (None, dataclasses.MISSING) or annotation not in (str, str | None):
        return default
    return str(default)
