"""How likely given answers are after given prompts, read through the cache the way a method is meant to be fed.

A prompt that several answers share is read once, and its rows are forked. Prompts end in the same column, so that answers
begin in the same one; what stands at padding is never read, and is no step of any method.
Letters: B rows, T columns, C model width, N scored positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.cache.hf import FoldCache
from kvfold.errors import UserError
from kvfold.eval.folding import calls, folded_cache
from kvfold.eval.progress import Report, silent
from kvfold.eval.reading import entry_bytes, kept_shares, padded
from kvfold.eval.scoring import likelihoods
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of an answer, one or more each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of one pair."""

    log_likelihood: float
    """Of the answer after the prompt, nats, summed over its tokens."""
    is_greedy: bool
    """Whether each of its tokens was the likeliest."""
    seen_tokens: int
    """Tokens that were read: all but the answer's last."""
    kept_share: float
    """Of those, the share that the cache held at the end, weighted by bytes."""


def score_answers(
    model: FoldForCausalLM,
    layout: KVLayout,
    pairs: Sequence[Pair],
    *,
    rows: int = 32,
    call_tokens: int | None = None,
    what: str = "",
    report: Report = silent,
) -> list[Answer]:
    """One `Answer` for each pair, in their order; up to `rows` answers are read side by side.

    `call_tokens`: tokens a row of one call, for prefix methods. Raises `UserError` for an empty prompt or answer.
    """
    for prompt, answer in pairs:
        if not len(prompt) or not len(answer):
            raise UserError(
                f"a prompt of {len(prompt)} tokens and an answer of {len(answer)}: a token is scored after another one: "
                "give 1 or more of each"
            )
    batches = list(_batches(pairs, rows))
    total, done = sum(batch.columns for batch in batches), 0
    found: dict[int, Answer] = {}
    for batch in batches:

        def on_columns(columns: int) -> None:
            nonlocal done
            done += columns
            report(what, done, total)

        found |= _read(model, layout, batch, call_tokens, on_columns)
    return [found[place] for place in range(len(pairs))]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Batch:
    """Prompts that are read side by side, and the answers after each, by their places among all pairs."""

    prompts: list[tuple[int, ...]]
    answers: list[dict[int, list[int]]]

    @property
    def columns(self) -> int:
        """Columns that are read: of prompts, then of answers."""
        return max(map(len, self.prompts)) + max(len(answer) for some in self.answers for answer in some.values()) - 1


def _batches(pairs: Sequence[Pair], rows: int) -> Iterator[_Batch]:
    """Longest prompts first, so that those of one length meet and what takes most memory comes first."""
    answers: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for place, (prompt, answer) in enumerate(pairs):
        answers.setdefault(tuple(prompt), {})[place] = list(answer)
    groups = []
    for prompt, some in answers.items():
        places = list(some)
        for first in range(0, len(places), rows):
            groups.append((prompt, {place: some[place] for place in places[first : first + rows]}))
    groups.sort(key=lambda group: (len(group[0]), max(map(len, group[1].values()))), reverse=True)
    batch, width = _Batch(prompts=[], answers=[]), 0
    for prompt, some in groups:
        # An answer of one token needs no row of its own: the prompt's last state predicts it.
        needed = max(1, sum(len(answer) > 1 for answer in some.values()))
        if batch.prompts and width + needed > rows:
            yield batch
            batch, width = _Batch(prompts=[], answers=[]), 0
        batch.prompts.append(prompt)
        batch.answers.append(some)
        width += needed
    if batch.prompts:
        yield batch


def _read(
    model: FoldForCausalLM, layout: KVLayout, batch: _Batch, call_tokens: int | None, on_columns: Callable[[int], None]
) -> dict[int, Answer]:
    """The prompts, then the answers on forks of their prompts' rows."""
    owner = [row for row, some in enumerate(batch.answers) for _ in some]
    places = [place for some in batch.answers for place in some]
    answers = [answer for some in batch.answers for answer in some.values()]
    prompts, prompts_real = padded(batch.prompts, model.device, flush="right")
    ids, real = padded(answers, model.device, flush="left")
    weights = entry_bytes(layout, model.dtype.itemsize, model.device)
    with folded_cache(model, layout, len(batch.prompts)) as cache:
        for start, stop in calls(layout, prompts.shape[1], call_tokens):
            states = _states(model, cache, prompts[:, start:stop], prompts_real[:, start:stop])
            on_columns(stop - start)
        log_p, greedy = likelihoods(model, states[owner, -1], ids[:, 0])
        seen, share = cache.seen_tokens[owner], kept_shares(cache, weights)[owner]
        longer = [row for row, answer in enumerate(answers) if len(answer) > 1]
        if longer:
            cache.select_rows([owner[row] for row in longer])
            sums, all_greedy = _read_answers(
                model, layout, cache, ids[longer], real[longer], prompts.shape[1], call_tokens, on_columns
            )
            log_p, greedy = log_p.double(), greedy.clone()
            log_p[longer] += sums
            greedy[longer] &= all_greedy
            seen[longer], share[longer] = cache.seen_tokens, kept_shares(cache, weights)
    figures = zip(log_p.tolist(), greedy.tolist(), seen.tolist(), share.tolist(), strict=True)
    return {
        place: Answer(log_likelihood=a, is_greedy=b, seen_tokens=c, kept_share=d)
        for place, (a, b, c, d) in zip(places, figures, strict=True)
    }


def _read_answers(
    model: FoldForCausalLM, layout: KVLayout, cache: FoldCache, ids_BT: Tensor, real_BT: Tensor, begun: int,
    call_tokens: int | None, on_columns: Callable[[int], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log probability of all tokens but each row's first, summed, fp64 [B], and whether all were the likeliest, bool [B].

    `begun`: columns of the prompts. The last token of a row is scored and not read.
    """
    sums = torch.zeros(ids_BT.shape[0], dtype=torch.float64, device=ids_BT.device)
    greedy = torch.ones_like(sums, dtype=torch.bool)
    for start, stop in calls(layout, begun + ids_BT.shape[1] - 1, call_tokens, begun):
        here, following = slice(start - begun, stop - begun), slice(start - begun + 1, stop - begun + 1)
        scored_BT = real_BT[:, following].bool()
        states_BTC = _states(model, cache, ids_BT[:, here], scored_BT.long())
        row_N = scored_BT.nonzero()[:, 0]
        log_p_N, likeliest_N = likelihoods(model, states_BTC[scored_BT], ids_BT[:, following][scored_BT])
        sums.index_add_(0, row_N, log_p_N.double())
        greedy[row_N[~likeliest_N]] = False
        on_columns(stop - start)
    return sums, greedy


def _states(model: FoldForCausalLM, cache: FoldCache, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """States behind the last norm, [B, T, C]."""
    mask = None if bool(real_BT.all()) else real_BT
    return model.model(ids_BT, attention_mask=mask, past_key_values=cache).last_hidden_state
