"""What commands that read a model share: its options, how it is loaded, and what it is called in results."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.console import say, waiting

METHODS = "full | window:W+S | h2o:R+Y | tova:N, in tokens or percent; trained: dmc[:W][+S] | dms[:W] | fold[:W]"
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")]
Time = Annotated[str | None, typer.Option(help=f"{METHODS}. Default: the checkpoint's own.")]
Times = Annotated[list[str] | None, typer.Option("--time", help=f"{METHODS}; given several times: a row each.")]
Bits = Annotated[
    str | None,
    typer.Option(
        help="How kept entries are stored: model | fp8 | int8 | int4, or keys and values apart, as int8,int4."
    ),
]
Adapter = Annotated[str | None, typer.Option(help="A folder that `kvfold retrofit` wrote.")]
Gates = Annotated[
    str | None, typer.Option(help="channel: a learned method reads its published freed channel, as it stands.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32 | bfloat16 | float16. Default: float32 on a CPU, else the checkpoint's.")
]
Device = Annotated[str | None, typer.Option(help="cpu | cuda. Default: cpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]
Data = Annotated[list[str] | None, typer.Option(help="Text, .jsonl, .gz, .parquet, or a hub name; several times: all.")]
Rate = Annotated[float | None, typer.Option(help="The learning rate at its highest.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any key of a recipe, as key=value; several times.")]

SAMPLE = Path(__file__).with_name("assets") / "sample" / "persuasion.txt"
"""The novel that comes with kvfold: what is read where no text is named."""


def load_model(
    source: str, time: str | None, bits: str | None, adapter: str | None, dtype: str | None, device: str | None,
    gates: str | None = None, times: Sequence[str] = (),
):  # fmt: skip
    """The model and its tokenizer, with a sign of life meanwhile. `times`: methods that it will be measured under; one that is
    learned says what `gates` are for.
    """
    from kvfold.methods.registry import parse_time
    from kvfold.models.load import load, load_tokenizer

    quiet_transformers()
    if gates is not None and time is None:
        learned = [one for one in times if ";" not in one and parse_time(one).trained]
        time = learned[0] if learned else None
    with waiting(f"loading {source}"):
        model = load(source, time=time, bits=bits, adapter=adapter, gates=gates, dtype=dtype, device=device)
        return model, load_tokenizer(source)


def quiet_transformers(*, bars: bool = True) -> None:
    """Its log lines are for programmers. `bars`: its progress bars stay, as for downloads; that of a .gguf file, which is read
    from the disk and asks none of the settings, never does.
    """
    from transformers import modeling_gguf_pytorch_utils as gguf_reading
    from transformers.utils import logging

    logging.set_verbosity_error()
    if hasattr(gguf_reading, "tqdm"):
        gguf_reading.tqdm = partial(gguf_reading.tqdm, disable=True)
    if not bars:
        logging.disable_progress_bar()


def model_name(source: str) -> str:
    """What a model is called in results: the last part of its path or hub name."""
    return Path(source).resolve().name.removesuffix(".gguf") if Path(source).exists() else source


def note_idle_gpu(device: Any) -> None:
    """Tell who trains on a CPU beside a GPU."""
    import torch

    if device.type == "cpu" and torch.cuda.is_available():
        say("note: training on the CPU, though there is a GPU: --device cuda takes it")
