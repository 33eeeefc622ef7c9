"""The `kvfold` model of lm-evaluation-harness: what its `hf` model does, with every text read through a folded cache.

Prompts, truncation, the token that opens a text and stop sequences are those of `hf`, from which this class descends; what
differs is that methods whose state depends on where calls are cut are fed one token a call, prompts too.
`python -m kvfold.eval.lm_eval` is lm-eval's own command line with this model among the others.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from kvfold.errors import UserError
from kvfold.eval.answers import score_answers
from kvfold.eval.folding import calls, folded_cache
from kvfold.eval.progress import Report, progress_bars
from kvfold.eval.reading import entry_bytes, kept_shares
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.load import load, load_tokenizer

_AUTO_ROWS = 32
"""Requests read side by side where lm-eval is asked to find a number itself."""


class FoldLM(HFLM):
    """A kvfold model as lm-eval asks for it: likelihoods of continuations, of whole texts, and generation."""

    def __init__(
        self,
        pretrained: str | FoldForCausalLM,
        tokenizer: Any = None,
        *,
        time: str | None = None,
        bits: str | None = None,
        adapter: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        report: Report | None = None,
    ):
        """`pretrained`: a folder, a hub name, a .gguf file, or a loaded model; then `tokenizer` is a tokenizer. Further ones
        are those of `kvfold.load` and of lm-eval's `hf`. `report`: told how far reading is; None draws bars on stderr.
        """
        if isinstance(pretrained, str):
            tokenizer = load_tokenizer(tokenizer or pretrained)
            # lm-eval's command says cuda:0 where nothing was said; like `hf`, without a GPU that means the CPU.
            device = device if device != "cuda:0" or torch.cuda.is_available() else None
            pretrained = load(pretrained, time=time, bits=bits, adapter=adapter, dtype=dtype, device=device)
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer names no eos token: lm-eval opens empty texts and ends written ones with it: name one in "
                "tokenizer_config.json"
            )
        rows = _AUTO_ROWS if str(batch_size).startswith("auto") else int(batch_size)
        super().__init__(
            pretrained, backend="causal", tokenizer=tokenizer, batch_size=rows, max_length=max_length,
            add_bos_token=add_bos_token, prefix_token_id=prefix_token_id, truncation=truncation,
        )  # fmt: skip
        self.layout: KVLayout = self.model.config.layout
        """What is read now is folded like this; it may be changed between two tasks."""
        self.about = self.layout.time_text()
        """What is being measured, in a few words, for bars."""
        self._given_report, self._report, self._stderr = report, report, sys.stderr
        self._kept: list[tuple[float, int]] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context: log probability, nats, and whether it is what greedy decoding writes."""
        with self._reporting():
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log probability of each text, nats; one longer than the context is read in windows, as `hf` does."""
        with self._reporting():
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop sequence."""
        with self._reporting():
            return super().generate_until(requests, disable_tqdm=True)

    def take_kept(self) -> list[tuple[float, int]]:
        """Of each request since the last question: the share of tokens kept at its end, weighted by bytes, and tokens seen."""
        kept, self._kept = self._kept, []
        return kept

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval notes of a model beside its results; nobody is asked over the network."""
        info = {"model_num_parameters": self.model.num_parameters(), "model_dtype": self.model.dtype}
        return {**info, "model_revision": "", "model_sha": "", "method": self.layout.time_text()}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log probability and greediness of continuations in tokens; contexts that are too long lose their beginning."""
        pairs = [_fitted(context, continuation, self.max_length) for _, context, continuation in requests]
        answers = score_answers(
            self.model, self.layout, pairs, rows=self.batch_size, what=self.about, report=self._report
        )
        self._kept += [(answer.kept_share, answer.seen_tokens) for answer in answers]
        found = [(answer.log_likelihood, answer.is_greedy) for answer in answers]
        for (request, *_), answer in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Prompts and what follows them, int64 [B, T]; all but the prompts' last column is read as the method asks."""
        real, columns = options["attention_mask"], context.shape[1]
        weights = entry_bytes(self.layout, self.model.dtype.itemsize, self.model.device)
        with folded_cache(self.model, self.layout, context.shape[0]) as cache:
            for start, end in calls(self.layout, columns - 1):
                self.model.model(context[:, start:end], attention_mask=real[:, start:end], past_key_values=cache)
                self._report(self.about, end, columns)
            ids = super()._model_generate(context, max_length, stop, past_key_values=cache, **options)
            self._report(self.about, columns, columns)
            self._kept += list(zip(kept_shares(cache, weights).tolist(), cache.seen_tokens.tolist(), strict=True))
        return ids.clone()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Inside, `_report` goes to whoever listens, on the stderr of before lm-eval's own bars were sent away."""
        bars = progress_bars() if self._given_report is None else nullcontext(self._given_report)
        with redirect_stderr(self._stderr), bars as self._report:
            yield


def _fitted(context: list[int], continuation: list[int], most_tokens: int) -> tuple[list[int], list[int]]:
    """A context without as much of its beginning as does not fit the model; the continuation's last token is not read."""
    if not 1 <= len(continuation) <= most_tokens:
        raise UserError(
            f"a continuation of {len(continuation)} tokens: the model scores 1 to {most_tokens}: shorten or mend the task"
        )
    fitting = (context + continuation)[-(most_tokens + 1) :]
    return fitting[: -len(continuation)], fitting[-len(continuation) :]
