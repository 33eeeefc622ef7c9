"""The other sides of a serving benchmark: kvfold's and transformers' `generate` as one batch, transformers' continuous batching,
and vLLM in the same bytes.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig

from kvfold.bench.serve import ServeRun, Side, Wanted
from kvfold.bench.vllm_peer import VllmPeer
from kvfold.errors import UserError
from kvfold.eval.cells import load_theirs
from kvfold.models.decoder import FoldForCausalLM

PEERS = ("generate", "transformers", "continuous", "vllm")
"""Names on the command line."""


def check_peers(names: Sequence[str]) -> None:
    """Raise `UserError` for a peer that nobody knows."""
    unknown = sorted(set(names) - set(PEERS))
    if unknown:
        raise UserError(f"peers '{unknown[0]}': it is one of {', '.join(PEERS)}: write one of them")


def open_peers(
    names: Sequence[str],
    model: FoldForCausalLM,
    source: str | Path,
    requests: Sequence[Wanted],
    kv_bytes: int,
    stack: ExitStack,
) -> dict[str, Side]:
    """The sides of these names, on the checkpoint `source`; `stack` closes what they hold."""
    sides: dict[str, Side] = {}
    if "generate" in names:
        sides["generate"] = batch_side(model, lambda rows: model.new_cache(rows=rows, time="full"))
    if {"transformers", "continuous"} & set(names):
        theirs = load_theirs(source, dtype=model.dtype, device=model.device)
        if "transformers" in names:
            sides["transformers"] = batch_side(theirs, lambda rows: DynamicCache(config=theirs.config))
        if "continuous" in names:
            sides["continuous"] = continuous_side(theirs)
    if "vllm" in names:
        sides["vllm"] = vllm_side(source, kv_bytes, requests, stack)
    return sides


def batch_side(model: Any, new_cache: Callable[[int], Any]) -> Side:
    """`generate` of ours or of transformers: all requests as one batch, padded at the left, until the longest is done."""

    def run(requests: Sequence[Wanted]) -> ServeRun:
        widest, most = max(len(one.prompt) for one in requests), max(one.max_tokens for one in requests)
        pads = [widest - len(one.prompt) for one in requests]
        ids = torch.tensor([[0] * pad + list(one.prompt) for pad, one in zip(pads, requests, strict=True)])
        mask = torch.arange(widest) >= torch.tensor(pads)[:, None]
        cpu, start = time.process_time(), time.perf_counter()
        out = model.generate(
            ids.to(model.device), attention_mask=mask.long().to(model.device), past_key_values=new_cache(len(requests)),
            do_sample=False, num_beams=1, min_new_tokens=most, max_new_tokens=most, pad_token_id=0,
        )  # fmt: skip
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        new = out[:, widest:].tolist()
        outputs = tuple(tuple(row[: one.max_tokens]) for row, one in zip(new, requests, strict=True))
        return ServeRun(seconds=seconds, tokens=sum(map(len, outputs)), cpu_seconds=cpu, outputs=outputs)

    return run


def continuous_side(model: Any) -> Side:
    """transformers' continuous batching; every request generates as many tokens as the longest, and those are counted."""

    def run(requests: Sequence[Wanted]) -> ServeRun:
        most = max(one.max_tokens for one in requests)
        wanted = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=-1, pad_token_id=0)
        cpu, start = time.process_time(), time.perf_counter()
        found = model.generate_batch([list(one.prompt) for one in requests], generation_config=wanted, warmup=False)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        outputs = tuple(tuple(one.generated_tokens) for one in found.values())
        return ServeRun(seconds=seconds, tokens=sum(map(len, outputs)), cpu_seconds=cpu, outputs=outputs)

    return run


def vllm_side(source: str | Path, kv_bytes: int, requests: Sequence[Wanted], stack: ExitStack) -> Side:
    """vLLM in so many bytes, in a process of its own that `stack` ends."""
    tokens = max(len(one.prompt) + one.max_tokens for one in requests)
    peer = stack.enter_context(
        VllmPeer(source, max_rows=len(requests), max_tokens=tokens, kv_bytes=kv_bytes, threads=torch.get_num_threads())
    )

    def run(requests: Sequence[Wanted]) -> ServeRun:
        if len({one.max_tokens for one in requests}) > 1:
            raise UserError(
                "requests of several lengths: vLLM is asked for one length of answers: draw one, or leave it out"
            )
        found = peer.run([list(one.prompt) for one in requests], requests[0].max_tokens)
        return ServeRun(
            seconds=found.step_ends[-1], tokens=sum(map(len, found.new_ids)), gaps_s=found.step_seconds,
            stats={"most_running": max(found.step_rows), "preemptions": found.preemptions, **peer.about},
            outputs=found.new_ids,
        )  # fmt: skip

    return run
