"""A tiny random model, and the slow judge of the engine: one request alone, in a cache of its own."""

from functools import cache as remembered

import torch

from byte_tokenizer import EOS, VOCAB_SIZE, byte_tokenizer
from kvfold.cache.hf import FoldCache
from kvfold.engine.request import parse_question
from kvfold.engine.sampler import SamplingState, adjusted, sample, uniform
from kvfold.methods.gates import GateConfig
from kvfold.methods.registry import method_class
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from simulated import make_request

TOKENIZER = byte_tokenizer()
NEAR = 1e-3
"""A choice or a gate this close could be rounded either way: answers that differ there are excused, and counted."""


@remembered
def tiny_model(gates: str = "dms") -> FoldForCausalLM:
    """Two layers of two KV heads, with random gates of a learned method; its own method is full."""
    torch.manual_seed(0)
    model = FoldForCausalLM(
        FoldConfig(
            vocab_size=VOCAB_SIZE + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            head_dim=8, num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, eos_token_id=EOS,
        )
    )  # fmt: skip
    source = "adapter" if method_class(gates).gate_form.channel_of is None else "channel"
    model.set_gates(GateConfig(method=gates, source=source, scale=40.0, offset=1.0), gates)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.config.layout = model.config.layout.base()
    return model.eval()


@torch.no_grad()
def alone(model, asked: dict, *, grid: int = 512) -> tuple[list[int], list[float]]:
    """The answer's tokens when nobody else runs, and for each the least margin of all choices and gates up to it."""
    question = parse_question(asked)
    layout = model.config.layout.with_time(question.time or "full")
    ids = list(question.prompt)
    request = make_request("alone", ids, max_tokens=question.params.max_tokens)
    request.params, request.seed = question.params, question.params.seed or 0
    state = SamplingState(request=request, eos_ids=(EOS,))
    cache, margins, least = FoldCache(layout, dtype=torch.float32, page_slots=4), [], float("inf")
    chunks = [ids[start : start + grid] for start in range(0, len(ids), grid)]
    before, model.config.layout = model.config.layout, layout
    try:
        for _ in range(request.max_tokens):
            for chunk in chunks:
                out = model(torch.tensor([chunk]), past_key_values=cache, output_decisions=True)
                for one in out.gate_probs:
                    if one is not None:
                        least = min(least, float(torch.logit(one.double(), eps=1e-12).abs().min()))
            least = min(least, _margin(adjusted(out.logits[:, -1], [state])[0], request))
            token = sample(out.logits[:, -1], [state])[0].token
            margins.append(least)
            request.tokens.append(token)
            chunks = [[token]]
            if token in state.end_ids:
                break
    finally:
        model.config.layout = before
    return request.outputs, margins


def _margin(scores_V, request) -> float:
    """How near the next choice is to another one."""
    if request.params.temperature == 0:
        first, second = scores_V.topk(2).values.tolist()
        return first - second
    sums = torch.softmax(scores_V.double() / request.params.temperature, dim=0).cumsum(dim=0)
    return float((sums - uniform(request.seed, request.num_outputs)).abs().min())


def differences(model, requests: list[dict], answers, **options) -> tuple[int, int]:
    """Answers that differ from their solo runs: excused by a near tie, and not."""
    excused = wrong = 0
    for asked, answer in zip(requests, answers, strict=True):
        expected, margins = alone(model, asked, **options)
        got = answer.token_ids
        if got == expected:
            continue
        first = next((i for i, pair in enumerate(zip(got, expected)) if pair[0] != pair[1]), None)  # noqa: B905
        near = first is not None and margins[first] < NEAR
        excused, wrong = excused + near, wrong + (not near)
    return excused, wrong
