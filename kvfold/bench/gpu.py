"""What only a GPU can show, in one run of under ten minutes: kernels checked against the plain form, then timed.

The run is a list of row functions, those that matter most first. Each takes the GPU, or None where there is none, and yields
rows (gpu_kernels.py). A row that fails stops nothing, and what the time did not reach is `not measured`.
Usage: `python -m kvfold.bench.gpu FILE.json`. The file is written anew after each row, so that a run that is cut short leaves
what it had.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from kvfold.bench import gpu_kernels
from kvfold.bench.gpu_kernels import Gpu, Row, RowFunction

SECONDS = 540
"""After so long no further row is begun."""
ROW_FUNCTIONS: tuple[RowFunction, ...] = (
    gpu_kernels.check_rows, gpu_kernels.graph_rows, gpu_kernels.bandwidth_rows, gpu_kernels.kernel_rows,
    gpu_kernels.tiling_rows,
)  # fmt: skip
"""In order of worth. A decode step through the cache becomes one more of these."""


def bench_gpu(
    row_functions: Sequence[RowFunction] = ROW_FUNCTIONS, *, seconds: float = SECONDS,
    save: Callable[[Row], None] = lambda result: None,
) -> Row:  # fmt: skip
    """A result of kind `gpu`. `save` is called with what there is after each row."""
    gpu = find_gpu(seconds)
    result = {"environment": _environment(gpu), "rows": []}
    for rows in row_functions:
        for row in rows(gpu):
            result["rows"].append(row)
            save(result)
    return result


def find_gpu(seconds: float) -> Gpu | None:
    """The first CUDA device, or None."""
    if not torch.cuda.is_available():
        return None
    from kvfold.ops.paged_triton import decode_triton

    return Gpu(device=torch.device("cuda", 0), attend=decode_triton, deadline=time.monotonic() + seconds)


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

    def save(result: Row) -> None:
        aside = path.with_name(path.name + ".part")
        aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)

    bench_gpu(save=save)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
