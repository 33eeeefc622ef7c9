"""`kvfold bench train`: parse, call, print. What it does lives in the room `bench`."""

from typing import Annotated

import typer

from kvfold.cli_model import Device, Json, Model, Out, load_model, model_name
from kvfold.console import check_out, clear_errors, hand_over, need_for_training, progress


def add_bench_train(bench: typer.Typer) -> None:
    """Put the command among the others."""
    bench.command("train", epilog="Example: `kvfold bench train my-model --time dms:128 --time dmc --sequence 1024`")(
        bench_training
    )


@clear_errors
def bench_training(
    model: Model,
    time: Annotated[
        list[str] | None, typer.Option("--time", help="dmc[:W] | dms[:W]; several times: a row each. Default: both.")
    ] = None,
    sequence: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; both sides take turns.")] = 3,
    train: Annotated[str, typer.Option(help="What learns: full | lora | adapter (DMS).")] = "full",
    out: Out = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights. Default: float32.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """What one step of a retrofit costs, against the same loss with gates off; both sides in one run, of random tokens."""
    check_out(out)
    need_for_training()
    from kvfold.bench.train import METHODS, StepPoint, bench_train
    from kvfold.report.tables import step_table

    point = StepPoint(sequence_tokens=sequence, batch_sequences=batch, trains=train)
    methods = time or (METHODS if train != "adapter" else METHODS[:1])
    weights, _ = load_model(model, None, None, None, dtype or "float32", device)
    with progress() as report:
        result = bench_train(
            weights, name=model_name(model), methods=methods, point=point, repeats=repeats, report=report
        )
    hand_over("step", result, [step_table], out=out, as_json=as_json)
