"""The tokenizer of a model from scratch: one that is given, or byte-level BPE trained on the run's own text."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvfold.errors import UserError

END_OF_TEXT = "<|endoftext|>"
_MOST_CHARACTERS = 20_000_000
"""Of the text, so much at most decides which tokens there are."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocabulary` tokens, fewer where the text is short; no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if vocabulary < least:
        raise UserError(
            f"vocabulary {vocabulary}: a tokenizer of bytes has {least} tokens or more: ask for more, or give a tokenizer"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(_some(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def given_tokenizer(source: str, vocabulary: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub. Raises `UserError` where it can't be had or does not fit."""
    from kvfold.models.load import load_tokenizer

    tokenizer = load_tokenizer(source)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"tokenizer {Path(source).name}: it has {len(tokenizer):,} tokens and the model's vocabulary {vocabulary:,}: "
            "use a vocabulary as large, or another tokenizer"
        )
    return tokenizer


def _some(texts: Iterable[str]) -> Iterator[str]:
    left = _MOST_CHARACTERS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
