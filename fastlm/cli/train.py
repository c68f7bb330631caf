"""`fastlm train lm`: its options are those of TrainingOptions."""

import dataclasses
import inspect
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from fastlm.cli import INTERRUPTED
from fastlm.cli.options import DATA_VARIABLE, Debug
from fastlm.training.options import MODEL_DEFAULTS, TrainingOptions

PANELS = {"data": "Files", "model": "Model", "vocabulary": "Text", "seq_len": "Training", "eval_every": "Running"}
NAMES = {"seq_len": ("--seq-len", "--context")}


def train_lm(ctx: typer.Context, resume: bool, overwrite: bool, debug: bool, **values: Any) -> int:
    """Train a language model on a text file.

    With --data alone: a GRU on characters. A run that was stopped goes on with --resume and --output.
    """
    sources = {name: ctx.get_parameter_source(name) for name in values}
    given = {name: values[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    options = _resumed(values["output"], given) if resume else TrainingOptions(**values)
    if options.data is None:
        raise typer.BadParameter(f"expected a text file, in --data or {DATA_VARIABLE}", param_hint="'--data'")

    from fastlm import training
    from fastlm.cli.progress import show_progress

    with show_progress() as callback:
        result = training.train(options, resume=resume, overwrite=overwrite, callbacks=[callback], show=callback.show)
    if result.interrupted:
        folder = shlex.quote(str(options.resolved().output))
        print(f"stopped at step {result.step}; go on: fastlm train lm --resume --output {folder}", file=sys.stderr)
        return INTERRUPTED
    print(_summary(result))
    return 0


def _resumed(output: Path | None, given: dict[str, Any]) -> TrainingOptions:
    if output is None:
        raise typer.BadParameter("expected the folder of the run to resume", param_hint="'--output'")
    return TrainingOptions.load(output).changed(**given)


def _summary(result: Any) -> str:
    from fastlm.training.metrics import bits_per_character, perplexity

    bits = bits_per_character(result.loss, result.characters_per_token)
    return (
        f"{result.output}: after {result.step} steps, validation loss {result.loss:.4f} nats a token, "
        f"perplexity {perplexity(result.loss):.2f}, {bits:.3f} bits per character"
    )


def _signature() -> inspect.Signature:
    """The command's parameters, from the fields of TrainingOptions."""
    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    hints, panel = get_type_hints(TrainingOptions), ""
    for option in dataclasses.fields(TrainingOptions):
        panel = PANELS.get(option.name, panel)
        kind: Any = hints[option.name]
        if option.name == "data":
            kind = kind | None
        limits = {name: option.metadata[name] for name in ("min", "max")}
        settings = typer.Option(
            *NAMES.get(option.name, ()),
            help=_help(option),
            envvar=DATA_VARIABLE if option.name == "data" else None,
            rich_help_panel=panel,
            **limits,
        )
        parameters.append(_keyword(option.name, Annotated[kind, settings], option.default))
    overwrite = typer.Option("--overwrite", help="Replace a run in --output.", rich_help_panel="Files")
    resume = typer.Option("--resume", help="Go on with the run in --output.", rich_help_panel="Files")
    parameters[3:3] = [
        _keyword("resume", Annotated[bool, resume], False),
        _keyword("overwrite", Annotated[bool, overwrite], False),
    ]
    return inspect.Signature([*parameters, _keyword("debug", Debug, False)])


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _help(option: "dataclasses.Field[Any]") -> str:
    """The option's help, with what its default is in each kind of model."""
    text: str = option.metadata["help"]
    values = {name: defaults[option.name] for name, defaults in MODEL_DEFAULTS.items() if option.name in defaults}
    return f"{text} Default: {values['gru']}, transformers {values['gpt2']}." if values else text


train_lm.__signature__ = _signature()  # type: ignore[attr-defined]
train_lm.__annotations__ = {name: it.annotation for name, it in _signature().parameters.items()}
