"""`kvfold calibrate`: an adapter's gates at another compression. It is done in train/recalibrate.py."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from kvfold.cli.console import progress, say, show_json, waiting
from kvfold.cli.options import Data, Device, Dtype, Json, Loading, Model, NewFolder
from kvfold.data.texts import SAMPLE
from kvfold.layout.units import parse_count


def calibrate(
    model: Model,
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="A folder that `kvfold retrofit` wrote.")],
    out: NewFolder,
    compression: Annotated[
        float | None,
        Option(
            help="Times smaller, at the end of a sequence, window included. Default: the gates stay, what they keep "
            "is measured anew."
        ),
    ] = None,
    data: Data = None,
    context: Annotated[str, Option(help="Tokens of a sequence, at whose end the compression holds.")] = "1024",
    sequences: Annotated[int, Option(min=1, help="Sequences to set the gates by.")] = 16,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """An adapter at another compression, without training, with what its gates keep per head, by which engines admit.

    Example: `kvfold calibrate my-model adapter-4x adapter-2x --compression 2`
    """
    from kvfold.models.checkpoint_files import check_folder
    from kvfold.train.calibrate import method_of, recalibrate, shifted_settings
    from kvfold.train.data import draw_text

    tokens = parse_count(context)
    method, settings = method_of(adapter), None
    if compression is not None:
        settings = shifted_settings(method, compression=compression, seq_len=tokens)
    check_folder(out)
    weights, tokenizer = Loading(adapter=str(adapter), dtype=dtype, device=device).load(model)
    with waiting("drawing text"):
        text = draw_text(
            data or [str(SAMPLE)], tokenizer, tokens=sequences * tokens,
            seq_len=tokens, seed=0, spared=1,
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
