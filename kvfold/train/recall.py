"""k-hop associative recall: a task made by rule that tells apart what layouts of keys and values can do, and a small trainer.

A text lists the pairs (x, next of x) of one random cycle, then asks: so many hops on from x, which symbol is it? One hop needs
an induction head. Each further hop needs one more layer whose keys know the token before them, so hops measure depth;
the number of pairs and of symbols measures the width of a head. Only answers count in the loss.
Letters: B rows, T tokens, V vocabulary, Q questions.

Source: arXiv 2312.04927 (Zoology), section 3, asks one hop; hops over a list of pairs are ours.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.layout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM

_TEST_SEED = -1
"""Texts of the test are drawn under it; training draws under seeds from 0."""
_MIX = 0x9E3779B97F4A7C15
"""An odd 64-bit number without structure that keeps seeds and steps apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallTask:
    """What texts look like: `pairs` times (separator, x, next of x), then `questions` times (hops, x)."""

    symbols: int = 64
    """Symbols that pairs are drawn from."""
    pairs: int = 16
    """Pairs of a text, one cycle."""
    hops: tuple[int, ...] = (1, 2, 3)
    """Each question draws one of them."""
    questions: int = 16
    """Questions of a text, each about another symbol."""

    def __post_init__(self) -> None:
        if not max(self.hops, default=0) < self.pairs <= self.symbols or min(self.hops) < 1:
            raise ValueError(
                f"{self.pairs} pairs, {self.symbols} symbols, hops {self.hops}: hops are 1 or more, fewer than the pairs, and "
                "pairs at most as many as symbols: change one of them"
            )
        if not 1 <= self.questions <= self.pairs:
            raise ValueError(f"questions {self.questions}: at most one for each of {self.pairs} pairs: use fewer")

    @property
    def vocabulary(self) -> int:
        """Symbols, the separator, and a token for each number of hops up to the largest."""
        return self.symbols + 1 + max(self.hops)

    @property
    def tokens(self) -> int:
        """Tokens of a text."""
        return 3 * self.pairs + 2 * self.questions

    def batch(self, rows: int, *, seed: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Texts [B, T], the answers [B, Q] to the questions at their ends, and the hops of each question [B, Q]. A pure function
        of the arguments.
        """
        source = torch.Generator().manual_seed(((seed + 2) * _MIX + step) % 2**63)
        cycle = torch.rand(rows, self.symbols, generator=source).argsort(dim=1)[:, : self.pairs]
        order = torch.rand(rows, self.pairs, generator=source).argsort(dim=1)
        keys, values = cycle.gather(1, order), cycle.gather(1, (order + 1) % self.pairs)
        asked = torch.rand(rows, self.pairs, generator=source).argsort(dim=1)[:, : self.questions]
        drawn = torch.randint(len(self.hops), asked.shape, generator=source)
        hops = torch.tensor(self.hops)[drawn]
        answers = cycle.gather(1, (asked + hops) % self.pairs)
        separators = torch.full_like(keys, self.symbols)
        listed = torch.stack((separators, keys, values), dim=2).flatten(1)
        questions = torch.stack((self.symbols + hops, cycle.gather(1, asked)), dim=2).flatten(1)
        return torch.cat((listed, questions), dim=1), answers, hops

    def question_columns(self) -> Tensor:
        """Where the answers are predicted, int64 [Q]."""
        return 3 * self.pairs + 1 + 2 * torch.arange(self.questions)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRun:
    """One model and how it is trained."""

    task: RecallTask
    layers: int = 4
    heads: int = 8
    kv_heads: int = 1
    head_dim: int = 16
    width: int = 128
    mlp_width: int = 256
    sharing: str = "full"
    """Who stores keys and values, as a `--layers` text."""
    steps: int = 1500
    batch: int = 32
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: hidden matrices by torch's Muon, the rest by AdamW; `adamw`: all weights."""
    lr: float = 1e-2
    """Learning rate of Muon's matrices, at its peak (after a warm-up of a twentieth, cosine to 0)."""
    adam_lr: float = 3e-3
    """Learning rate of what AdamW trains, at its peak."""
    seed: int = 0
    """Rules weights and texts: runs of one seed see the same texts in the same order."""

    def rate_factor(self, step: int) -> float:
        """What learning rates are multiplied by at `step` (from 0)."""
        warmup = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def with_variant(self, name: str) -> Self:
        """The same with one of `VARIANTS`."""
        from dataclasses import replace

        return replace(self, **VARIANTS[name])

    def config(self) -> FoldConfig:
        """The model."""
        config = FoldConfig(
            vocab_size=self.task.vocabulary, hidden_size=self.width, intermediate_size=self.mlp_width, head_dim=self.head_dim,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.task.tokens, initializer_range=self.width**-0.5, tie_word_embeddings=False,
        )  # fmt: skip
        config.layout = KVLayout.parse(self.sharing, config.layout)
        return config

    def kv_bytes(self) -> int:
        """Bytes of keys and values a token, at 16 bit."""
        return 2 * 2 * self.kv_heads * self.head_dim * len(self.config().layout.owners)


VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 8},
    "mqa": {},
    "mqa-cla2": {"sharing": "cla2"},
    "mqa-keep-ends": {"sharing": "cla2-keep-ends"},
    "mqa-half-head": {"heads": 16, "head_dim": 8},
    "mqa-half-layers": {"layers": 2},
    "mqa-2-layers-cla2": {"layers": 2, "sharing": "cla2"},
}
"""What is compared, as changes of MQA's run. Of half MQA's bytes: `mqa-cla2`, `mqa-half-head`, `mqa-half-layers`."""


def train(
    run: RecallRun, *, on_point: Callable[[dict[str, Any]], None], every: int = 100, state: dict[str, Any] | None = None,
    on_state: Callable[[dict[str, Any]], None] | None = None,
) -> FoldForCausalLM:  # fmt: skip
    """Train a model. `on_point` gets `step`, `loss`, and the test's figures (`measure`) every so many steps. `on_state` gets then
    what `state` needs to resume.
    """
    torch.manual_seed(run.seed)
    model = FoldForCausalLM(run.config())
    optimizers = _optimizers(model, run)
    done, seconds = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, seconds = state["step"], state["seconds"]
    columns = run.task.question_columns()
    losses = []
    for step in range(done, run.steps):
        began = time.process_time()
        model.train()
        ids_BT, answers_BQ, _ = run.task.batch(run.batch, seed=run.seed, step=step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * run.rate_factor(step)
        loss = F.cross_entropy(_answer_logits(model, ids_BT, columns).flatten(0, 1), answers_BQ.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        seconds += time.process_time() - began
        if (step + 1) % every == 0 or step + 1 == run.steps:
            mean = float(torch.stack(losses).mean())
            losses = []
            tokens = (step + 1) * run.batch * run.task.tokens
            on_point(
                {"step": step + 1, "tokens": tokens, "loss": mean, "cpu_seconds": seconds, **measure(model, run.task)}
            )
            if on_state is not None:
                states = [optimizer.state_dict() for optimizer in optimizers]
                on_state({"model": model.state_dict(), "optimizers": states, "step": step + 1, "seconds": seconds})
    return model


def _answer_logits(model: FoldForCausalLM, ids_BT: Tensor, columns: Tensor) -> Tensor:
    """[B, Q, V], all tokens attended to, none through a cache."""
    hidden = model.model(ids_BT, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, columns])


@torch.no_grad()
def measure(model: FoldForCausalLM, task: RecallTask, *, rows: int = 64) -> dict[str, dict[str, float]]:
    """On texts of the test: `test_loss` (nats an answer) and `accuracy` by the number of hops, written as text."""
    was_training = model.training
    model.train()  # the plain form without a cache; nothing in it is random
    ids_BT, answers_BQ, hops_BQ = task.batch(rows, seed=_TEST_SEED, step=0)
    logits = _answer_logits(model, ids_BT, task.question_columns())
    losses = F.cross_entropy(logits.flatten(0, 1), answers_BQ.flatten(), reduction="none").view_as(answers_BQ)
    right = (logits.argmax(dim=-1) == answers_BQ).float()
    model.train(was_training)
    return {
        name: {str(hops): float(values[hops_BQ == hops].mean()) for hops in task.hops}
        for name, values in (("test_loss", losses), ("accuracy", right))
    }


def _optimizers(model: FoldForCausalLM, run: RecallRun) -> list[torch.optim.Optimizer]:
    hidden = list(_hidden_matrices(model)) if run.optimizer == "muon" else []
    of_muon = {id(weight) for weight in hidden}
    rest = [weight for weight in model.parameters() if id(weight) not in of_muon]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=run.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if hidden:
        made.append(torch.optim.Muon(hidden, lr=run.lr, weight_decay=0.0))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def _hidden_matrices(model: FoldForCausalLM) -> Iterator[Tensor]:
    return (weight for weight in model.model.layers.parameters() if weight.ndim == 2)


def tokens_to(points: list[dict[str, Any]], accuracy: float, hops: int) -> int | None:
    """Tokens trained on when the test's accuracy at `hops` was first reached; None if it never was."""
    return next((point["tokens"] for point in points if point["accuracy"][str(hops)] >= accuracy), None)


def description(run: RecallRun) -> dict[str, Any]:
    """The run as plain values, with its bytes and its size."""
    model = FoldForCausalLM(run.config())
    parameters = sum(weight.numel() for weight in model.parameters())
    return {**asdict(run), "kv_bytes_per_token": run.kv_bytes(), "parameters": parameters}
