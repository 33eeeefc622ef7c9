"""Decoding attention over a paged, ragged cache: one query token a row, pages read where they lie.

`decode_attention` picks the compiled form (CPU, fp32) or the plain one, `decode_reference`, which gathers the pages
and is the judge of the other. Letters: B rows, H query heads, K kv heads, G = H // K, D head dim, P pages of the pool,
N slots a page, M pages a lane at most, R row slots, E columns of `received`. A lane is one (row, kv head).
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.ops import native
from kvfold.ops.attention import weighed_attention


@dataclass(kw_only=True, slots=True)
class DecodeLanes:
    """Where the lanes of one owner lie, and what this step does with the new token."""

    k_PND: Tensor
    v_PND: Tensor
    position_PN: Tensor
    score_PN: Tensor | None
    """When given, the weight that each stored key receives is added to it."""
    table_RKM: Tensor
    length_RK: Tensor
    rows_B: Tensor
    max_length: int
    """No lane of the call is longer than this."""
    slots_BK: Tensor | None
    """Flat slot (page * N + slot) that takes the new k and v before attention, -1 for a dead row; `length_RK` counts it
    already. None: the new token is attended to from where it lies and stored later, or (with k None) nothing is new."""
    live_B: Tensor | None
    """False for a row whose token is padding: nothing is written and its output is zero. None = all live."""
    oldest_B: Tensor | None = None
    """Stored keys at earlier positions are not seen (a sliding layer under another policy), int32."""
    received_BKE: Tensor | None = None
    """fp32; weights summed over the G heads are added: column E - 1 is the new token's, column i slot i's."""
    received_old: bool = False
    """Whether the columns of stored slots are wanted too."""


def decode_attention(
    lanes: DecodeLanes,
    q_BHD: Tensor,
    k_BKD: Tensor | None,
    v_BKD: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention output [B, H, D] of each row's one query; writes and scores as `DecodeLanes` says."""
    fits = q_BHD.device.type == "cpu" and q_BHD.dtype == lanes.k_PND.dtype == lanes.v_PND.dtype == torch.float32
    library = native.library() if fits else None
    if library is None:
        return decode_reference(lanes, q_BHD, k_BKD, v_BKD, scale=scale, softcap=softcap)
    return _decode_native(library, lanes, q_BHD, k_BKD, v_BKD, scale, softcap)


def decode_reference(
    lanes: DecodeLanes,
    q_BHD: Tensor,
    k_BKD: Tensor | None,
    v_BKD: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The same by gathering every lane's pages side by side: simple, any device and dtype."""
    if lanes.slots_BK is not None and k_BKD is not None:
        chosen = lanes.slots_BK >= 0
        lanes.k_PND.view(-1, k_BKD.shape[-1])[lanes.slots_BK[chosen]] = k_BKD[chosen].to(lanes.k_PND.dtype)
        lanes.v_PND.view(-1, v_BKD.shape[-1])[lanes.slots_BK[chosen]] = v_BKD[chosen].to(lanes.v_PND.dtype)
    apart = k_BKD is not None and lanes.slots_BK is None
    length_BK = lanes.length_RK[lanes.rows_B]
    stored = int(length_BK.max()) if length_BK.numel() else 0
    flat_BKS, filled_BKS = lane_slots(lanes.table_RKM[lanes.rows_B], length_BK, stored, lanes.k_PND.shape[1])
    k_BKSD, v_BKSD = (
        pool.reshape(-1, pool.shape[-1])[flat_BKS].masked_fill(~filled_BKS.unsqueeze(-1), 0)
        for pool in (lanes.k_PND, lanes.v_PND)
    )
    seen_BKE = filled_BKS
    if lanes.oldest_B is not None:
        seen_BKE = seen_BKE & (lanes.position_PN.view(-1)[flat_BKS] >= lanes.oldest_B[:, None, None])
    if apart:
        k_BKSD = torch.cat((k_BKSD, k_BKD.unsqueeze(2).to(k_BKSD.dtype)), dim=2)
        v_BKSD = torch.cat((v_BKSD, v_BKD.unsqueeze(2).to(v_BKSD.dtype)), dim=2)
        seen_BKE = torch.cat((seen_BKE, seen_BKE.new_ones((*seen_BKE.shape[:2], 1))), dim=2)
    if lanes.live_B is not None:
        seen_BKE = seen_BKE & lanes.live_B[:, None, None]
    out, weights_BKE = weighed_attention(
        q_BHD.unsqueeze(1), k_BKSD.transpose(1, 2).to(q_BHD.dtype), v_BKSD.transpose(1, 2).to(q_BHD.dtype),
        scale=scale, softcap=softcap, mask=seen_BKE.unsqueeze(2),
    )  # fmt: skip
    out = torch.where(seen_BKE.any(dim=2).repeat_interleave(q_BHD.shape[1] // seen_BKE.shape[1], dim=1)[..., None],
                      out.squeeze(1), 0)  # fmt: skip
    _hand_out(lanes, weights_BKE.masked_fill(~seen_BKE, 0), flat_BKS, stored, apart)
    return out


def _hand_out(lanes: DecodeLanes, weights_BKE: Tensor, flat_BKS: Tensor, stored: int, apart: bool) -> None:
    """Add the weights that keys received to the score of their slot and to `received`."""
    if lanes.score_PN is not None:
        lanes.score_PN.view(-1).index_add_(0, flat_BKS.reshape(-1), weights_BKE[..., :stored].reshape(-1))
    if lanes.received_BKE is not None:
        if lanes.received_old:
            lanes.received_BKE[..., :stored] += weights_BKE[..., :stored]
        if apart:
            lanes.received_BKE[..., -1] += weights_BKE[..., stored]


def lane_slots(table_BKM: Tensor, length_BK: Tensor, stored: int, page_slots: int) -> tuple[Tensor, Tensor]:
    """Flat slots [B, K, stored] of the first `stored` entries of each lane, and which of them are filled.

    What is not filled points at slot 0 of the pool, so that it can be gathered (and must be masked).
    """
    index = torch.arange(stored, device=table_BKM.device)
    filled = index < length_BK.unsqueeze(-1)
    page = index // page_slots
    flat = table_BKM[..., page].long() * page_slots + index % page_slots
    return flat.masked_fill_(~filled, 0), filled


class _Job(ctypes.Structure):
    """`decode_job` of paged_cpu.c, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "k v score position table length rows slots live oldest q k_new v_new out received scratch".split())),
        *((name, ctypes.c_int64) for name in "B K G D N M E max_length".split()),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("received_old", ctypes.c_int32),
    ]  # fmt: skip


_SPAN = 256
"""Slots of one work item; SPAN of paged_cpu.c."""


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _decode_native(
    library: ctypes.CDLL, lanes: DecodeLanes, q_BHD: Tensor, k_BKD: Tensor | None, v_BKD: Tensor | None,
    scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    batch, num_heads, head_dim = q_BHD.shape
    kv_heads, pages = lanes.table_RKM.shape[1:]
    group = num_heads // kv_heads
    q, k, v = q_BHD.contiguous(), k_BKD, v_BKD
    # C checks nothing: a wrong shape would be read out of bounds.
    assert num_heads % kv_heads == 0 and lanes.k_PND.shape[2] == lanes.v_PND.shape[2] == head_dim
    if k is not None:
        assert k.shape == v.shape == (batch, kv_heads, head_dim)
        k, v = k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    spans = lanes.max_length // _SPAN + 1
    scratch = q.new_empty(batch * kv_heads * group * (lanes.max_length + 1 + spans * (head_dim + 2)))
    received = lanes.received_BKE
    job = _Job(
        lanes.k_PND.data_ptr(), lanes.v_PND.data_ptr(), _pointer(lanes.score_PN), lanes.position_PN.data_ptr(),
        lanes.table_RKM.data_ptr(), lanes.length_RK.data_ptr(), lanes.rows_B.data_ptr(), _pointer(lanes.slots_BK),
        _pointer(lanes.live_B), _pointer(lanes.oldest_B), q.data_ptr(), _pointer(k), _pointer(v), out.data_ptr(),
        _pointer(received), scratch.data_ptr(), batch, kv_heads, group, head_dim, lanes.k_PND.shape[1], pages,
        0 if received is None else received.shape[-1], lanes.max_length, scale, softcap or 0.0, lanes.received_old,
    )  # fmt: skip
    library.kvfold_decode(ctypes.byref(job))
    return out
