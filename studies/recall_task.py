"""k-hop associative recall: a task made by rule that tells apart what layouts of keys and values can do, and a small trainer.

A text lists the pairs (x, next of x) of one random cycle, then asks: so many hops on from x, which symbol is it? One hop needs
an induction head. Each further hop needs one more layer whose keys know the token before them, so hops measure depth;
the number of pairs and of symbols measures the width of a head. Only answers count in the loss.
Letters: B rows, T tokens, V vocabulary, Q questions.

Source: arXiv 2312.04927 (Zoology), section 3, asks one hop; hops over a list of pairs are ours.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.errors import UserError
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM

_TEST_SEED = -1
"""Texts of the test are drawn under it; training draws under seeds from 0."""
_WARMUP_STEPS = 30
_MIX = 0x9E3779B97F4A7C15
"""An odd 64-bit number without structure that keeps seeds and steps apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallBatch:
    """Texts of one length. The answer to question q is predicted at its last token."""

    ids_BT: Tensor
    hops_BQ: Tensor
    answers_BQ: Tensor

    def logits(self, model: FoldForCausalLM) -> Tensor:
        """What the model predicts at the questions, [B, Q, V]; all tokens are attended to, none through a cache."""
        questions = self.answers_BQ.shape[1]
        columns = 3 * questions + 1 + 2 * torch.arange(questions)
        return model.lm_head(model.model(self.ids_BT, use_cache=False).last_hidden_state[:, columns])


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallTask:
    """What texts look like: P times (separator, x, next of x), then one question (hops, x) about each x.

    Texts of few pairs are a curriculum: where two or four symbols are listed a guess is often right, and what is learned there
    holds for more. Without them nothing was learned in ten times as many steps.
    """

    symbols: int = 16
    """Symbols that pairs are drawn from."""
    pairs: tuple[int, ...] = (2, 4, 8, 16)
    """Pairs of a text, one cycle; steps take them in turn."""
    hops: tuple[int, ...] = (1, 2, 3)
    """Each question draws one of those below the text's pairs."""

    def __post_init__(self) -> None:
        if not self.hops or min(self.hops) < 1 or not self.pairs or not min(self.hops) < min(self.pairs):
            raise UserError(
                f"hops {self.hops} of pairs {self.pairs}: hops are 1 or more, the least below the least pairs"
            )
        if max(self.pairs) > self.symbols:
            raise UserError(
                f"pairs {max(self.pairs)} of {self.symbols} symbols: at most one for each: use more symbols"
            )

    @property
    def vocabulary(self) -> int:
        """Symbols, the separator, and a token for each number of hops up to the largest."""
        return self.symbols + 1 + max(self.hops)

    def hops_of(self, pairs: int) -> list[int]:
        """What a text of so many pairs may ask."""
        return [hops for hops in self.hops if hops < pairs]

    def batch(
        self, answers: int, *, pairs: int, seed: int, step: int, hops: tuple[int, ...] | None = None
    ) -> RecallBatch:
        """As many texts as have so many answers, at least one. `hops`: which of the task's may be asked; None = all. A pure
        function of the arguments.
        """
        rows = max(1, answers // pairs)
        source = torch.Generator().manual_seed(((seed + 2) * _MIX + step * 128 + pairs) % 2**63)
        cycle, order, asked = (
            torch.rand(rows, size, generator=source).argsort(dim=1)[:, :pairs] for size in (self.symbols, pairs, pairs)
        )
        keys, values = cycle.gather(1, order), cycle.gather(1, (order + 1) % pairs)
        known = torch.tensor([one for one in self.hops_of(pairs) if hops is None or one in hops])
        hops_BQ = known[torch.randint(len(known), asked.shape, generator=source)]
        listed = torch.stack((torch.full_like(keys, self.symbols), keys, values), dim=2).flatten(1)
        questions = torch.stack((self.symbols + hops_BQ, cycle.gather(1, asked)), dim=2).flatten(1)
        answers_BQ = cycle.gather(1, (asked + hops_BQ) % pairs)
        return RecallBatch(ids_BT=torch.cat((listed, questions), dim=1), hops_BQ=hops_BQ, answers_BQ=answers_BQ)


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRun:
    """One model and how it is trained."""

    task: RecallTask
    layers: int = 4
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 16
    width: int = 64
    mlp_width: int = 128
    rope_theta: float = 30.0
    """Base of rotary positions: with few channels a small one tells neighbours apart, a large one symbols at a distance."""
    sharing: str = "full"
    """Who stores keys and values, as a `--layers` text."""
    steps: int = 1200
    hop_steps: tuple[int, ...] = ()
    """Steps from which the second, the third, ... of the task's hops are asked, too; none = all from the start."""
    answers: int = 256
    """Answers of a step."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: hidden matrices by torch's Muon, the rest by AdamW; `adamw`: all weights."""
    lr: float = 2e-2
    """Learning rate of Muon's matrices after a warm-up of 30 steps; it falls to 0 over the last quarter."""
    adam_lr: float = 5e-3
    """Learning rate of what AdamW trains, at its peak."""
    seed: int = 0
    """Rules weights and texts: runs of one seed see the same texts in the same order."""

    def rate_factor(self, step: int) -> float:
        """What learning rates are multiplied by at `step` (from 0)."""
        return min(1.0, (step + 1) / _WARMUP_STEPS, 4 * (1 - step / self.steps))

    def asked(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Pairs and hops of the texts of a step. Texts of too few pairs for the most hops are left out."""
        joined = 1 + sum(step >= one for one in self.hop_steps) if self.hop_steps else len(self.task.hops)
        hops = self.task.hops[:joined]
        pairs = [one for one in self.task.pairs if one > max(hops)] or [max(self.task.pairs)]
        return pairs[step % len(pairs)], hops

    def with_variant(self, name: str) -> Self:
        """The same with one of `VARIANTS`."""
        changes = {key: change(self) for key, change in VARIANTS[name].items()}
        return replace(self, **changes)

    def config(self) -> FoldConfig:
        """The model."""
        config = FoldConfig(
            vocab_size=self.task.vocabulary, hidden_size=self.width, intermediate_size=self.mlp_width, head_dim=self.head_dim,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=5 * max(self.task.pairs), initializer_range=self.width**-0.5, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
        )  # fmt: skip
        config.layout = KVLayout.parse(self.sharing, config.layout)
        return config

    def kv_bytes(self) -> int:
        """Bytes of keys and values a token, at 16 bit."""
        return 2 * 2 * self.kv_heads * self.head_dim * len(self.config().layout.owners)


VARIANTS: dict[str, dict[str, Callable[[RecallRun], Any]]] = {
    "mha": {"kv_heads": lambda mqa: mqa.heads},
    "mqa": {},
    "mqa-cla2": {"sharing": lambda mqa: "cla2"},
    "mqa-keep-ends": {"sharing": lambda mqa: "cla2-keep-ends"},
    "mqa-half-head": {"heads": lambda mqa: 2 * mqa.heads, "head_dim": lambda mqa: mqa.head_dim // 2},
    "mqa-half-layers": {"layers": lambda mqa: mqa.layers // 2},
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
    losses = []
    for step in range(done, run.steps):
        began = time.process_time()
        pairs, hops = run.asked(step)
        batch = run.task.batch(run.answers, pairs=pairs, seed=run.seed, step=step, hops=hops)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * run.rate_factor(step)
        model.train()
        loss = F.cross_entropy(batch.logits(model).flatten(0, 1), batch.answers_BQ.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        seconds += time.process_time() - began
        if (step + 1) % every == 0 or step + 1 == run.steps:
            mean, losses = float(torch.stack(losses).mean()), []
            point = {"step": step + 1, "answers": (step + 1) * run.answers, "loss": mean, "cpu_seconds": seconds}
            on_point({**point, **measure(model, run.task)})
            if on_state is not None:
                states = [optimizer.state_dict() for optimizer in optimizers]
                on_state({"model": model.state_dict(), "optimizers": states, "step": step + 1, "seconds": seconds})
    return model


@torch.no_grad()
def measure(model: FoldForCausalLM, task: RecallTask, *, answers: int = 1024) -> dict[str, dict[str, float]]:
    """On texts of the test: `test_loss` (nats an answer) and `accuracy`, by pairs and hops, named as in `16x3`."""
    was_training = model.training
    model.train()  # the plain form without a cache; nothing in it is random
    losses, right = {}, {}
    for pairs in task.pairs:
        batch = task.batch(answers, pairs=pairs, seed=_TEST_SEED, step=0)
        logits = batch.logits(model)
        loss_BQ = F.cross_entropy(logits.flatten(0, 1), batch.answers_BQ.flatten(), reduction="none").view_as(
            batch.hops_BQ
        )
        right_BQ = (logits.argmax(dim=-1) == batch.answers_BQ).float()
        for hops in task.hops_of(pairs):
            asked = batch.hops_BQ == hops
            losses[f"{pairs}x{hops}"] = float(loss_BQ[asked].mean())
            right[f"{pairs}x{hops}"] = float(right_BQ[asked].mean())
    model.train(was_training)
    return {"test_loss": losses, "accuracy": right}


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


def answers_to(points: list[dict[str, Any]], accuracy: float, name: str) -> int | None:
    """Answers trained on when the test's accuracy at pairs x hops was first reached; None if it never was."""
    return next((point["answers"] for point in points if point["accuracy"][name] >= accuracy), None)


def description(run: RecallRun) -> dict[str, Any]:
    """The run as plain values, with its bytes and its size."""
    model = FoldForCausalLM(run.config())
    parameters = sum(weight.numel() for weight in model.parameters())
    return {**asdict(run), "kv_bytes_per_token": run.kv_bytes(), "parameters": parameters}
