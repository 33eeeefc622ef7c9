"""`kvfold calibrate`: parse, call, print. What it does lives in train/recalibrate.py."""

from pathlib import Path
from typing import Annotated

import typer

from kvfold.cli_model import SAMPLE, Device, Dtype, Json, Model, load_model
from kvfold.console import clear_errors, progress, say, show_json, waiting
from kvfold.layout.units import parse_count

Data = Annotated[list[str] | None, typer.Option(help="Text to go by; several times: all. Default: a novel.")]
Context = Annotated[str, typer.Option(help="Tokens of a sequence, at whose end the compression holds.")]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences to set the gates by.")]


def add_calibrate(app: typer.Typer) -> None:
    """Put the command among the others."""
    app.command("calibrate", epilog="Example: `kvfold calibrate my-model adapter-4x adapter-2x --compression 2`")(
        calibrate
    )


@clear_errors
def calibrate(
    model: Model,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A folder that `kvfold retrofit` wrote.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; a new or an empty one.")],
    compression: Annotated[
        float | None,
        typer.Option(
            help="Times smaller, at the end of a sequence, window included. Default: the gates stay, what they keep "
            "is measured anew."
        ),
    ] = None,
    data: Data = None,
    context: Context = "1024",
    sequences: Sequences = 16,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """An adapter at another compression, without training, with what its gates keep per head, by which engines admit."""
    from kvfold.models.checkpoint_files import check_folder
    from kvfold.train.data import draw_text
    from kvfold.train.recalibrate import method_of, recalibrate, shifted_settings

    tokens = parse_count(context)
    method, settings = method_of(adapter), None
    if compression is not None:
        settings = shifted_settings(method, compression=compression, sequence_tokens=tokens)
    check_folder(out)
    weights, tokenizer = load_model(model, None, None, str(adapter), dtype, device)
    with waiting("drawing text"):
        text = draw_text(
            data or [str(SAMPLE)], tokenizer, tokens=sequences * tokens,
            sequence_tokens=tokens, seed=0, spared=1,
        )  # fmt: skip
    with progress() as report:
        facts = recalibrate(weights, adapter, out, text.train, settings, report=report)
    if as_json:
        show_json({"kind": "calibrate", "out": str(out), **facts})
    else:
        told = f"kept ratios of {facts['sequences']} sequences up to {tokens:,} tokens"
        if settings is not None:
            shift = f"compression {facts['before']:.2f} -> {facts['after']:.2f} at {tokens:,} tokens"
            told = f"{shift}; gates shifted by {facts['shift']:+.3f}; {told}"
        say(told)
        typer.echo(out)
