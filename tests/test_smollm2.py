"""The identity ladder on a real model: SmolLM2-135M as its package ships it, through kvfold and through transformers.

Slow: two models of half a gigabyte each, some minutes on one core.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import kvfold
from kvfold.demo import SAMPLE, bundled_model
from kvfold.models.families import fold_weights

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
GRADIENT_ERROR = 1e-4
"""Norm of the difference over the norm of transformers' gradient, for each weight: fp32 sums in another order."""
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "<|im_start|>user\nName three colours of the rainbow.<|im_end|>\n<|im_start|>assistant\n",
    "Question: A farmer has 17 sheep and buys 25 more. How many sheep has the farmer now? Explain.\nAnswer:",
]
EXCERPTS = {40: 2_000, 97: 50_000, 160: 120_000, 300: 200_000}
"""Tokens of the sample text -> the character that they start at."""


@pytest.fixture(scope="module")
def source():
    try:
        return bundled_model()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def theirs(source):
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    finally:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model(source):
    return kvfold.load(source)


@pytest.fixture
def ours(model):
    model.config.layout = model.config.layout.with_time("full")
    return model


@pytest.fixture(scope="module")
def prompts(source) -> list[list[int]]:
    """Eight texts of 5 to 300 tokens."""
    tokenizer, text = kvfold.load_tokenizer(source), SAMPLE.read_text(encoding="utf-8")
    excerpts = [tokenizer(text[start : start + 10 * size]).input_ids[:size] for size, start in EXCERPTS.items()]
    return [tokenizer(prompt).input_ids for prompt in PROMPTS] + excerpts


@pytest.fixture(scope="module")
def batch(prompts):
    """All of them side by side, padded at the left with token 2."""
    most = max(map(len, prompts))
    ids = torch.tensor([[2] * (most - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (most - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def continued(model, **call) -> torch.Tensor:
    """64 greedy tokens a row; the end token is never chosen."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 2}
    return model.generate(**call, **options)[:, -NEW_TOKENS:]


@pytest.fixture(scope="module")
def expected(theirs, batch):
    return continued(theirs, **batch)


def test_the_prompts_are_of_many_lengths(prompts):
    lengths = sorted(map(len, prompts))
    assert len(set(lengths)) == 8 and lengths[0] < 8 and lengths[-1] == 300


def test_logits_equal_transformers(ours, theirs, batch):
    """Dense, through a fresh cache, and read in pieces; of a left-padded batch."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    real = mask.bool()
    with torch.no_grad():
        reference = theirs(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[real]
        for use_cache in (False, True):
            logits = ours(ids, attention_mask=mask, use_cache=use_cache).logits[real]
            torch.testing.assert_close(logits, reference, atol=1e-4, rtol=1e-4)
        cache, pieces = ours.new_cache(rows=8), []
        for start, stop in ((0, 150), (150, 290), *((column, column + 1) for column in range(290, 300))):
            call = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            pieces.append(ours(ids[:, start:stop], **call).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], reference, atol=1e-4, rtol=1e-4)


def test_gradients_equal_transformers(ours, theirs, prompts):
    """Of a text of 48 tokens; see GRADIENT_ERROR."""
    ids = torch.tensor([prompts[-1][:48]])
    losses = []
    for each in (ours, theirs):
        each.zero_grad()
        loss = each(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    found = {name: weight.grad for name, weight in ours.named_parameters()}
    reference = fold_weights(ours.config, {name: weight.grad for name, weight in theirs.named_parameters()})
    assert found.keys() == reference.keys() and len(found) > 200
    errors = {name: float((found[name] - reference[name]).norm() / reference[name].norm()) for name in found}
    for each in (ours, theirs):
        each.zero_grad()
    worst = max(errors, key=errors.get)
    assert errors[worst] < GRADIENT_ERROR, f"{worst}: {errors[worst]:.1e}"


def test_greedy_tokens_of_a_left_padded_batch_equal_transformers(ours, batch, expected):
    assert torch.equal(continued(ours, **batch), expected)


@pytest.mark.parametrize("row", [2, 6])
def test_greedy_tokens_of_one_text_alone_equal_transformers(ours, theirs, prompts, expected, row):
    """And both equal what the text gives in the padded batch."""
    ids = torch.tensor([prompts[row]])
    found = continued(ours, input_ids=ids)
    assert torch.equal(found, continued(theirs, input_ids=ids))
    assert torch.equal(found[0], expected[row])


@pytest.mark.parametrize("time", ["h2o:256+256", "tova:100%"])
def test_greedy_tokens_under_a_budget_as_long_as_the_text(ours, batch, expected, time):
    ours.config.layout = ours.config.layout.with_time(time)
    cache = ours.new_cache(rows=8)
    assert torch.equal(continued(ours, past_key_values=cache, **batch), expected)
    assert torch.equal(cache.kept_tokens[0, :, 0], cache.seen_tokens)
    assert cache.allocated_bytes == kvfold.plan(ours).bytes(cache.seen_tokens.tolist())


QUESTIONS = {
    "capitals": (
        "What is the capital of {}?",
        {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"},
    ),
    "colours": (
        "Which colour has {}?",
        {"grass": "green", "snow": "white", "coal": "black", "a ripe banana": "yellow"},
    ),
    "sounds": (
        "What does {} say?",
        {"a cat": "meow", "a dog": "woof", "a cow": "moo, all day long", "a duck": "quack"},
    ),
}


def test_tasks_score_as_lm_evals_own_model_and_otherwise_under_h2o(ours, theirs, source, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvfold[eval]'")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from kvfold.eval.lm_eval import FoldLM, find_tasks

    for name, (asked, answers) in QUESTIONS.items():
        choices = list(answers.values())
        lines = [
            {"input": asked.format(what), "choices": choices, "gold": choices.index(right)}
            for what, right in answers.items()
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = kvfold.load_tokenizer(source)
    mine = FoldLM(ours, tokenizer, batch_size=32, report=lambda *said: None)
    hf = HFLM(theirs, backend="causal", tokenizer=tokenizer, batch_size=8)
    for task in find_tasks([str(path) for path in sorted(tmp_path.glob("*.jsonl"))]):
        scores = {}
        for side, lm, method in (("hf", hf, None), ("full", mine, "full"), ("h2o", mine, "h2o:12%+13%")):
            mine.layout = mine.layout.with_time(method or "full")
            found = evaluate(lm=lm, task_dict=task.load(), log_samples=True)
            likelihoods = [resp[0][0] for sample in found["samples"][task.name] for resp in sample["resps"]]
            scores[side] = found["results"][task.name]["acc,none"], likelihoods
        assert scores["full"][0] == scores["hf"][0]
        assert scores["full"][1] == pytest.approx(scores["hf"][1], abs=1e-3)
        assert max(abs(a - b) for a, b in zip(scores["full"][1], scores["h2o"][1], strict=True)) > 0.5
