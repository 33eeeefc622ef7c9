"""lm-eval's `kvfold` model beside its `hf` model, on one tiny checkpoint."""

import pytest
import torch

from byte_tokenizer import VOCAB_SIZE, byte_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvfold[eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from kvfold.eval import lm_eval as lm_eval_door
from kvfold.eval.lm_eval import FoldLM, register, score_answers
from kvfold.eval.passkey import continuations
from kvfold.models.load import load

CONTEXT = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as transformers writes it, bytes as tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **shape, **heads))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["no bos", "bos"])
def sides(checkpoint, request):
    """Ours and theirs."""
    tokenizer, rows = byte_tokenizer(adds_bos=request.param), {"batch_size": 3}
    theirs = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    ours = FoldLM(load(checkpoint), tokenizer, **rows)
    return ours, HFLM(theirs, backend="causal", tokenizer=tokenizer, **rows)


def asked(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)]


LIKELIHOODS = asked(
    "loglikelihood",
    ("What is it?", " a cat"), ("What is it?", " a dog that barks"), ("What is it?", "x"), ("", "nothing before"),
    ("a space at the end ", "moves"), ("short", " y"), ("long " * 20, " and cut"), ("What is it?", " a cat"),
)  # fmt: skip


def test_likelihoods_equal_those_of_hf(sides):
    ours, theirs = (side.loglikelihood(LIKELIHOODS) for side in sides)
    assert [one for one, _ in ours] == pytest.approx([one for one, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_likelihoods_equal_those_of_hf(sides):
    texts = asked("loglikelihood_rolling", ("one window",), ("several windows of text, " * 8,), ("x",))
    ours, theirs = (side.loglikelihood_rolling(texts) for side in sides)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generated_texts_equal_those_of_hf(sides):
    greedy = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    first = asked("generate_until", ("Once", greedy))
    stop = sides[0].generate_until(first)[0][4:6]
    prompts = asked(
        "generate_until",
        *((text, greedy) for text in ("Once", "A longer prompt than that", "far too long " * 9)),
        ("Once", greedy | {"until": [stop]}),
    )
    ours, theirs = (side.generate_until(prompts) for side in sides)
    assert ours == theirs
    assert len(ours[3]) < len(ours[0])


@pytest.fixture
def folded(sides):
    """Sets ours to a method, and back."""
    ours, own = sides[0], sides[0].layout

    def to(method: str) -> FoldLM:
        ours.layout = own.with_time(method)
        return ours

    yield to
    ours.layout = own


def test_steps_methods_are_fed_one_token_a_call(folded):
    full, h2o = folded("full").loglikelihood(LIKELIHOODS), folded("h2o:12%+13%").loglikelihood(LIKELIHOODS)
    assert max(abs(a - b) for (a, _), (b, _) in zip(full, h2o, strict=True)) > 0.01
    wide = folded("h2o:64+64").loglikelihood(LIKELIHOODS)
    assert [one for one, _ in wide] == pytest.approx([one for one, _ in full], abs=1e-4)
    lm = folded("tova:8")
    lm.take_kept()
    found = lm.loglikelihood(LIKELIHOODS[:1])[0][0]
    prompt, answer = lm._encode_pair(*LIKELIHOODS[0].args)
    assert found == score_answers(lm.model, lm.layout, [(prompt, answer)])[0].log_likelihood
    seen = len(prompt) + len(answer) - 1
    assert lm.take_kept() == [(8 / seen, seen)] and lm.take_kept() == []


def test_prompts_of_generation_are_fed_one_token_a_call(folded):
    lm = folded("h2o:6+6")
    texts = ["A prompt beyond the budget", "Another one of other length"]
    written = lm.generate_until(asked("generate_until", *((text, {"until": [], "max_gen_toks": 8}) for text in texts)))
    prompts = [lm.tok_encode(text) for text in texts]
    expected = continuations(lm.model, lm.layout, prompts, 8, what="")
    assert written == [lm.tok_decode(ids) for ids in expected]
    assert [share * seen for share, seen in lm.take_kept()] == pytest.approx([12, 12])


def test_what_cannot_be_scored_is_refused(folded):
    with pytest.raises(ValueError, match="a continuation of 70 tokens: the model scores 1 to 64"):
        folded("full").loglikelihood(asked("loglikelihood", ("a", "b" * 70)))


def test_lm_eval_knows_the_model_by_name(checkpoint):
    register()
    register()
    lm = get_model("kvfold").create_from_arg_string(
        f"pretrained={checkpoint},time=h2o:12%+13%", {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    )
    assert isinstance(lm, FoldLM)
    assert lm.layout.time_text() == "h2o:12%+13%" and lm.batch_size == 32
    assert lm.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert lm.get_model_info()["method"] == "h2o:12%+13%"


def test_the_command_ends_in_one_line_on_bad_input(monkeypatch, capsys):
    def refuse():
        raise ValueError("one\n two")

    monkeypatch.setattr(lm_eval_door, "cli_evaluate", refuse)
    with pytest.raises(SystemExit) as caught:
        lm_eval_door.main()
    assert caught.value.code == 2 and capsys.readouterr() == ("", "error: one two\n")
