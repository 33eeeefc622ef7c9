"""One call for sequences at different work: some decode, one reads a chunk of its prompt, one has nothing but padding."""

from functools import cache as remembered

import pytest
import torch

from gated_models import LAYOUTS, METHODS, cache_under, gated_model

PROMPTS = (9, 14, 5, 3, 7)
"""Tokens that each sequence has seen before the call."""
BROUGHT = (1, 1, 1, 24, 0)
"""Tokens that it brings: three decode, one reads a chunk, one is padding."""
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def texts():
    source = torch.Generator().manual_seed(4)
    return [
        torch.randint(3, 61, (before + more + 3,), generator=source)
        for before, more in zip(PROMPTS, BROUGHT, strict=True)
    ]


def padded(parts, *, left):
    """Tokens [B, T] and mask of parts of different lengths, padded at one side."""
    columns = max(len(part) for part in parts)
    ids, mask = (
        torch.zeros((len(parts), columns), dtype=torch.long),
        torch.zeros((len(parts), columns), dtype=torch.long),
    )
    for row, part in enumerate(parts):
        place = slice(columns - len(part), columns) if left else slice(0, len(part))
        ids[row, place], mask[row, place] = part, 1
    return ids, mask


@remembered
@torch.no_grad()
def alone(layers, method, row):
    """Logits of one sequence fed by itself, and what it keeps."""
    model, text = gated_model(layers), texts()[row]
    cache, logits, start = cache_under(model, method, 1), [], 0
    for size in (PROMPTS[row], BROUGHT[row], 1):
        if size:
            logits.append(model(text[None, start : start + size], past_key_values=cache).logits[0])
        start += size
    return torch.cat(logits), [owner[0] for owner in cache.kept_positions]


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("layers", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_call_of_decoding_chunk_and_padding_equals_each_alone(method, layers, left):
    model, all_texts = gated_model(layers), texts()
    cache, parts, start = cache_under(model, method, len(all_texts)), [], [0] * len(all_texts)
    with torch.no_grad():
        for sizes in (PROMPTS, BROUGHT, (1,) * 5):
            pieces = [text[begin : begin + size] for text, begin, size in zip(all_texts, start, sizes, strict=True)]
            ids, mask = padded(pieces, left=left)
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits
            assert not logits[mask.bool()].isnan().any()
            parts.append([row[real.bool()] for row, real in zip(logits, mask, strict=True)])
            start = [begin + size for begin, size in zip(start, sizes, strict=True)]
    assert cache.seen_tokens.tolist() == start
    for row in range(len(all_texts)):
        logits, kept = alone(layers, method, row)
        torch.testing.assert_close(torch.cat([part[row] for part in parts]), logits, **CLOSE)
        assert [owner[row] for owner in cache.kept_positions] == kept
    pages = cache.store.pools
    cache.free()
    assert all(pool.held_pages == 0 for pool in pages)
