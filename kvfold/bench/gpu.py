"""What only a GPU can show, in one run of under ten minutes: kernels of decode attention checked against the plain form, then
timed.

The run is a list of row functions, those that matter most first. Each takes the GPU, or None where there is none, and yields
rows. A row has labels, which are known beforehand, and figures, or a `state` of `not measured` or `failed` with the reason: so a
table has the same rows on a machine without a GPU, and no figure that was not measured. A row that fails stops nothing, and what
the time did not reach is `not measured`. Usage: `python -m kvfold.bench.gpu FILE.json`. The file is written anew after each row,
so that a run that is cut short leaves what it had. Letters: L layers, B sequences, K kv heads, D head dim.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from kvfold.bench.kernel import VARIANTS, Call, Row, Variant, random_call
from kvfold.bench.measuring import spread
from kvfold.ops.paged import DecodeBatch, decode_reference
from kvfold.record import write_whole_file


@dataclass(kw_only=True, slots=True)
class Gpu:
    """The device, and how much time is left on it."""

    device: torch.device
    """A CUDA device; tests use the CPU and Triton's interpreter."""
    attend: Callable[..., Tensor]
    """`decode_triton`."""
    deadline: float
    """When, by `time.monotonic`, no further row is begun."""
    bandwidth: float | None = None
    """Bytes per second of a long read or copy; `bandwidth_rows` measures it."""
    repeats: int = 20
    """Timed runs behind each median."""
    state: dict[str, Any] = field(default_factory=dict)
    """What row functions leave for those after them."""

    def milliseconds(self, work: Callable[[], None]) -> Row:
        """Median, least and most time of `work` on the device."""
        work()
        self._wait()
        times = []
        for _ in range(self.repeats):
            if self.device.type == "cuda":
                before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                before.record()
                work()
                after.record()
                self._wait()
                times.append(before.elapsed_time(after))
            else:
                start = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - start))
        return spread(times)

    def host_microseconds(self, work: Callable[[], None], calls: int) -> float:
        """Time that the host takes to put `work`, which makes so many calls, on the stream: each call's share."""
        self._wait()
        start = time.perf_counter()
        work()
        elapsed = time.perf_counter() - start
        self._wait()
        return 1e6 * elapsed / calls

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a CUDA graph: its replay. On a CPU `work` itself."""
        if self.device.type != "cuda":
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()  # compiles, which can't be captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measured(gpu: Gpu | None, labels: Row, figures: Callable[[], Row]) -> Row:
    """A row with its figures, or with the reason why it has none."""
    if gpu is None:
        return labels | {"state": "not measured", "why": "no GPU"}
    if time.monotonic() > gpu.deadline:
        return labels | {"state": "not measured", "why": "out of time"}
    try:
        return labels | {"state": "measured", **figures()}
    except Exception as problem:  # whatever it is, the other rows are still worth their time
        return labels | {"state": "failed", "why": f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"}


_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Largest relative error of an output, as ||ours - theirs|| / ||theirs||, by q's dtype: weights and values are rounded to it."""
_WEIGHT_BOUND = 5e-3
"""Largest absolute error of a handed-out weight."""
_CHECKED_LENGTHS = ((0, 1), (15, 16), (64, 257), (1000, 3), (511, 512))
"""Entries stored in the streams of each sequence."""


def check_rows(
    gpu: Gpu | None, variants: Sequence[Variant] = VARIANTS, lengths: Sequence[Sequence[int]] = _CHECKED_LENGTHS
) -> Iterator[Row]:
    """Every variant against `decode_reference` on the CPU: output, weights, and what was written."""
    for variant in variants:
        yield measured(
            gpu, {"row": "check", **variant.describe()}, lambda variant=variant: _check(gpu, variant, lengths)
        )


def _check(gpu: Gpu, variant: Variant, lengths: Sequence[Sequence[int]]) -> Row:
    call = random_call(variant, torch.tensor(lengths), device="cpu")
    moved = _moved(call, gpu.device)
    ours = gpu.attend(moved.batch, moved.q_BHD, moved.k_BKD, moved.v_BKD, scale=call.scale, softcap=call.softcap)
    theirs = decode_reference(call.batch, call.q_BHD, call.k_BKD, call.v_BKD, scale=call.scale, softcap=call.softcap)
    bound, error = _BOUNDS[variant.q], _relative_error(ours.cpu(), theirs)
    figures = {"output_error": error, "bound": bound}
    passed = error <= bound
    for name in ("score_PN", "received_BKE"):
        if getattr(call.batch, name) is not None:
            worst = (getattr(moved.batch, name).cpu() - getattr(call.batch, name)).abs().max().item()
            figures |= {f"{name.partition('_')[0]}_error": worst}
            passed &= worst <= _WEIGHT_BOUND
    pools = [name for name in ("k_PND", "v_PND", "k_scale_PNS", "v_scale_PNS") if getattr(call.batch, name) is not None]
    equal = all(_same_bits(getattr(moved.batch, name).cpu(), getattr(call.batch, name)) for name in pools)
    return figures | {"pages_equal": equal, "passed": passed and equal}


def graph_rows(
    gpu: Gpu | None,
    variant: Variant = Variant(group=4, written=False),  # noqa: B008 - frozen
    lengths: Sequence[Sequence[int]] = _CHECKED_LENGTHS,
) -> Iterator[Row]:
    """A CUDA graph holds the call: captured once, replayed after lengths have changed in place."""

    def figures() -> Row:
        call = random_call(variant, torch.tensor(lengths), device="cpu")
        moved, out = _moved(call, gpu.device), []
        arguments = (moved.batch, moved.q_BHD, moved.k_BKD, moved.v_BKD)
        replay = gpu.captured(lambda: out.append(gpu.attend(*arguments, scale=call.scale, softcap=call.softcap)))
        for length_BK in (call.batch.length_BK, moved.batch.length_BK):
            length_BK.copy_(length_BK // 2)
        replay()
        theirs = decode_reference(call.batch, call.q_BHD, call.k_BKD, call.v_BKD, scale=call.scale, softcap=None)
        error = _relative_error(out[-1].cpu(), theirs)
        return {"output_error": error, "bound": _BOUNDS[variant.q], "passed": error <= _BOUNDS[variant.q]}

    yield measured(gpu, {"row": "graph", **variant.describe()}, figures)


def _moved(call: Call, device: torch.device) -> Call:
    """A copy of the call on another device."""
    tensors = {
        entry.name: value.to(device, copy=True)
        for entry in dataclasses.fields(DecodeBatch)
        if isinstance(value := getattr(call.batch, entry.name), Tensor)
    }
    return dataclasses.replace(
        call, batch=dataclasses.replace(call.batch, **tensors),
        q_BHD=call.q_BHD.to(device), k_BKD=call.k_BKD.to(device), v_BKD=call.v_BKD.to(device),
    )  # fmt: skip


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    """NaN, which passes no bound, if either has one."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def bandwidth_rows(gpu: Gpu | None, elements: int = 1 << 31) -> Iterator[Row]:
    """What the memory gives: a long copy (read and written bytes) and a long sum (read bytes). Sets `gpu.bandwidth`."""

    def figures() -> Row:
        source = torch.ones(elements, dtype=torch.bfloat16, device=gpu.device)
        target = torch.empty_like(source)
        copied = 2 * source.nbytes / (gpu.milliseconds(lambda: target.copy_(source))["median"] / 1e3)
        summed = source.nbytes / (gpu.milliseconds(lambda: source.view(torch.int32).max())["median"] / 1e3)
        gpu.bandwidth = max(copied, summed)
        return {"copy_bytes_per_second": copied, "read_bytes_per_second": summed}

    yield measured(gpu, {"row": "bandwidth"}, figures)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model's attention, as far as decoding reads it: layers that own KV, KV heads, and tokens seen."""

    name: str
    layers: int
    kv_heads: int
    variant: Variant
    context: int = 4096


LLAMA_2_7B = Shape(name="Llama-2-7B", layers=32, kv_heads=32, variant=Variant())
LLAMA_3_8B = Shape(name="Llama-3-8B", layers=32, kv_heads=8, variant=Variant(group=4))


def _int8(shape: Shape) -> Shape:
    pages = {"k_pages": torch.int8, "v_pages": torch.int8}
    return dataclasses.replace(shape, variant=dataclasses.replace(shape.variant, **pages))


def _scored(shape: Shape) -> Shape:
    return dataclasses.replace(shape, variant=dataclasses.replace(shape.variant, scored=True, written=False))


CASES = tuple(
    (shape, batch, compression, lengths)
    for shape, batch in (
        (LLAMA_2_7B, 8),
        (LLAMA_2_7B, 1),
        (_int8(LLAMA_2_7B), 8),
        (LLAMA_3_8B, 32),
        (_scored(LLAMA_2_7B), 8),
    )
    for compression in (1, 8)
    for lengths in ("even", "uneven")
)


def stream_lengths(shape: Shape, batch: int, compression: float, lengths: str, seed: int = 0) -> Tensor:
    """Stored entries [L, B, K]: all equal, or spread 1:100 between the heads of a layer with the same mean."""
    mean = shape.context / compression
    if lengths == "even":
        return torch.full((shape.layers, batch, shape.kv_heads), max(1, round(mean)))
    shares = 100 ** torch.linspace(0, 1, shape.kv_heads)
    uneven = (mean * shares / shares.mean()).round().clamp(min=1).long()
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([
        torch.stack([uneven[torch.randperm(shape.kv_heads, generator=draw)]] * batch) for _ in range(shape.layers)
    ])  # fmt: skip


def kernel_rows(gpu: Gpu | None, cases: Sequence[tuple[Shape, int, float, str]] = CASES) -> Iterator[Row]:
    """Attention of one decoding step, all layers, against its bytes over the measured bandwidth."""
    for shape, batch, compression, lengths in cases:
        labels = {
            "row": "kernel", "shape": shape.name, "layers": shape.layers, "kv_heads": shape.kv_heads, "batch": batch,
            "context": shape.context, "compression": compression, "lengths": lengths, **shape.variant.describe(),
        }  # fmt: skip
        yield measured(gpu, labels, lambda case=(shape, batch, compression, lengths): _time_step(gpu, *case))


def _time_step(gpu: Gpu, shape: Shape, batch: int, compression: float, lengths: str) -> Row:
    stored_LBK = stream_lengths(shape, batch, compression, lengths)
    calls = _layer_calls(shape, stored_LBK, gpu.device)

    def step() -> None:
        for call in calls:
            gpu.attend(call.batch, call.q_BHD, call.k_BKD, call.v_BKD, scale=call.scale, softcap=None)

    eager = gpu.milliseconds(step)
    graph = gpu.milliseconds(gpu.captured(step))
    read_bytes = sum(int(call.batch.length_BK.sum()) for call in calls) * shape.variant.slot_bytes()
    figures = {
        "graph_ms": graph, "eager_ms": eager, "host_us_per_layer": gpu.host_microseconds(step, shape.layers),
        "read_bytes": read_bytes,
    }  # fmt: skip
    if gpu.bandwidth is not None:
        floor_ms = 1e3 * read_bytes / gpu.bandwidth
        figures |= {"bytes_ms": floor_ms, "of_bandwidth": floor_ms / graph["median"]}
    if lengths == "even" and not shape.variant.scored and shape.variant.k_pages == shape.variant.q:
        figures["sdpa_ms"] = _time_sdpa(gpu, shape, batch, int(stored_LBK[0, 0, 0]))
    return figures


def _layer_calls(shape: Shape, stored_LBK: Tensor, device: torch.device) -> list[Call]:
    """A call a layer, over one pool, so that a step reads each byte once and no cache holds it."""
    whole = random_call(shape.variant, stored_LBK.flatten(0, 1), device=device, poisoned=False)
    rows = stored_LBK.shape[1]
    calls = []
    for first in range(0, len(whole.q_BHD), rows):
        part = slice(first, first + rows)
        cut = {
            name: None if (x := getattr(whole.batch, name)) is None else x[part].contiguous()
            for name in ("start_BK", "length_BK", "slots_BK", "oldest_B", "received_BKE")
        }
        cut["max_length"] = int(cut["length_BK"].max())
        calls.append(dataclasses.replace(
            whole, batch=dataclasses.replace(whole.batch, live_B=None, **cut), q_BHD=whole.q_BHD[part],
            k_BKD=whole.k_BKD[part], v_BKD=whole.v_BKD[part],
        ))  # fmt: skip
    return calls


def _time_sdpa(gpu: Gpu, shape: Shape, batch: int, length: int) -> Row:
    """torch's own attention over keys that lie side by side: what paging and raggedness cost beside it. A few layers in turn
    are timed and scaled to all, so that no cache holds them.
    """
    variant, layers = shape.variant, min(4, shape.layers)
    k, v = torch.randn(
        2, layers, batch, shape.kv_heads, length, variant.head_dim, device=gpu.device, dtype=variant.q
    )  # fmt: skip
    q = torch.randn(
        batch, shape.kv_heads * variant.group, 1, variant.head_dim, device=gpu.device, dtype=variant.q
    )  # fmt: skip

    def work() -> None:
        for layer in range(layers):
            F.scaled_dot_product_attention(q, k[layer], v[layer], enable_gqa=variant.group > 1)

    return {name: ms * shape.layers / layers for name, ms in gpu.milliseconds(gpu.captured(work)).items()}


TILINGS = ((64, 4, 3), (64, 4, 2), (64, 4, 5), (32, 4, 3), (32, 4, 5), (64, 8, 3), (128, 8, 3))
"""Tile, warps, stages: those that `studies/cubins.py` shows to fit."""
SPANS = (128, 256, 512)


def tiling_rows(
    gpu: Gpu | None, shapes: Sequence[Shape] = (LLAMA_2_7B, _int8(LLAMA_2_7B), LLAMA_3_8B)
) -> Iterator[Row]:  # fmt: skip
    """Other tilings of the same work, to choose the default by: eight sequences at compression 8, uneven, a quarter of the
    layers.
    """
    for shape in shapes:
        part = dataclasses.replace(shape, layers=max(1, shape.layers // 4))
        for tile, warps, stages in TILINGS:
            for span in SPANS:
                labels = {
                    "row": "tiling", "shape": shape.name, "layers": part.layers, **shape.variant.describe(), "tile": tile,
                    "warps": warps, "stages": stages, "span_slots": span,
                }  # fmt: skip
                yield measured(
                    gpu, labels, lambda part=part, given=(tile, warps, stages, span): _time_tiling(gpu, part, *given)
                )


def _time_tiling(gpu: Gpu, shape: Shape, tile: int, warps: int, stages: int, span_slots: int) -> Row:
    from kvfold.ops.paged_triton import Tiling  # needs Triton, which this module does not

    if gpu.state.get("shape") is not shape:
        gpu.state.clear()
        calls = _layer_calls(shape, stream_lengths(shape, 8, 8, "uneven"), gpu.device)
        gpu.state.update(shape=shape, calls=calls)
    tiled = Tiling(tile=tile, warps=warps, stages=stages, span_slots=span_slots)

    def step() -> None:
        for call in gpu.state["calls"]:
            gpu.attend(call.batch, call.q_BHD, call.k_BKD, call.v_BKD, scale=call.scale, softcap=None, tiled=tiled)

    return {"graph_ms": gpu.milliseconds(gpu.captured(step))}


SECONDS = 540
"""After so long no further row is begun."""


def bench_gpu(*, save: Callable[[Row], None] = lambda result: None) -> Row:
    """A result of kind `gpu`. `save` is called with what there is after each row."""
    gpu = _find_gpu()
    result = {"environment": _environment(gpu), "rows": []}
    for rows in (check_rows, graph_rows, bandwidth_rows, kernel_rows, tiling_rows):
        for row in rows(gpu):
            result["rows"].append(row)
            save(result)
    return result


def _find_gpu() -> Gpu | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    from kvfold.ops.paged_triton import decode_triton

    return Gpu(device=torch.device("cuda", 0), attend=decode_triton, deadline=time.monotonic() + SECONDS)


def _environment(gpu: Gpu | None) -> Row:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if gpu is None:
        return {"device": "no GPU", **versions}
    import triton

    properties = torch.cuda.get_device_properties(gpu.device)
    return {
        "device": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory, "cuda": torch.version.cuda, "triton": triton.__version__, **versions,
    }  # fmt: skip


def main(path: Path) -> None:
    """Run everything, and write the result as it grows."""
    bench_gpu(save=lambda result: write_whole_file(path, json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
