"""Attention of a prompt in C: calls lifespan_cpu.c, whose slow twins are in blockwise.py and attention.py.

Letters: B rows, T queries, E entries, H query heads, K kv heads, D head dim.
"""

import struct

import torch
from torch import Tensor

from kvfold.ops import native

LEAST_QUERIES = 8
"""Below, laying out the entries costs more than it saves."""
_JOB = struct.Struct("9P 16q 2d")
"""`lifespan_job` of lifespan_cpu.c, field for field."""
_FAR = 2**31 - 1
"""A position that C takes for one that never comes."""


def serving(q_BTHD: Tensor, *others: Tensor | None) -> native.LifespanLibrary | None:
    """The functions of lifespan_cpu.c, where they serve a call with these tensors: fp32 without gradients, many queries."""
    if q_BTHD.dtype != torch.float32 or q_BTHD.device.type != "cpu" or q_BTHD.shape[1] < LEAST_QUERIES:
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return None
    tensors = [q_BTHD, *(one for one in others if one is not None)]
    if any(one.dtype != torch.float32 or (one.requires_grad and torch.is_grad_enabled()) for one in tensors):
        return None
    library = native.lifespan_library()
    return library if library is not None and q_BTHD.shape[-1] % library.panel == 0 else None


def lifespans(
    library: native.LifespanLibrary, q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, scale: float, softcap: float | None,
    query_BT: Tensor | None = None, position_BKE: Tensor | None = None, last_BKE: Tensor | None = None,
    bias_BKE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `lifespan_attention`; without positions the queries are the last of the entries, and each sees those up to itself."""
    rows, tokens, heads, dim = q_BTHD.shape
    entries, kv_heads = k_BEKD.shape[1:3]
    sizes, expected = (rows, kv_heads, entries), (rows, entries, kv_heads, dim)
    if heads % kv_heads or k_BEKD.shape != expected or v_BEKD.shape != expected:
        raise AssertionError(f"C checks nothing: q {q_BTHD.shape}, k {k_BEKD.shape}, v {v_BEKD.shape}")
    # These tensors are held until C has returned: it gets bare addresses.
    wide = [x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHD, k_BEKD, v_BEKD)]
    lives = [_small(query_BT, (rows, tokens)), *(_small(x, sizes) for x in (position_BKE, last_BKE))]
    bias = None if bias_BKE is None else bias_BKE.expand(sizes).contiguous()
    out = q_BTHD.new_empty(q_BTHD.shape)
    job = _JOB.pack(
        *(0 if x is None else x.data_ptr() for x in (*wide, *lives, bias, out)), library.parallel,
        rows, tokens, entries, heads, kv_heads, dim, torch.get_num_threads(),
        *(step for x in wide for step in x.stride()[:3]), scale, softcap or 0.0,
    )  # fmt: skip
    if library.attend(job):
        raise MemoryError("no memory to lay out the keys and values of a prompt")
    return out


def _small(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Positions as C reads them, int32."""
    if x is None:
        return None
    return (x if x.dtype == torch.int32 else x.clamp(max=_FAR).int()).expand(shape).contiguous()
