"""Which form of a weight is quickest for a few rows: torch's plain product, and the forms that kvfold/ops/linear.py may choose.

    OMP_NUM_THREADS=2 python studies/packed_products.py [--rows 1,4,8,16,32,64] [--dtype float32] [--rounds 9] [--out FILE]

Shapes are SmolLM2-135M's, q/k/v and gate/up joined. The weights of as many layers as exceed the caches take turns, and so do
the forms, round after round. With one thread the clock is the thread's CPU time, which another program's turns do not lengthen;
with more it is the wall's. Printed: microseconds a product, the lower quartile of the rounds. AVX2 alone is approximated by
ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.ops.linear import PackableLinear, PackedWeights

SHAPES = {"q/k/v": (576, 960), "o": (576, 576), "gate/up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
WEIGHT_BYTES = 100e6


def forms(weights: list[Tensor]) -> dict:
    """Name -> function of (index of a weight, input)."""
    fp32 = weights[0].dtype == torch.float32
    layers = []
    for weight in weights:
        layer = PackableLinear(*weight.shape[::-1], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layer.packed = PackedWeights([layer]) if PackedWeights.helps(weight) else None
        layers.append(layer)
    columns = [weight.t().contiguous().t() for weight in weights]
    found = {
        "plain": lambda k, x: F.linear(x, weights[k]),
        "turned": lambda k, x: (weights[k] @ x.t()).t().contiguous(),
        "columns": lambda k, x: F.linear(x, columns[k]),
        "kvfold": lambda k, x: layers[k](x),
    }
    if fp32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
        found["oneDNN"] = lambda k, x: torch.ops.mkldnn._linear_pointwise(x, onednn[k], None, "none", [], "")
    return found


@torch.no_grad()
def measure(name: str, rows_list: list[int], dtype: torch.dtype, rounds: int) -> list[dict]:
    """A row for each number of rows."""
    inputs, outputs = SHAPES[name]
    count = max(2, int(WEIGHT_BYTES / (inputs * outputs * dtype.itemsize)))
    weights = [torch.randn(outputs, inputs).mul_(0.03).to(dtype) for _ in range(count)]
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found, results = forms(weights), []
    for rows in rows_list:
        x = torch.randn(rows, inputs).to(dtype)
        taken: dict[str, list[float]] = {form: [] for form in found}
        for _ in range(rounds):
            for form, product in found.items():
                start = clock()
                for k in range(count):
                    product(k, x)
                taken[form].append((clock() - start) / count * 1e6)
        low = {form: round(sorted(times)[len(times) // 4], 1) for form, times in taken.items()}
        results.append({"product": name, "rows": rows, "microseconds": low})
        print(
            f"{name:8s} rows {rows:3d} | " + " | ".join(f"{form} {one:7.0f}" for form, one in low.items()), flush=True
        )
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,4,8,16,32,64")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [int(text) for text in args.rows.split(",")]
    results = [row for name in SHAPES for row in measure(name, rows, getattr(torch, args.dtype), args.rounds)]
    if args.out is not None:
        about = {
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "dtype": args.dtype,
        }
        args.out.write_text(json.dumps(about | {"rows": results}, indent=1))


if __name__ == "__main__":
    main()
