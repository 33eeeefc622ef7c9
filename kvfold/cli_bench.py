"""`kvfold bench decode`, `prefill`, `capacity`, `kernel` and `gpu`: parse, call, print. The work is done in the room `bench`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvfold.cli_model import (
    SAMPLE,
    Adapter,
    Bits,
    Device,
    Dtype,
    Gates,
    Json,
    Model,
    Out,
    Times,
    load_model,
    model_name,
)
from kvfold.console import check_out, clear_errors, hand_over, progress
from kvfold.errors import UserError

Text = Annotated[str | None, typer.Option(help="A file that prompts are taken from. Default: a novel.")]
Repeats = Annotated[int, typer.Option(help="Rounds; all sides take turns.")]


def add_bench(bench: typer.Typer) -> None:
    """Put the commands among the others."""
    for name, command, example in (
        ("decode", bench_decoding, "my-model --batch 8 --prompt 256 --time full --time h2o:64+64"),
        ("prefill", bench_prompts, "my-model --batch 8 --prompt 4096 --time full --time window:508+4"),
        ("capacity", bench_rows, "my-model --kv-memory 256MB --prompt 1024 --time full --time h2o:128+128"),
        ("kernel", bench_kernels, "--storage fp32 --storage int8 --tokens 4096"),
        ("gpu", bench_on_gpu, "--out results/gpu/kernels.json"),
    ):
        words = f"kvfold bench {name} {example}"
        bench.command(name, epilog=f"Example: `{words}`")(command)


def _padded(text: str) -> tuple[bool, ...]:
    """Whether rows are padded, for each measurement of a point."""
    known = {"both": (False, True), "none": (False,), "left": (True,)}
    if text not in known:
        raise UserError(f"padding '{text}': rows are padded at the left or not: write {', '.join(known)}")
    return known[text]


def _peers(text: str) -> set[str]:
    """Those to be measured beside kvfold."""
    named = {part.strip() for part in text.split(",")}
    if not named <= {"transformers", "vllm", "none"} or ("none" in named and len(named) > 1):
        raise UserError(
            f"peers '{text}': kvfold is measured beside transformers, vllm, both by a comma, or alone: write "
            "'transformers' or 'none'"
        )
    return named - {"none"}


@clear_errors
def bench_decoding(
    model: Model,
    time: Times = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of one point. Default: the points 1 x 64, 16 x (32 + 64), 8 x 1,024.")
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt, with `--batch`.")] = 32,
    new: Annotated[int, typer.Option(help="Tokens generated, with `--batch`.")] = 64,
    text: Annotated[
        Path | None, typer.Option(help="A file that the prompts are taken from. Default: random tokens.")
    ] = None,
    padding: Annotated[str, typer.Option(help="both | none | left")] = "both",
    filled: Annotated[
        bool, typer.Option("--filled", help="With `--batch`: caches of random keys and values, no prompt is read.")
    ] = False,
    compression: Annotated[
        list[float] | None,
        typer.Option(
            help="With `--filled`: what a learned method holds, whatever its gates keep; several times: a row each."
        ),
    ] = None,
    compare_bits: Annotated[
        list[str] | None, typer.Option(help="With `--filled`: storages beside `--bits`; several times: rows for each.")
    ] = None,
    peers: Annotated[str, typer.Option(help="transformers | vllm | both, by a comma | none")] = "transformers",
    repeats: Repeats = 5,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tokens/s, step time, bytes and peak memory of `generate`, with and without left padding, all sides in one run."""
    from kvfold.bench.peers import load_theirs
    from kvfold.data.texts import read_text_file

    check_out(out)
    named, padded, points = _peers(peers), _padded(padding), _points(batch, prompt, new)
    _check_filled(
        filled and batch is not None and "vllm" not in named, asked=filled, chosen=compression or compare_bits
    )
    said = None if text is None else read_text_file(text)
    ours, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    theirs = load_theirs(model, dtype=ours.dtype, device=ours.device) if "transformers" in named else None
    with progress() as report:
        common = {"name": model_name(model), "repeats": repeats, "report": report}
        if filled:
            sides, ids = _sides(ours, tokenizer, time, points[0], compression, compare_bits, said)
            result = _filled(ours, theirs, sides, points[0], ids, common)
        else:
            common |= {"methods": time or ["full"], "points": points, "padded": padded}
            result = _decoded(ours, theirs, model if "vllm" in named else None, tokenizer, said, common)
    hand_over("decode", result, [_decode_table], out=out, as_json=as_json)


def _decoded(ours: Any, theirs: Any, vllm: str | None, tokenizer: Any, text: Any, common: Mapping[str, Any]) -> Mapping:
    """Caches that read prompts; `vllm`: the checkpoint that vLLM loads, None = it is no peer."""
    from contextlib import nullcontext

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


def _decode_table(result: Mapping[str, Any]) -> Any:
    """The report's own table; of filled caches one with compression and the roofline."""
    from kvfold.report.tables import decode_table

    if "context" not in result:
        return decode_table(result)
    return _table(
        f"Decoding steps, {result['context']}",
        result,
        {
            "point": lambda row: row["point"],
            "method": lambda row: row["title"],
            "bits": lambda row: row["bits"],
            "compression": lambda row: f"{row['compression']:.2f}{'' if row['forced'] is None else ' (forced)'}",
            "step ms": lambda row: f"{row['ours']['step_ms']['median']:.1f}",
            "roofline ms": lambda row: f"{row['roofline_ms']:.1f}",
            "over roofline": lambda row: f"{row['over_roofline']:.2f}",
            "over the first": lambda row: _median(row, "over_first"),
            "over transformers": lambda row: _median(row, "ratio"),
        },
    )


def _sides(
    ours: Any, tokenizer: Any, time: list[str] | None, point: Any, compression: list[float] | None,
    compare_bits: list[str] | None, text: Any,
) -> tuple[list[Any], Any]:  # fmt: skip
    """The caches to be filled, and a text that shows what gates keep."""
    from kvfold.bench.filled import Side
    from kvfold.data.texts import read_text_file
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
    return sides, text_beginning(text or read_text_file(SAMPLE), tokenizer, tokens=point.prompt_tokens)[0]


def _filled(ours: Any, theirs: Any, sides: list[Any], point: Any, ids: Any, common: Mapping[str, Any]) -> Mapping:
    """Caches of one point that read no prompt."""
    from kvfold.bench.filled import bench_filled

    return bench_filled(
        ours,
        theirs,
        sides,
        batch=point.batch,
        tokens=point.prompt_tokens,
        new_tokens=point.new_tokens,
        text_T=ids,
        **common,
    )


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


@clear_errors
def bench_prompts(
    model: Model,
    time: Times = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1024,
    call: Annotated[
        list[int] | None, typer.Option(help="Tokens of one call, 0 = all; several times: rows for each.")
    ] = None,
    text: Text = None,
    repeats: Repeats = 2,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Tokens/s of reading prompts under each method, beside what their floating-point operations allow."""
    from kvfold.bench.prefill import bench_prefill

    check_out(out)
    ours, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    ids = _prompts(text, tokenizer, batch, prompt)
    with progress() as report:
        result = bench_prefill(
            ours, ids, name=model_name(model), methods=time or ["full"], call_tokens=call or (0,), repeats=repeats,
            report=report,
        )  # fmt: skip
    hand_over("prefill", result, [_prefill_table], out=out, as_json=as_json)


def _prefill_table(result: Mapping[str, Any]) -> Any:
    return _table(
        "Reading prompts",
        result,
        {
            "prompts": lambda row: f"{row['batch']} x {row['prompt_tokens']:,}",
            "call": lambda row: f"{row['call_tokens']:,}",
            "method": lambda row: row["title"],
            "compression": lambda row: f"{row['compression']:.2f}",
            "tokens/s": lambda row: f"{row['tokens_per_second']['median']:.0f}",
            "FLOP allow": lambda row: f"{row['allowed_tokens_per_second']:.0f}",
            "over the first": lambda row: _median(row, "over_first"),
        },
    )


@clear_errors
def bench_rows(
    model: Model,
    time: Times = None,
    kv_memory: Annotated[str, typer.Option(help="Bytes of the cache, never exceeded.")] = "256MB",
    prompt: Annotated[int, typer.Option(help="Tokens of each row.")] = 1024,
    most: Annotated[int, typer.Option(help="Rows at which the search ends.")] = 256,
    text: Text = None,
    out: Out = None,
    bits: Bits = None,
    adapter: Adapter = None,
    gates: Gates = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """How many rows fit in a budget, found by reading them in until the cache is full."""
    from kvfold.bench.capacity import bench_capacity
    from kvfold.layout.units import parse_size

    check_out(out)
    budget = parse_size(kv_memory)
    ours, tokenizer = load_model(model, None, bits, adapter, dtype, device, gates, time or ())
    ids = _prompts(text, tokenizer, 8, prompt)
    with progress() as report:
        result = bench_capacity(
            ours, ids, name=model_name(model), kv_bytes=budget, methods=time or ["full"], most_rows=most, report=report
        )
    hand_over("capacity", result, [_capacity_table], out=out, as_json=as_json)


def _capacity_table(result: Mapping[str, Any]) -> Any:
    return _table(
        f"Rows of {result['context_tokens']:,} tokens in {result['kv_bytes'] / 1e6:,.0f} MB",
        result,
        {
            "method": lambda row: row["title"],
            "bits": lambda row: row["bits"],
            "compression": lambda row: "" if row["compression"] is None else f"{row['compression']:.2f}",
            "rows": lambda row: f"{row['rows']}{' or more' if row['stopped'] else ''}",
            "planned": lambda row: f"{row['planned_rows']}",
            "over the first": lambda row: f"{row['over_first']:.2f}" if "over_first" in row else "",
        },
    )


@clear_errors
def bench_kernels(
    storage: Annotated[
        list[str] | None,
        typer.Option(help="fp32 | bf16 | fp16 | fp8 | int8 | int4; several times: rows for each. Default: all."),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Mean entries of a head; several times. Default: 1024, 4096.")
    ] = None,
    spread: Annotated[
        list[int] | None, typer.Option(help="Longest head over shortest; several times. Default: 1, 100.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="KV heads of a layer.")] = 3,
    group: Annotated[int, typer.Option(help="Query heads of a KV head.")] = 3,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    repeats: Repeats = 30,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Decode attention on the CPU against its bytes over the memory's bandwidth; `KVFOLD_ISA` chooses a narrower kernel."""
    import torch

    from kvfold.bench.kernel import KernelShape, measure_kernel
    from kvfold.ops.native import KINDS

    check_out(out)
    unknown = sorted(set(storage or ()) - set(KINDS))
    if unknown:
        raise UserError(f"storage '{unknown[0]}': pages hold one of {', '.join(KINDS)}: name one of them")
    if min([*(tokens or (1,)), *(spread or (1,)), batch, kv_heads, group, head_dim, repeats]) < 1:
        raise UserError("a size below 1: every size of a kernel's call is 1 or more: write a larger one")
    shape = KernelShape(batch=batch, kv_heads=kv_heads, group=group, head_dim=head_dim)
    rows = list(
        measure_kernel(
            shape=shape,
            storages=storage or KINDS,
            tokens=tokens or (1024, 4096),
            spreads=spread or (1, 100),
            repeats=repeats,
        )
    )
    result = {"environment": {"device": "cpu", "threads": torch.get_num_threads()}, "rows": rows}
    hand_over("kernel", result, [_kernel_table], out=out, as_json=as_json)


def _kernel_table(result: Mapping[str, Any]) -> Any:
    return _table(
        "Decode attention",
        result,
        {
            "storage": lambda row: row["storage"],
            "instructions": lambda row: row["isa"],
            "tokens": lambda row: f"{row['tokens']:,}",
            "spread": lambda row: f"1:{row['spread']}",
            "ms": lambda row: f"{row['ms']:.2f}",
            "GB/s": lambda row: f"{row['gb_per_s']:.1f}",
            "memory GB/s": lambda row: f"{row['read_gb_per_s']:.1f}",
            "share": lambda row: f"{row['share']:.2f}",
        },
    )


@clear_errors
def bench_on_gpu(out: Out = None, as_json: Json = False) -> None:
    """Every check and timing that needs a GPU, in under ten minutes; rows say `not measured` where there is none."""
    from kvfold.bench.gpu import bench_gpu

    check_out(out)
    hand_over("gpu", bench_gpu(), [_gpu_table], out=out, as_json=as_json)


def _gpu_table(result: Mapping[str, Any]) -> Any:
    states = sorted({row["state"] for row in result["rows"]})
    return _table(
        f"GPU rows, {result['environment']['device']}",
        {"rows": [{"state": one, "rows": sum(row["state"] == one for row in result["rows"])} for one in states]},
        {"state": lambda row: row["state"], "rows": lambda row: f"{row['rows']}"},
    )


def _prompts(text: str | None, tokenizer: Any, batch: int, tokens: int) -> Any:
    """Ids [B, T]: stretches of a text one after the other, from its beginning again where it ends."""
    from kvfold.data.texts import read_text_file
    from kvfold.data.windows import text_beginning

    if batch < 1 or tokens < 2:
        raise UserError(f"{batch} rows of {tokens} tokens: prompts are 1 or more of 2 tokens or more: ask for more")
    ids, _ = text_beginning(read_text_file(text or SAMPLE), tokenizer, tokens=batch * tokens)
    return ids.repeat(-(-batch * tokens // len(ids)))[: batch * tokens].view(batch, tokens)


def _median(row: Mapping[str, Any], key: str) -> str:
    return f"{row[key]['median']:.2f}" if key in row else ""


def _table(title: str, result: Mapping[str, Any], columns: Mapping[str, Callable[[Mapping], str]]) -> Any:
    """A line for each row of a result."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for number, head in enumerate(columns):
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold")
    for row in result["rows"]:
        table.add_row(*(Text(cell(row)) for cell in columns.values()))
    return table
