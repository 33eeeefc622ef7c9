"""Reading rows of text through the cache, the way a method is meant to be fed, watching what the cache keeps, and what the model
says of the tokens that come: its loss, how far its distribution is from another one's, how likely given answers are.

One model is read under many methods: the weights stay, each cache has a layout of its own. Prefix methods are read in calls of
many tokens, steps methods one token a call (a call is a step of theirs). Logits of all positions at once would be gigabytes, so
the states before the head are what is passed about, and the head is applied slice by slice.
Letters: B rows, T tokens of a row (columns), C model width, N positions, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfold.cache.hf import FoldCache, Usage
from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.gates import gate_table

CALL_TOKENS = 64
"""Tokens a row of one call, of methods whose state does not depend on where calls are cut, unless asked otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """One way of measuring; rows of one table share it."""

    windows: int = 32
    """Windows of each text, evenly spaced over it."""
    context_tokens: int = 1024
    """Tokens of a window."""
    batch: int = 32
    """Windows read side by side, in one cache."""
    call_tokens: int | None = None
    """Tokens a row of one call, for prefix methods; None = CALL_TOKENS. It changes no result. Steps methods read one."""

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("context_tokens", 2), ("batch", 1), ("call_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} {value}: it is {least} or more: ask for more")


@contextmanager
def folded_cache(model: FoldForCausalLM, layout: KVLayout, rows: int) -> Iterator[FoldCache]:
    """An empty cache of this layout to read text into, freed at the end; inside, torch keeps nothing for gradients."""
    with torch.inference_mode():
        cache = model.new_cache(rows=rows, time=layout.time_text(), bits=layout.bits_text())
        try:
            yield cache
        finally:
            cache.free()


def method_layouts(model: FoldForCausalLM, methods: Sequence[str]) -> list[KVLayout]:
    """The model's layout under each `--time` text, each once. Raises `UserError` for a method that can't be run."""
    layouts = list(dict.fromkeys(model.config.layout.with_time(method) for method in methods))
    for layout in layouts:
        gate_table(model.config.gate_config, layout, freed_owners=model.config.freed_owners)
    return layouts


def with_unfolded(model: FoldForCausalLM, layouts: Sequence[KVLayout]) -> list[KVLayout]:
    """The unfolded layout first, then the others."""
    return list(dict.fromkeys([model.config.layout.base(), *layouts]))


def calls(layout: KVLayout, tokens: int, size: int | None = None, begun: int = 0) -> Iterator[tuple[int, int]]:
    """Where calls begin and end when a text is read for measuring, `size` (None = CALL_TOKENS) tokens each.

    The first `begun` tokens have been read. Rows of several lengths: `tokens` and `begun` are those of the longest.

    Under a steps method the cut matters once a budget is exceeded: from there on calls bring one token. Before, all is
    kept and all weights are counted, however the text is cut.
    """
    steps = [spec for spec in layout.time if not spec.chunk_invariant]
    start = begun
    while start < tokens:
        stop = min(start + (size or CALL_TOKENS), tokens)
        if any(spec.max_kept(stop) < stop for spec in steps):
            stop = start + 1
        yield start, stop
        start = stop


def method_about(layout: KVLayout) -> dict[str, object]:
    """A method's text form, what people call it, and whether it was trained."""
    specs = [layout.time_of(owner) for owner in layout.owners]
    asked = [
        spec for spec, owner in zip(layout.time, layout.owners, strict=True) if layout.layers[owner].window is None
    ]
    titles = list(dict.fromkeys(spec.title for spec in asked or layout.time))
    return {
        "method": layout.time_text(),
        "title": titles[0] if len(titles) == 1 else "mixed",
        "trained": any(spec.trained for spec in specs),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a cache held while and after rows of one length were read."""

    allocated_bytes: int
    """Held by all rows at the end."""
    full_bytes: int
    """The same tokens with nothing folded along time and bits."""
    usage: Usage
    """What the allocated bytes are used for."""
    kept_share: tuple[float, ...]
    """Of the tokens seen, those kept, weighted by bytes: after each call, mean over rows."""
    seen_tokens: tuple[int, ...]
    """Tokens of a row that had been seen then."""
    seconds: float
    """Spent in the model."""

    @property
    def compression_over_time(self) -> float:
        """Mean over the tokens of tokens seen / tokens kept; between two calls the number kept is taken as growing evenly."""
        total, before, kept_before = 0.0, 0, 0.0
        for seen, share in zip(self.seen_tokens, self.kept_share, strict=True):
            kept = share * seen
            for token in range(before + 1, seen + 1):
                total += token / (kept_before + (kept - kept_before) * (token - before) / (seen - before))
            before, kept_before = seen, kept
        return total / before


def read_rows(
    model: FoldForCausalLM, layout: KVLayout, ids_BT: Tensor, on_states: Callable[[Tensor, int], None], *,
    call_tokens: int | None = None,
) -> Reading:  # fmt: skip
    """Feed the rows through a fresh cache of this layout; every call's states [B, t, C], and the column of the first, go to
    `on_states`. `call_tokens`: see `calls`.
    """
    shares, seen, seconds = [], [], 0.0
    weights = entry_bytes(layout, model.dtype.itemsize, model.device)
    with folded_cache(model, layout, ids_BT.shape[0]) as cache:
        for start, stop in calls(layout, ids_BT.shape[1], call_tokens):
            call = ids_BT[:, start:stop]
            begun = _now(model.device)
            hidden = model.model(call, past_key_values=cache, use_cache=True).last_hidden_state
            seconds += _now(model.device) - begun
            on_states(hidden, start)
            seen.append(start + call.shape[1])
            shares.append(kept_shares(cache, weights).mean())
        held = {"allocated_bytes": cache.allocated_bytes, "full_bytes": cache.full_bytes, "usage": cache.usage}
    return Reading(**held, kept_share=tuple(torch.stack(shares).tolist()), seen_tokens=tuple(seen), seconds=seconds)


def kept_shares(cache: FoldCache, weights_O: Tensor) -> Tensor:
    """Of the tokens that each row has seen, those kept, weighted by `entry_bytes`; fp64 [B]. A tensor, since reading it off at
    every step would stop a GPU.
    """
    kept_OBK = cache.kept_tokens
    present = (kept_OBK >= 0) * weights_O[:, None, None]
    return (kept_OBK * present).sum(dim=(0, 2)) / (cache.seen_tokens * present.sum(dim=(0, 2)))


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, *, flush: Literal["left", "right"]
) -> tuple[Tensor, Tensor]:
    """Rows of several lengths side by side: ids and a mask, 1 at real tokens, int64 [B, T]. What stands at padding is
    never read. `flush` right: all end in the last column.
    """
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.int64, device=device)
    real = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        here = slice(0, len(tokens)) if flush == "left" else slice(longest - len(tokens), longest)
        ids[row, here] = torch.tensor(tokens, dtype=torch.int64, device=device)
        real[row, here] = 1
    return ids, real


def entry_bytes(layout: KVLayout, model_bytes: int, device: torch.device) -> Tensor:
    """Bytes of K and V of one entry of each owner, fp64 [owners]."""
    sizes = [
        sum(layout.bits_of(owner).slot_bytes(layout.layers[owner].head_dim, model_bytes)) for owner in layout.owners
    ]
    return torch.tensor(sizes, dtype=torch.float64, device=device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_SLICE_BYTES = 2**25
"""Bytes of one slice of fp32 logits, about what a processor's cache holds."""


@dataclass(frozen=True, slots=True)
class Scores:
    """One value a position, fp32 [N] on the CPU."""

    loss: Tensor
    """Nats: minus the log probability of the token that came."""
    kl: Tensor | None
    """Nats: KL(reference || ours), the reference's distribution being the one expected under."""
    agrees: Tensor | None
    """1 where both have the same likeliest token."""


def next_token_logits(model: FoldForCausalLM, hidden_NC: Tensor) -> Tensor:
    """Logits [N, V], fp32, of states behind the last norm."""
    logits = model.lm_head(hidden_NC)
    scale, softcap = model.config.logit_scale, model.config.final_logit_softcap
    logits = logits if scale == 1.0 else logits * scale
    return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).float()


def slices(positions: int, vocabulary: int, *, most_bytes: int = _SLICE_BYTES) -> list[slice]:
    """All positions, so many at a time that their fp32 logits take at most so many bytes, or one at a time."""
    size = max(1, most_bytes // (4 * vocabulary))
    return [slice(start, start + size) for start in range(0, positions, size)]


def score(
    model: FoldForCausalLM,
    hidden_NC: Tensor,
    targets_N: Tensor,
    reference: tuple[FoldForCausalLM, Tensor] | None = None,
) -> Scores:
    """Score states against the tokens that came, and against a reference: a model and its states at the same positions."""
    loss, kl, agrees = [], [], []
    for part in slices(len(hidden_NC), model.config.vocab_size):
        log_p = torch.log_softmax(next_token_logits(model, hidden_NC[part]), dim=-1)
        loss.append(-log_p.gather(1, targets_N[part, None])[:, 0])
        if reference is not None:
            judge, states_NC = reference
            log_r = torch.log_softmax(next_token_logits(judge, states_NC[part]), dim=-1)
            agrees.append((log_p.argmax(dim=-1) == log_r.argmax(dim=-1)).float())
            # In place: these two arrays are as large as the logits.
            log_p.neg_().add_(log_r)
            kl.append(torch.einsum("nv,nv->n", log_r.exp_(), log_p))
    return Scores(*(torch.cat(parts).cpu() if parts else None for parts in (loss, kl, agrees)))


def likelihoods(model: FoldForCausalLM, hidden_NC: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens that came: their log probability, fp32 [N], nats, and whether each was the likeliest, bool [N]."""
    log_p, likeliest = [], []
    for part in slices(len(hidden_NC), model.config.vocab_size):
        logits = next_token_logits(model, hidden_NC[part])
        log_p.append(torch.log_softmax(logits, dim=-1).gather(1, targets_N[part, None])[:, 0])
        likeliest.append(logits.argmax(dim=-1) == targets_N[part])
    return torch.cat(log_p), torch.cat(likeliest)


Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of an answer, one or more each."""


@dataclass(frozen=True, slots=True)
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
    model: FoldForCausalLM, layout: KVLayout, pairs: Sequence[Pair], *, rows: int = 32, what: str = "",
    report: Report = silent,
) -> list[Answer]:  # fmt: skip
    """One `Answer` for each pair, in their order; up to `rows` answers are read side by side. Raises `UserError` for an empty
    prompt or answer.

    A prompt that several answers share is read once, and its rows are forked. Prompts end in the same column, so that answers
    begin in the same one; what stands at padding is never read, and is no step of any method.
    """
    for prompt, answer in pairs:
        if not len(prompt) or not len(answer):
            raise UserError(
                f"a prompt of {len(prompt)} tokens and an answer of {len(answer)}: a token is scored after another one: "
                "give 1 or more of each"
            )
    batches = _batches(pairs, rows)
    total, done = sum(map(_columns, batches)), 0
    found: dict[int, Answer] = {}

    def on_columns(columns: int) -> None:
        nonlocal done
        done += columns
        report(what, done, total)

    for batch in batches:
        found |= _read(model, layout, batch, on_columns)
    return [found[place] for place in range(len(pairs))]


Batch = list[tuple[tuple[int, ...], dict[int, list[int]]]]
"""Prompts that are read side by side, and the answers after each, by their places among all pairs."""


def _columns(batch: Batch) -> int:
    """What is read: columns of prompts, then of answers."""
    answers = max(len(answer) for _, some in batch for answer in some.values())
    return max(len(prompt) for prompt, _ in batch) + answers - 1


def _batches(pairs: Sequence[Pair], rows: int) -> list[Batch]:
    """Longest prompts first, so that those of one length meet and what takes most memory comes first."""
    answers: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for place, (prompt, answer) in enumerate(pairs):
        answers.setdefault(tuple(prompt), {})[place] = list(answer)
    groups = [
        (prompt, dict(list(some.items())[first : first + rows]))
        for prompt, some in answers.items()
        for first in range(0, len(some), rows)
    ]
    groups.sort(key=lambda group: (len(group[0]), max(map(len, group[1].values()))), reverse=True)
    batches: list[Batch] = []
    width = 0
    for group in groups:
        # An answer of one token needs no row of its own: the prompt's last state predicts it.
        needed = max(1, sum(len(answer) > 1 for answer in group[1].values()))
        if not batches or width + needed > rows:
            batches.append([])
            width = 0
        batches[-1].append(group)
        width += needed
    return batches


def _read(
    model: FoldForCausalLM, layout: KVLayout, batch: Batch, on_columns: Callable[[int], None]
) -> dict[int, Answer]:
    """The prompts, then the answers on forks of their prompts' rows."""
    places, owner, answers = zip(
        *[(place, row, answer) for row, (_, some) in enumerate(batch) for place, answer in some.items()], strict=True
    )
    owner = list(owner)
    prompts, prompts_real = padded([prompt for prompt, _ in batch], model.device, flush="right")
    ids, real = padded(answers, model.device, flush="left")
    weights = entry_bytes(layout, model.dtype.itemsize, model.device)
    with folded_cache(model, layout, len(batch)) as cache:
        for start, stop in calls(layout, prompts.shape[1]):
            states = _states(model, cache, prompts[:, start:stop], prompts_real[:, start:stop])
            on_columns(stop - start)
        log_p, greedy = likelihoods(model, states[owner, -1], ids[:, 0])
        seen, share = cache.seen_tokens[owner], kept_shares(cache, weights)[owner]
        longer = [row for row, answer in enumerate(answers) if len(answer) > 1]
        if longer:
            cache.select_rows([owner[row] for row in longer])
            sums, all_greedy = _read_answers(
                model, layout, cache, ids[longer], real[longer], prompts.shape[1], on_columns
            )
            log_p, greedy = log_p.double(), greedy.clone()
            log_p[longer] += sums
            greedy[longer] &= all_greedy
            seen[longer], share[longer] = cache.seen_tokens, kept_shares(cache, weights)
    figures = zip(log_p.tolist(), greedy.tolist(), seen.tolist(), share.tolist(), strict=True)
    return {place: Answer(*some) for place, some in zip(places, figures, strict=True)}


def _read_answers(
    model: FoldForCausalLM, layout: KVLayout, cache: FoldCache, ids_BT: Tensor, real_BT: Tensor, begun: int,
    on_columns: Callable[[int], None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log probability of all tokens but each row's first, summed, fp64 [B], and whether all were the likeliest, bool [B].

    `begun`: columns of the prompts. The last token of a row is scored and not read.
    """
    sums = torch.zeros(ids_BT.shape[0], dtype=torch.float64, device=ids_BT.device)
    greedy = torch.ones_like(sums, dtype=torch.bool)
    for start, stop in calls(layout, begun + ids_BT.shape[1] - 1, begun=begun):
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
