"""Compiles the Triton kernels of decode attention without a GPU and tells what their machine code takes.

A proof for machines that have none: every main variant compiles for sm80 (A100) and sm90 (H100, H200) through the same door
as a launch does, and its registers, spills and shared memory are known. How fast it runs is for `kvfold.bench.gpu`.
Usage: `python studies/cubins.py > cubins.json`. Letters: as in ops/paged_triton.py.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import torch
import triton
from triton.backends.compiler import GPUTarget

from kvfold.bench.kernel import VARIANTS, Row, Variant
from kvfold.errors import UserError
from kvfold.ops.paged import DecodeBatch
from kvfold.ops.paged_triton import Launch, plan_launches
from kvfold.ops.quantised import scale_groups

TARGETS = (80, 90)
"""Compute capabilities times ten."""
_REGISTERS, _THREADS = 65536, 2048
_SHARED_BYTES = {80: 164 << 10, 90: 228 << 10}
_RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver takes for itself in every program."""


def example(variant: Variant, *, rows: int = 8, length: int = 4096) -> list[Launch]:
    """The launches of a call of this kind with 8 KV heads, on tensors without memory."""
    kv_heads = 8

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pages, slots, streams = rows * kv_heads * -(-length // variant.page_slots), variant.page_slots, (rows, kv_heads)
    head_dim, scales = variant.head_dim, (pages, slots, scale_groups(variant.head_dim))
    batch = DecodeBatch(
        k_PND=empty(pages, slots, head_dim, dtype=variant.k_pages),
        v_PND=empty(pages, slots, head_dim, dtype=variant.v_pages),
        k_scale_PNS=empty(*scales, dtype=torch.float16) if variant.k_pages == torch.int8 else None,
        v_scale_PNS=empty(*scales, dtype=torch.float16) if variant.v_pages == torch.int8 else None,
        position_PN=empty(pages, slots, dtype=torch.int32),
        score_PN=empty(pages, slots, dtype=torch.float32) if variant.scored else None,
        bias_PN=empty(pages, slots, dtype=torch.float16) if variant.biased else None,
        table_T=empty(pages, dtype=torch.int32),
        start_BK=empty(*streams, dtype=torch.int64),
        length_BK=empty(*streams, dtype=torch.int32),
        max_length=length,
        head_dim=head_dim,
        slots_BK=empty(*streams, dtype=torch.int64) if variant.written else None,
        live_B=empty(rows, dtype=torch.bool),
        oldest_B=empty(rows, dtype=torch.int32) if variant.windowed else None,
        received_BKE=empty(*streams, length + 1, dtype=torch.float32) if variant.scored else None,
        received_old=variant.scored,
    )
    q, new = (empty(rows, heads, head_dim, dtype=variant.q) for heads in (kv_heads * variant.group, kv_heads))
    return plan_launches(batch, q, new, new, scale=head_dim**-0.5, softcap=variant.softcap)[1]


def cubin_rows(targets: Sequence[int] = TARGETS, variants: Sequence[Variant] = VARIANTS) -> Iterator[Row]:
    """A row for each kernel of each variant and target. Takes over Triton's idea of the device at hand: for a process of
    its own. Raises `UserError` where kernels are interpreted.
    """
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set: interpreted kernels are not compiled: unset it")
    for target in targets:
        triton.runtime.driver.set_active(_NoDevice(target))
        for variant in variants:
            for launch in example(variant):
                yield variant.describe() | _compiled_row(launch, target)


def _compiled_row(launch: Launch, target: int) -> Row:
    """What the machine code of one launch takes, and how many of its programs a multiprocessor holds at once."""
    kernel = launch.kernel.warmup(grid=launch.grid, **launch.arguments, **launch.constants, **launch.options)
    registers, stack = _resources(kernel.asm["cubin"])
    threads, shared = 32 * launch.options["num_warps"], kernel.metadata.shared
    resident = min(
        _REGISTERS // (-(-registers // 8) * 8 * threads), _THREADS // threads,
        _SHARED_BYTES[target] // (shared + _RESERVED_SHARED_BYTES),
    )  # fmt: skip
    constants = launch.constants
    return {
        "target": f"sm{target}", "kernel": launch.kernel.__name__.lstrip("_"), "tile": constants.get("TILE"),
        "stages": constants.get("STAGES"), "warps": launch.options["num_warps"], "registers": registers,
        "stack_bytes": stack, "shared_bytes": shared, "resident_programs": resident,
        "cubin_bytes": len(kernel.asm["cubin"]),
    }  # fmt: skip


class _NoDevice:
    """Stands where Triton looks for a GPU driver: enough to compile, nothing to launch on."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_device(self) -> int:
        """Triton keeps what it compiled by device: one each target."""
        return self.target

    def get_current_stream(self, device: int) -> int:
        """CUDA's default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.target, 32)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which holds nothing but what was stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def main() -> None:
    """All rows as one JSON document on stdout."""
    rows = list(cubin_rows())
    environment = {"triton": triton.__version__, "torch": torch.__version__}
    sys.stdout.write(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
