"""The command line: commands of a kind in one module, each of which parses, calls and prints. What they do lives in the rooms
below; what they share stands in options.py.
"""

from collections.abc import Callable
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperGroup

from kvfold.cli import bench, convert, generate, train
from kvfold.cli.eval import demo, evaluate, inspect, report
from kvfold.cli.options import clear_errors, debug_mode, with_groups

COMMANDS = {
    "plan": convert.plan, "convert": convert.convert, "train": train.train, "retrofit": train.retrofit,
    "calibrate": train.calibrate, "eval": evaluate, "inspect": inspect, "generate": generate.generate,
    "serve": generate.serve, "report": report, "demo": demo,
}  # fmt: skip
BENCH_COMMANDS = {
    "decode": bench.decode, "prefill": bench.prefill, "capacity": bench.capacity, "kernel": bench.kernel,
    "gpu": bench.gpu, "train": bench.train, "serve": bench.serve, "serve-offline": bench.serve_offline,
}  # fmt: skip
app = typer.Typer(
    epilog="Begin with `kvfold plan llama-3.1-8b --time h2o:512+512`, which needs no weights, or with `kvfold demo`.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
)  # fmt: skip


@app.callback()
def kvfold(
    debug: Annotated[bool, Option("--debug", help="Show where an error came from, before its line.")] = False,
) -> None:
    """Make the KV cache of a language model small: plan it, train for it, measure it, generate with it."""
    debug_mode.set(debug)


class BenchGroup(TyperGroup):
    """`bench serve --offline` measures a model in process, `bench serve` any endpoint: two commands of one name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Gives name, command and what is left of the words."""
        if args[0] == "serve" and "--offline" in args:
            args = ["serve-offline", *(word for word in args[1:] if word != "--offline")]
        return super().resolve_command(ctx, args)


def _add(group: typer.Typer, commands: dict[str, Callable]) -> None:
    """The last lines of a command's docstring are its example."""
    for name, command in commands.items():
        words, _, example = cleandoc(command.__doc__ or "").partition("\n\nExample: ")
        words = " ".join(words.split())
        said = {"help": words, "short_help": words, "epilog": f"Example: {example}" if example else None}
        group.command(name, **said)(clear_errors(with_groups(command)))


_add(app, COMMANDS)
benches = typer.Typer(
    cls=BenchGroup, help="Measure speed and memory beside transformers, in one run.", no_args_is_help=True
)
_add(benches, BENCH_COMMANDS)
app.add_typer(benches, name="bench")
