"""Arguments and options that several commands have, each said once."""

from pathlib import Path
from typing import Annotated

import typer

METHODS = "full | window:W+S | h2o:R+Y | tova:N, in tokens or percent; trained: dmc[:W] | dms[:W]"
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file or a hub name.")]
Time = Annotated[str | None, typer.Option(help=f"{METHODS}. Default: the checkpoint's own.")]
Times = Annotated[list[str] | None, typer.Option("--time", help=f"{METHODS}; given several times: a row each.")]
Bits = Annotated[str | None, typer.Option(help="model; fp8, int8 and int4 are planned.")]
Adapter = Annotated[str | None, typer.Option(help="A folder that `kvfold retrofit` wrote.")]
Dtype = Annotated[
    str | None, typer.Option(help="float32 | bfloat16 | float16. Default: float32 on a CPU, else the checkpoint's.")
]
Device = Annotated[str | None, typer.Option(help="cpu | cuda. Default: cpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Out = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]
