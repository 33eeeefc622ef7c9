"""What the page says about methods and words. Methods explain themselves: the text is their spec's own docstring."""

from collections.abc import Iterable
from inspect import getdoc

from kvfold.methods.base import Method
from kvfold.methods.registry import method_class
from kvfold.report.markup import Markup, join, tag
from kvfold.report.pieces import section

WORDS = {
    "KV cache": (
        "The keys and values of all tokens read so far, for every layer and KV head. Without it, each new "
        "token would mean reading the whole text again."
    ),
    "Perplexity": (
        "How surprised the model is by the next token of a real text; 20 means as unsure as a choice among 20. "
        "Lower is better."
    ),
    "Perplexity change": (
        "Measured in pairs: the same windows of text with and without folding, so that easy and hard passages "
        "cancel out. ± is one standard error of that difference."
    ),
    "KL": (
        "How far the whole prediction of the next token moved from the unfolded model's, in nats. It sees "
        "changes that perplexity averages away."
    ),
    "Passkey": (
        "A number hidden in a long filler text and asked for at the end. It is found or it is not: a test of "
        "memory, where perplexity is a test of language."
    ),
    "Compression": "Tokens read over tokens kept, at the end of a window: 4× is a quarter.",
    "Budget": "What one head may keep: a number of tokens, or a share of the text, which grows with it.",
    "Bytes": "As allocated: whole pages, with positions and scores. 1 MB is 1,000,000 bytes.",
}


def words_section() -> Markup:
    """The words of the page, for a reader who is new to them."""
    pairs = [join([tag("dt", word), tag("dd", meaning)]) for word, meaning in WORDS.items()]
    return section("Words", tag("dl", *pairs, class_="words"))


def methods_section(families: Iterable[str]) -> Markup | None:
    """What each method on the page does, whether it needs training, where it was published."""
    specs = [spec for family in families if (spec := _spec(family)) is not None]
    if not specs:
        return None
    return section("The methods", tag("dl", *map(_method, specs), class_="words"))


def _method(spec: type[Method]) -> Markup:
    """Its title, the first sentence of its docstring, and in small: training, how it is read, where it was published."""
    does = _coded((getdoc(spec) or "").partition("\n\n")[0])
    training = "The model is trained for it" if spec.gate_form else "No training"
    cut = (
        "read one token a call when measured"
        if not spec.chunk_invariant
        else "the same however the text is cut into calls"
    )
    about = tag("dd", f"{training}; {cut}; {spec.source}.", class_="fine")
    return join([tag("dt", spec.title[:1].upper() + spec.title[1:]), tag("dd", does), about])


def _spec(family: str) -> type[Method] | None:
    """The method's spec; None for one that this installation doesn't know, or whose package is broken."""
    try:
        return method_class(family)
    except (ValueError, ImportError, AttributeError):
        return None


def _coded(text: str) -> Markup:
    """Words in backticks become code."""
    pieces = text.replace("\n", " ").split("`")
    return join(tag("code", piece) if index % 2 else piece for index, piece in enumerate(pieces))
