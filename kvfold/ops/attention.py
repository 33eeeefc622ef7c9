"""Attention of a call's queries over keys that lie side by side: SDPA, a plain form that also returns weights, and lifespan_cpu.c
for the many queries of a prompt in fp32.

Where an entry lives only up to the last query that sees it (a window, an eviction, a merge), the entries that a block of
queries sees are few: they are gathered side by side, and no mask of queries by all entries is ever made. The paged twin for
decoding lives in paged.py. Letters: B rows, T queries, E entries (keys), M entries that a block sees, H query heads, K kv
heads, G = H // K, D head dim.
"""

import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.ops import native

LEAST_QUERIES = 8
"""Below, laying out the entries for C costs more than it saves."""
_JOB = struct.Struct("9P 16q 2d")
"""`lifespan_job` of lifespan_cpu.c, field for field."""
_FAR = 2**31 - 1
"""A position that C takes for one that never comes."""
_WEIGHT_CHUNK_ELEMENTS = 1 << 24
"""Weights held at once while they are summed: bounds the memory of a long call (64 MiB in fp32)."""


def dense_attention(
    q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, scale: float, softcap: float | None = None,
    mask: Tensor | None = None, bias_BKE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [B, T, H, D].

    `bias_BKE`: fp32, added to each key's logits after scale and softcap.

    `mask`: bool [B or 1, 1 or K, T, E], True = the query sees the key; None = causal: the queries are those of the last T
    keys.
    A query that sees nothing must not occur: give it its own key.
    """
    library = serving(q_BTHD, k_BEKD, v_BEKD, bias_BKE) if mask is None else None
    if library is not None:
        return lifespans(library, q_BTHD, k_BEKD, v_BEKD, scale=scale, softcap=softcap, bias_BKE=bias_BKE)
    if softcap is not None or bias_BKE is not None:
        more = {"scale": scale, "softcap": softcap, "mask": mask, "bias_BKE": bias_BKE}
        return attention_with_weights(q_BTHD, k_BEKD, v_BEKD, **more)[0]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BEKD, v_BEKD))
    grouped = q.shape[1] != k.shape[1]
    if mask is None and q.shape[2] != k.shape[2]:
        mask = _mask_rows(None, 0, q.shape[2], q.shape[2], k.shape[2], q.device)
    if mask is not None and mask.shape[1] not in (1, q.shape[1]):
        return _masked_by_head(q, k, v, mask, scale)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _masked_by_head(q_BHTD: Tensor, k_BKED: Tensor, v_BKED: Tensor, mask_BKTE: Tensor, scale: float) -> Tensor:
    """A mask of each kv head serves its G query heads without being repeated: every (sequence, kv head) is a batch of its own."""
    batch, heads, num_queries, dim = q_BHTD.shape
    kv_heads, entries = k_BKED.shape[1:3]
    q = q_BHTD.reshape(batch * kv_heads, heads // kv_heads, num_queries, dim)
    k, v = (x.reshape(batch * kv_heads, 1, entries, x.shape[-1]) for x in (k_BKED, v_BKED))
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
    mask = mask_BKTE.expand(batch, -1, -1, -1).reshape(batch * kv_heads, 1, num_queries, entries)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, num_queries, -1).transpose(1, 2)


def attention_with_weights(
    q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, scale: float, softcap: float | None = None,
    mask: Tensor | None = None, weigh_BT: Tensor | None = None, bias_BKE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The plain form: output [B, T, H, D] and the weight each key received [B, K, E] in fp32, summed over the queries
    (those where `weigh_BT` is True) and over the G query heads of the kv head. Mask as in `dense_attention`.
    """
    batch, num_queries, num_heads, head_dim = q_BTHD.shape
    entries, kv_heads = k_BEKD.shape[1], k_BEKD.shape[2]
    q = q_BTHD.reshape(batch, num_queries, kv_heads, num_heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    k, v = k_BEKD.permute(0, 2, 3, 1).unsqueeze(2), v_BEKD.permute(0, 2, 1, 3).unsqueeze(2)
    chunk = max(1, _WEIGHT_CHUNK_ELEMENTS // max(1, batch * num_heads * entries))
    outs, received = [], q.new_zeros((batch, kv_heads, entries), dtype=torch.float32)
    for start in range(0, num_queries, chunk):
        stop = min(start + chunk, num_queries)
        logits = (q[:, :, :, start:stop] @ k) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if bias_BKE is not None:
            logits = logits + bias_BKE[:, :, None, None]
        seen = _mask_rows(mask, start, stop, num_queries, entries, q.device)
        weights = logits.masked_fill(~seen.unsqueeze(2), -torch.inf).softmax(dim=-1, dtype=torch.float32)
        counted = weights if weigh_BT is None else weights * weigh_BT[:, None, None, start:stop, None]
        received = received + counted.sum(dim=(2, 3))
        outs.append(weights.to(v.dtype) @ v)
    out = torch.cat(outs, dim=3) if len(outs) > 1 else outs[0]
    return out.permute(0, 3, 1, 2, 4).reshape(batch, num_queries, num_heads, v_BEKD.shape[-1]), received


def _mask_rows(
    mask: Tensor | None, start: int, stop: int, num_queries: int, entries: int, device: torch.device
) -> Tensor:  # fmt: skip
    """Rows start..stop of the mask, [B or 1, 1 or K, rows, E]; causal where none is given."""
    if mask is not None:
        return mask[:, :, start:stop]
    columns, stored = torch.arange(entries, device=device), entries - num_queries
    return (columns <= stored + torch.arange(start, stop, device=device)[:, None])[None, None]


def serving(q_BTHD: Tensor, *others: Tensor | None) -> native.LifespanLibrary | None:
    """The functions of lifespan_cpu.c, where they serve a call with these tensors: fp32 without gradients, many queries."""
    tensors = [q_BTHD, *(one for one in others if one is not None)]
    plain = all(one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    elsewhere = learns or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if not plain or elsewhere or q_BTHD.shape[1] < LEAST_QUERIES:
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


FOREVER = 2**40
"""The last query of an entry that stays."""
BLOCK = 128
"""Queries that look together: fewer, and gathering shows; more, and a block sees what half of its queries don't."""


def lifespan_attention(
    q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, query_BT: Tensor, position_BKE: Tensor, last_BKE: Tensor,
    scale: float, softcap: float | None = None, bias_BKE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention output [B, T, H, D]; a query at position t sees the entries with position <= t <= last. 0 where it sees none.

    `query_BT`: -1 at padding, otherwise growing. `position_BKE`: -1 where there is no entry. `bias_BKE`: added to the logits of
    an entry after scale and softcap.
    """
    library = serving(q_BTHD, k_BEKD, v_BEKD, bias_BKE)
    if library is not None:
        return lifespans(
            library, q_BTHD, k_BEKD, v_BEKD, query_BT=query_BT, position_BKE=position_BKE, last_BKE=last_BKE, scale=scale,
            softcap=softcap, bias_BKE=bias_BKE,
        )  # fmt: skip
    outs = []
    for start in range(0, q_BTHD.shape[1], BLOCK):
        query = query_BT[:, start : start + BLOCK]
        real = query >= 0
        first = query.masked_fill(~real, FOREVER).amin(dim=1)[:, None, None]
        newest = query.amax(dim=1)[:, None, None]
        wanted_BKE = (position_BKE >= 0) & (position_BKE <= newest) & (last_BKE >= first)
        index_BKM, there_BKM = chosen_entries(wanted_BKE)
        position, last = position_BKE.gather(2, index_BKM), last_BKE.gather(2, index_BKM)
        at = query[:, None, :, None]
        mask = there_BKM.unsqueeze(2) & (position.unsqueeze(2) <= at) & (last.unsqueeze(2) >= at)
        if not bool(real.all()):
            # A softmax over nothing has no gradient that is a number, whatever becomes of its output.
            mask = mask | ~real[:, None, :, None]
        k, v = (_gathered(x, index_BKM) for x in (k_BEKD, v_BEKD))
        bias = None if bias_BKE is None else bias_BKE.gather(2, index_BKM)
        block = q_BTHD[:, start : start + BLOCK]
        out = dense_attention(block, k, v, scale=scale, softcap=softcap, mask=mask, bias_BKE=bias)
        outs.append(out.masked_fill(~real[:, :, None, None], 0))
    return torch.cat(outs, dim=1)


def lifespan_reference(
    q_BTHD: Tensor, k_BEKD: Tensor, v_BEKD: Tensor, *, query_BT: Tensor, position_BKE: Tensor, last_BKE: Tensor,
    scale: float, softcap: float | None = None, bias_BKE: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The judge: one query of one head at a time."""
    out = torch.zeros_like(q_BTHD)
    group = q_BTHD.shape[2] // k_BEKD.shape[2]
    for row, column in (query_BT >= 0).nonzero().tolist():
        at = int(query_BT[row, column])
        for head in range(q_BTHD.shape[2]):
            kv_head = head // group
            position, last = position_BKE[row, kv_head], last_BKE[row, kv_head]
            seen = (position >= 0) & (position <= at) & (last >= at)
            if not bool(seen.any()):
                continue
            logits = k_BEKD[row, seen, kv_head] @ q_BTHD[row, column, head] * scale
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            if bias_BKE is not None:
                logits = logits + bias_BKE[row, kv_head, seen]
            out[row, column, head] = logits.softmax(dim=0) @ v_BEKD[row, seen, kv_head]
    return out


def chosen_entries(wanted_BKE: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [B, K, M] of the wanted entries of each head in their order, and which of them are there: heads differ."""
    place = wanted_BKE.cumsum(dim=2) - 1
    count = wanted_BKE.sum(dim=2)
    most = max(1, int(count.max()))
    # What is not wanted goes to a place behind all others.
    place = place.masked_fill(~wanted_BKE, most)
    entry = torch.arange(wanted_BKE.shape[2], device=place.device).expand_as(place)
    index = entry.new_zeros((*place.shape[:2], most + 1)).scatter_(2, place, entry)[..., :most]
    return index, torch.arange(most, device=place.device) < count.unsqueeze(-1)


def _gathered(x_BEKD: Tensor, index_BKM: Tensor) -> Tensor:
    """The entries of each head, [B, M, K, D] as `dense_attention` takes them."""
    batch, entries, heads, dim = x_BEKD.shape
    row = torch.arange(batch, device=x_BEKD.device)[:, None, None]
    head = torch.arange(heads, device=x_BEKD.device)[:, None]
    flat = (row * entries + index_BKM) * heads + head
    return x_BEKD.reshape(-1, dim)[flat].transpose(1, 2)
