"""What a learned method keeps of text, for engines that have to know before a request has run: tokens kept over tokens seen, per
owner and KV head, at three lengths, as the cache itself counts them. The ratios belong to the gates and hardly to the text;
Tangram's authors (arXiv 2606.06302) find about 50 samples enough. Engines learn the rest online.

Letters: N sequences, T tokens, S KV streams (owners ascending, then heads).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.engine.budget import KeptRatios
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.models.decoder import FoldForCausalLM

PARTS = (4, 2, 1)
"""Of a sequence's length: the three lengths at which ratios are taken."""
CALL_TOKENS, ROWS = 256, 8
"""Of one call of the model."""
_DIGITS = 4


@torch.inference_mode()
def measure_kept_ratios(
    model: FoldForCausalLM, blocks_NT: Tensor, *, lengths: Sequence[int] | None = None, report: Report = silent
) -> dict[str, Any]:
    """Plain values: the method's text form under `time`, and `KeptRatios`. `lengths`: tokens seen, ascending; None = a quarter, a
    half and all of the sequences. Raises `UserError` where they are longer than the sequences.
    """
    layout, tokens = model.config.layout, blocks_NT.shape[1]
    lengths = sorted({max(1, tokens // part) for part in PARTS}) if lengths is None else list(lengths)
    if not len(blocks_NT) or lengths[-1] > tokens:
        raise UserError(f"lengths up to {lengths[-1]} tokens: sequences have {tokens}: give longer text")
    found: list[list[Tensor]] = [[] for _ in lengths]
    for first in range(0, len(blocks_NT), ROWS):
        report("kept ratios", first, len(blocks_NT))
        ids = blocks_NT[first : first + ROWS].to(model.device)
        cache, seen = model.new_cache(rows=len(ids), time=layout.time_text(), bits=layout.bits_text()), 0
        for place, length in enumerate(lengths):
            while seen < length:
                stop = min(length, seen + CALL_TOKENS)
                model.model(ids[:, seen:stop], past_key_values=cache, use_cache=True)
                seen = stop
            found[place].append(kept_streams(cache.kept_tokens) / length)
        cache.free()
    report("kept ratios", len(blocks_NT), len(blocks_NT))
    rows = {
        name: tuple(
            tuple(round(share, _DIGITS) for share in torch.cat(one).double().quantile(quantile, dim=0).tolist())
            for one in found
        )
        for name, quantile in (("median", 0.5), ("p95", 0.95))
    }
    return {"time": layout.time_text(), **KeptRatios(lengths=tuple(lengths), **rows).to_json()}


def kept_streams(kept_ONK: Tensor) -> Tensor:
    """A cache's `kept_tokens`, -1 where an owner has fewer heads, as [N, S]."""
    by_sequence = kept_ONK.transpose(0, 1).flatten(1)
    return by_sequence[:, by_sequence[0] >= 0].cpu()
