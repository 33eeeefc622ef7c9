"""`kvfold bench decode`: decoding beside peers, from caches that read prompts or that are filled. Measured in bench/."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from kvfold.cli.console import progress
from kvfold.cli.options import Loading, Model, Output, Repeats, Times, model_name
from kvfold.data.texts import SAMPLE, read_text_file
from kvfold.errors import UserError


def decode(
    model: Model,
    time: Times = None,
    batch: Annotated[
        int | None, Option(help="Rows of one point. Default: the points 1 x 64, 16 x (32 + 64), 8 x 1,024.")
    ] = None,
    prompt: Annotated[int, Option(help="Tokens of the prompt, with `--batch`.")] = 32,
    new: Annotated[int, Option(help="Tokens generated, with `--batch`.")] = 64,
    text: Annotated[Path | None, Option(help="A file that the prompts are taken from. Default: random tokens.")] = None,
    padding: Annotated[Literal["both", "none", "left"], Option(help="Whether rows are padded.")] = "both",
    filled: Annotated[
        bool, Option("--filled", help="With `--batch`: caches of random keys and values, no prompt is read.")
    ] = False,
    compression: Annotated[
        list[float] | None,
        Option(
            help="With `--filled`: what a learned method holds, whatever its gates keep; several times: a row each."
        ),
    ] = None,
    compare_bits: Annotated[
        list[str] | None, Option(help="With `--filled`: storages beside `--bits`; several times: rows for each.")
    ] = None,
    peers: Annotated[str, Option(help="transformers | vllm | both, by a comma | none")] = "transformers",
    repeats: Repeats = 5,
    *,
    loading: Loading,
    output: Output,
) -> None:
    """Tokens/s, step time, bytes and peak memory of `generate`, with and without left padding, all sides in one run.

    Example: `kvfold bench decode my-model --batch 8 --prompt 256 --time full --time h2o:64+64`
    """
    from kvfold.bench.filled import bench_filled
    from kvfold.eval.peer import load_theirs
    from kvfold.report.sheets import decode_table, table_of

    named, points = _peers(peers), _points(batch, prompt, new)
    _check_filled(
        filled and batch is not None and "vllm" not in named, asked=filled, chosen=compression or compare_bits
    )
    file = None if text is None else read_text_file(text)
    ours, tokenizer = loading.load(model, times=time)
    theirs = load_theirs(model, dtype=ours.dtype, device=ours.device) if "transformers" in named else None
    with progress() as report:
        common = {"name": model_name(model), "repeats": repeats, "report": report}
        if filled:
            sides, text_T = _sides(ours, tokenizer, time, prompt, compression, compare_bits, file)
            common |= {"batch": batch, "tokens": prompt, "new_tokens": new, "text_T": text_T}
            result = bench_filled(ours, theirs, sides, **common)
            table = table_of(f"Decoding steps, {result['context']}", _FILLED_COLUMNS)
        else:
            padded = {"both": (False, True), "none": (False,), "left": (True,)}[padding]
            common |= {"methods": time or ["full"], "points": points, "padded": padded}
            result = _decoded(ours, theirs, model if "vllm" in named else None, tokenizer, file, common)
            table = decode_table
    output.hand_over("decode", result, table)


def _decoded(ours: Any, theirs: Any, vllm: str | None, tokenizer: Any, text: Any, common: Mapping[str, Any]) -> Mapping:
    """Caches that read prompts; `vllm`: the checkpoint that vLLM loads, None = it is no peer."""
    from kvfold.bench.decode import bench_decode, text_prompts

    prompts = None if text is None else text_prompts(text, tokenizer)
    with nullcontext() if vllm is None else _vllm(vllm, ours, common["points"]) as peer:
        return bench_decode(ours, theirs, prompts=prompts, vllm=peer, **common)


def _points(batch: int | None, prompt: int, new: int) -> Any:
    """What is measured: one point, or the three that everybody compares."""
    from kvfold.bench.decode import POINTS, Point

    if batch is None:
        return POINTS
    return (Point(name=f"{batch} x ({prompt} + {new})", batch=batch, prompt_tokens=prompt, new_tokens=new),)


def _check_filled(possible: bool, *, asked: bool, chosen: Any) -> None:
    """Refuse what goes with filled caches only, and filled caches where they can't be."""
    if asked and not possible:
        raise UserError(
            "--filled: one point is measured, beside transformers or alone: write e.g. --batch 8 --prompt 4096"
        )
    if chosen and not asked:
        raise UserError("--compression and --compare-bits: caches that read a prompt hold what they hold: add --filled")


_FILLED_COLUMNS = {
    "point": "{point}",
    "method": "{title}",
    "bits": "{bits}",
    "compression": lambda row: f"{row['compression']:.2f}{'' if row['forced'] is None else ' (forced)'}",
    "step ms": "{ours[step_ms][median]:.1f}",
    "roofline ms": "{roofline_ms:.1f}",
    "over roofline": "{over_roofline:.2f}",
    "over the first": "{over_first[median]:.2f}",
    "over transformers": "{ratio[median]:.2f}",
}


def _sides(
    ours: Any, tokenizer: Any, time: list[str] | None, tokens: int, compression: list[float] | None,
    compare_bits: list[str] | None, text: Any,
) -> tuple[list[Any], Any]:  # fmt: skip
    """The caches to be filled, and a text that shows what gates keep."""
    from kvfold.bench.filled import Side
    from kvfold.data.windows import text_beginning
    from kvfold.eval.folding import method_layouts

    layouts = method_layouts(ours, time or ["full"])
    learned = [any(layout.time_of(owner).trained for owner in layout.owners) for layout in layouts]
    sides = [
        Side(layout=layout if bits is None else layout.with_bits(bits), compression=times)
        for bits in (None, *(compare_bits or ()))
        for layout, has_gates in zip(layouts, learned, strict=True)
        for times in ((compression or (None,)) if has_gates else (None,))
    ]
    if not any(learned):
        return sides, None
    return sides, text_beginning(text or read_text_file(SAMPLE), tokenizer, tokens=tokens)[0]


def _vllm(model: str, ours: Any, points: Any) -> Any:
    """vLLM on the same checkpoint, with room for the largest point."""
    import torch

    from kvfold.bench.vllm_peer import VllmPeer

    longest = max(point.prompt_tokens + point.new_tokens for point in points)
    kv_bytes = max(point.batch * (point.prompt_tokens + point.new_tokens + 64) for point in points)
    layout = ours.config.layout
    entry = sum(2 * one.num_kv_heads * one.head_dim * ours.dtype.itemsize for one in layout.layers)
    return VllmPeer(
        model, max_rows=max(point.batch for point in points), max_tokens=longest, kv_bytes=2 * kv_bytes * entry,
        dtype=str(ours.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
    )  # fmt: skip


def _peers(text: str) -> set[str]:
    """Those to be measured beside kvfold."""
    named = {part.strip() for part in text.split(",")}
    if not named <= {"transformers", "vllm", "none"} or ("none" in named and len(named) > 1):
        raise UserError(
            f"peers '{text}': kvfold is measured beside transformers, vllm, both by a comma, or alone: write "
            "'transformers' or 'none'"
        )
    return named - {"none"}
