"""What is told of a document is what the cache holds, and what the gates decided."""

import pytest
import torch

from byte_tokenizer import byte_tokenizer
from kvfold.bench.reading import chosen_heads, read_document, token_states
from kvfold.data import TextFile, text_beginning
from kvfold.methods.gates import GateConfig
from kvfold.methods.registry import parse_time
from kvfold.train.objectives import kept_tokens
from tiny_model import tiny_model

TOKENS = 50
GATES = {
    "dms:6": GateConfig(method="dms", source="adapter", scale=12.0, offset=0.5, bias=True),
    "dms:9": GateConfig(method="dms", source="adapter", reads="next", scale=12.0, offset=0.5),
    "dmc:3": GateConfig(method="dmc", scale=20.0, offset=0.5),
    "dmc:inf": GateConfig(method="dmc", scale=20.0, offset=0.5),
}


def gated(time: str):
    """A model whose gates fire now and then, differently in each head."""
    model = tiny_model(num_hidden_layers=3)
    model.set_gates(GATES[time], time)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "fold_proj" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=draw))
    return model.eval()


def ids():
    return torch.randint(0, 250, (TOKENS,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("time", GATES)
def test_what_is_told_agrees_with_the_gates_decisions(time):
    model = gated(time)
    every = [(layer, head) for layer in range(3) for head in range(2)]
    result = read_document(model, ids(), ["x"] * TOKENS, [time], name="tiny", text="t", heads=every)
    (row,) = result["rows"]
    with torch.no_grad():
        said = model(ids()[None], use_cache=False, output_decisions=True).decisions
    spec, next_ = parse_time(time), GATES[time].reads == "next"
    for one in row["heads"]:
        fired = said[one["layer"]][:, one["head"] : one["head"] + 1]
        assert one["kept_tokens"] == row["kept"][one["layer"]][one["head"]]
        assert one["kept_tokens"] == kept_tokens(fired, spec, from_next=next_).item()
        assert one["states"] == _by_definition((fired[0, 0] > 0.5).tolist(), spec, next_)
    counts = {head["kept_tokens"] for head in row["heads"]}
    assert len(counts) > 2 and min(counts) < TOKENS
    assert row["compression"] == pytest.approx(TOKENS * 6 / sum(map(sum, row["kept"])))


def _by_definition(fired: list[bool], spec, from_next: bool) -> str:
    """From decisions alone, token by token."""
    if spec.name == "dms":
        governed = [*fired[1:], False] if from_next else fired
        late = [token >= TOKENS - 1 - spec.delay for token in range(TOKENS)]
        return "".join("w" if new else "g" if flag else "k" for flag, new in zip(governed, late, strict=True))
    ends = [token + 1 == TOKENS or not fired[token + 1] for token in range(TOKENS)]
    states = []
    for token in range(TOKENS):
        newest = next(end for end in range(token, TOKENS) if ends[end])
        within = spec.window is None or newest - token < spec.window
        states.append("k" if token == newest else "m" if within else "g")
    return "".join(states)


def test_growth_is_that_of_the_cache_and_heads_are_chosen_by_what_they_keep():
    model = gated("dms:6")
    told = []
    result = read_document(
        model, ids(), ["x"] * TOKENS, ["full", "dms:6", "window:6+2", "h2o:4+4"], name="tiny", text="t",
        report=lambda *done: told.append(done),
    )  # fmt: skip
    full, dms, window, h2o = result["rows"]
    assert [row["method"] for row in result["rows"]] == ["full", "dms:6", "window:6+2", "h2o:4+4"]
    for row in result["rows"]:
        growth = row["over_time"]
        assert growth["tokens"][0] == 0 and {16, 32, 48, TOKENS} <= set(growth["tokens"])
        counts = [count for line in row["kept"] for count in line]
        assert growth["mean"][-1] == pytest.approx(sum(counts) / len(counts))
        assert (growth["least"][-1], growth["most"][-1]) == (min(counts), max(counts))
    assert full["over_time"]["mean"] == full["over_time"]["tokens"]
    ranked = sorted((count, layer, head) for layer, line in enumerate(dms["kept"]) for head, count in enumerate(line))
    chosen = [(one["layer"], one["head"]) for one in dms["heads"]]
    assert chosen == [ranked[place][1:] for place in (0, 2, 5)]
    assert all([(one["layer"], one["head"]) for one in row["heads"]] == chosen for row in result["rows"])
    assert {one["states"] for one in window["heads"]} == {"kk" + "g" * (TOKENS - 8) + "k" * 6}
    assert all(one["states"].count("k") == one["kept_tokens"] == 8 for one in h2o["heads"])
    assert told[-1] == ("reading, h2o:4+4", TOKENS, TOKENS)


def test_a_merged_entry_holds_its_newest_tokens():
    # Entries at 0, 4 and 6: token 0 alone, 1 to 4 in one (of these the newest 3), 5 and 6 in one.
    assert token_states([0, 4, 6], 7, parse_time("dmc:3")) == "kgmmkmk"
    assert token_states([0, 4, 6], 7, parse_time("dmc:inf")) == "kmmmkmk"
    assert token_states([1, 4, 5, 6], 7, parse_time("dms:2")) == "gkggwww"
    assert token_states([0, 5, 6], 7, parse_time("window:2+1")) == "kggggkk"


def test_three_heads_or_fewer_are_chosen():
    assert chosen_heads([0, 2], [[5, 9], [7]]) == [(0, 0), (2, 0), (0, 1)]
    assert chosen_heads([3], [[5]]) == [(3, 0)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"heads": [(3, 0)]}, "head 3.0: there is no cache of that head"),
        ({"heads": [(0, 2)]}, "head 0.2"),
        ({"ids_T": torch.zeros(65, dtype=torch.int64)}, "the model reads 64 at most"),
        ({"methods": ["dms:0"]}, "dms delay 0"),
    ],
)
def test_what_can_not_be_shown_is_one_line(given, says):
    whole = {"ids_T": ids(), "methods": ["full"], "pieces": ["x"] * TOKENS, "name": "tiny", "text": "t"} | given
    with pytest.raises(ValueError, match=says) as error:
        read_document(tiny_model(num_hidden_layers=3), **whole)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_pieces_joined_are_the_text(adds_bos):
    file = TextFile(name="t", documents=("Ça va, naïve?", "Second."), digest="")
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    found, pieces = text_beginning(file, tokenizer, tokens=200)
    assert "".join(pieces) == file.joined and len(found) == len(pieces) == len(file.joined.encode()) + adds_bos
    # Two bytes of one letter: the first has it. A bos has no characters.
    assert pieces[adds_bos : adds_bos + 3] == ["Ç", "", "a"] and (pieces[0] == "") == adds_bos
    assert len(text_beginning(file, tokenizer, tokens=5)[0]) == 5
    with pytest.raises(ValueError, match="1 tokens: a text to look at has 2 or more"):
        text_beginning(file, tokenizer, tokens=1)
    with pytest.raises(ValueError, match="there is nothing to see"):
        text_beginning(TextFile(name="t", documents=("a",), digest=""), byte_tokenizer(), tokens=5)
