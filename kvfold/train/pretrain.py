"""A model from scratch, from beginning to end: a tokenizer, packed text, a new model, training, and what is written of it.

Every step that takes long leaves a note in the run's folder, so that the same call goes on wherever it was stopped.
The search for a learning rate is that of the authors of CLA: raise it by a factor until held-out perplexity stops improving.
Letters: N sequences, B rows, T tokens.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kvfold.errors import UserError
from kvfold.eval.progress import OnStep, Report, silent
from kvfold.eval.reading import next_token_logits
from kvfold.models.config import FoldConfig
from kvfold.models.decoder import FoldForCausalLM
from kvfold.train.data import TrainingOrder, prepare_text, read_text
from kvfold.train.design_space import PretrainSettings, recipes
from kvfold.train.loop import (
    DivergedError,
    Loop,
    join,
    load_result,
    place,
    shard,
    sum_over_processes,
    unsharded,
    wait_for_all,
)
from kvfold.train.objectives import NextToken, next_token_loss
from kvfold.train.run_folder import RunFolder, card_text, leads, machine_rows, read_curve, staged
from kvfold.train.student import write_model

_CURVE_POINTS = 60
"""Of a result's curve: each the mean of neighbouring steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain:
    """What one training from scratch works with."""

    recipe: str
    """As it was given, to know the run again."""
    settings: PretrainSettings
    folder: RunFolder
    text: Path
    """The folder of tokenizer and packed text: several runs on one text share it."""
    device: torch.device
    about: dict[str, Any]
    """For the card: command, version, commit, hardware."""
    report: Report = silent
    on_step: OnStep = lambda point: None

    def run(self) -> dict[str, Any]:
        """Train, or go on training, and write the result. Gives its facts, on the main process."""
        with self.folder.locked() if leads() else nullcontext():
            return self._run(join(self.device, spreads=self.settings.fsdp))

    def _run(self, device: torch.device) -> dict[str, Any]:
        if leads():
            begin(self.folder, self.recipe, self.settings, self.text, report=self.report)
        wait_for_all()
        tokenizer, train_NT, held_out_NT = read_text(self.text)
        torch.manual_seed(self.settings.seed)
        model = FoldForCausalLM(config_of(self.settings, tokenizer)).train().to(device)
        self._train(model, train_NT, held_out_NT)
        model = unsharded(model)
        facts = self._finished(model, tokenizer) if leads() else {}
        wait_for_all()  # what is written now is there for all
        return facts

    def _train(self, model: torch.nn.Module, train_NT: Tensor, held_out_NT: Tensor) -> None:
        settings, checkpoint, done = self.settings, self.folder.checkpoint, self.folder.done_steps
        if done >= settings.total_steps:
            load_result(checkpoint, model, settings)
            return
        samples = TrainingOrder(
            train_NT, steps=settings.total_steps, batch=settings.global_batch_size, seed=settings.seed
        )

        def on_step(point: dict[str, Any]) -> None:
            if point["step"] >= settings.total_steps:
                losses = [round(one, 6) for one in objective.validated.tolist()]
                self.folder.write("validation", {"sequence_losses": losses})
            self.on_step(point)

        if settings.fsdp:
            shard(model)
        objective = FromScratch(model, held_out_NT, settings)
        Loop(objective, samples, settings, self.folder.training, on_step=on_step).run()

    def _finished(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Written, with its card."""
        settings, points = self.settings, read_curve(self.folder.curve)
        losses = self.folder.read("validation")["sequence_losses"]
        loss = sum(losses) / len(losses)
        facts = {
            "recipe": self.recipe, **self.about, **_shape(self.recipe, settings),
            "parameters": sum(one.numel() for one in model.parameters()), "tokens": points[-1]["tokens"],
            "learning_rate": settings.learning_rate, "seed": settings.seed, "loss": points[-1]["loss"],
            "validation_loss": loss, "validation_perplexity": perplexity(loss),
            "validation_tokens": len(losses) * (settings.seq_len - 1), "validation_sequence_losses": losses,
            "seconds": sum(point["seconds"] for point in points), "curve": _thinned(points),
        }  # fmt: skip
        write_model(model.eval(), tokenizer, self.folder.out, card=pretrain_card(settings, facts, self.folder.out))
        self.folder.write("done", facts)
        self.folder.clear()
        return facts


def _shape(recipe: str, settings: PretrainSettings) -> dict[str, Any]:
    """What tells one model of a design space from another, and what was published of the one that this is made after."""
    known = recipes().get(recipe)
    return {
        **{name: getattr(settings, name) for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "layers")},
        "owners": len(settings.layout.owners), "kv_bytes_per_token": settings.kv_bytes_per_token,
        **{name: getattr(known, name, None) for name in ("paper_perplexity", "paper_tuned_perplexity")},
    }  # fmt: skip


def _thinned(points: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Tokens and loss of so many stretches of a curve at most."""
    size = -(-len(points) // _CURVE_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return {
        "tokens": [part[-1]["tokens"] for part in parts],
        "loss": [round(sum(point["loss"] for point in part) / len(part), 4) for part in parts],
    }


def begin(folder: RunFolder, recipe: str, settings: PretrainSettings, text: Path, *, report: Report) -> None:
    """Begin a run or go on, with its text in `text`; where that can't be had the folder is left as it was found."""
    is_new = folder.read("run") is None
    folder.begin(recipe, settings)
    try:
        prepare_text(settings, text, report=report)
    except Exception:  # an interrupt leaves it: the same call goes on
        if is_new:
            folder.give_up()
        raise


class FromScratch(NextToken):
    """All weights learn the next token's loss."""

    def __init__(self, model: FoldForCausalLM, held_out_NT: Tensor, settings: PretrainSettings):
        """`validated` has the held-out loss of each sequence, fp32 [N], once it was measured."""
        super().__init__(model)
        self._held_out_NT, self._settings, self.validated = held_out_NT, settings, None

    def figures(self, done: int, sums: dict[str, Any]) -> dict[str, Any]:
        """The held-out loss, where it is due."""
        if done % self._settings.validate_steps and done < self._settings.total_steps:
            return {}
        self.validated = self._validate()
        loss = self.validated.mean().item()
        if not math.isfinite(loss):
            raise DivergedError(f"step {done}: the held-out loss is {loss}: use a lower learning rate")
        return {"validation_loss": loss, "validation_perplexity": perplexity(loss)}

    @torch.no_grad()
    def _validate(self) -> Tensor:
        """Mean loss of each held-out sequence, fp32 [N] on the CPU; processes share the sequences."""
        (rank, processes), rows, number = place(), self._settings.micro_batch_size, len(self._held_out_NT)
        losses_N = torch.zeros(number, device=self.model.device)
        for start in range(rank * rows, number + rank * rows, processes * rows):
            # Each process calls the model as often as the others: weights that are spread are gathered together.
            mine = [index for index in range(start, start + rows) if index < number]
            ids_BT = self._held_out_NT[mine or [0]].long().to(self.model.device)
            states = self._decoder(ids_BT, use_cache=False).last_hidden_state
            for index, states_TC, ids_T in zip(mine, states, ids_BT, strict=False):
                losses_N[index] = next_token_loss(next_token_logits(self.model, states_TC[:-1]), ids_T[1:]).mean()
        sum_over_processes([losses_N])
        return losses_N.cpu()


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; infinite where that has no number."""
    return math.exp(loss) if loss < 700 else math.inf


def config_of(settings: PretrainSettings, tokenizer: Any = None) -> FoldConfig:
    """Pre-norm, SwiGLU, rotary positions; the special tokens are the tokenizer's."""
    ends = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return FoldConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden_size, intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers, num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads, head_dim=settings.head_dim, layout=settings.layout,
        kv_norm=settings.has_kv_norm, tie_word_embeddings=settings.tie_embeddings, rms_norm_eps=settings.norm_eps,
        initializer_range=settings.init_std, max_position_embeddings=settings.seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta}, **ends,
    )  # fmt: skip


TrainOne = Callable[[PretrainSettings, RunFolder], dict[str, Any]]
"""Trains one model in its folder, or goes on; gives its facts on the leading process."""


def sweep(
    settings: PretrainSettings, factor: float, out: Path, train_one: TrainOne, *, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Path]:
    """The facts of each run, the lowest rate first, each with a `note`, and the folder of the best.

    A run has its folder below `out`; what is done there is not done again. A rate at which the loss is no number is noted
    and ends the search. Raises `RuntimeError` where the very first one is.

    Source: arXiv 2405.12981, section 3.3.
    Differs: none.
    """
    rows: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    for rate in rates(settings.learning_rate, factor):
        found = _outcome(settings.with_values(learning_rate=rate), RunFolder(out=out / f"lr-{rate:g}"), train_one)
        rows.append(found)
        if found["note"]:
            say(f"learning rate {rate:g}: {found['told']}")
            break
        say(f"learning rate {rate:g}: held-out perplexity {found['validation_perplexity']:.2f}")
        if best is not None and not found["validation_perplexity"] < best["validation_perplexity"]:
            break
        best = found
    if best is None:
        raise RuntimeError(f"the sweep's first run came to nothing: {rows[0]['told']}: begin at a lower learning rate")
    best["note"] = "best"
    return rows, out / f"lr-{best['learning_rate']:g}"


def rates(first: float, factor: float) -> Iterator[float]:
    """`first`, then each `factor` times the one before, to six digits. Raises `UserError` for a factor that raises nothing."""
    if not factor > 1:
        raise UserError(f"--sweep-lr {factor:g}: each rate is so many times the one before: use more than 1, e.g. 1.5")
    return (float(f"{first * factor**step:.6g}") for step in itertools.count())


def _outcome(settings: PretrainSettings, folder: RunFolder, train_one: TrainOne) -> dict[str, Any]:
    """The facts of one run: those that lie there, or new ones."""
    about = {"learning_rate": settings.learning_rate, "seed": settings.seed, "note": ""}
    failed = folder.read("diverged")
    if failed is None:
        try:
            return {**(folder.finished() or train_one(settings, folder) or folder.finished()), **about}
        except DivergedError as error:
            failed = {"told": str(error)}
            if leads():
                folder.write("diverged", failed)
    return {**failed, **about, "note": "diverged"}


def copy_result(best: Path, out: Path, *, card: str) -> None:
    """The best run's files beside the runs, as the sweep's own result, with a card of its own."""
    with staged(out, card) as folder:
        for file in best.iterdir():
            if file.is_file():
                shutil.copy2(file, folder / file.name)


def pretrain_card(settings: PretrainSettings, facts: Mapping[str, Any], out: Path) -> str:
    """The text of the card. `facts`: see `Pretrain`, which gathers them."""
    rows = {
        "layers": f"{settings.num_layers}, of which {len(settings.layout.owners)} store keys and values (`{settings.layers}`)",
        "heads": f"{settings.num_heads} query heads and {settings.num_kv_heads} KV heads of {settings.head_dim} channels",
        "width": f"{settings.hidden_size}, feed-forward {settings.intermediate_size}, vocabulary {settings.vocabulary:,}",
        "KV cache": f"{facts['kv_bytes_per_token']:,} bytes a token at 16 bit",
        "tokens": f"{facts['tokens']:,}, in sequences of {settings.seq_len:,}, {settings.global_batch_size} a step",
        "learning rate": f"{settings.learning_rate:g} at its highest, warm-up {100 * settings.warmup_share:g} % of the steps, "
        f"cosine to {100 * settings.final_learning_rate:g} %",
        "optimizer": f"AdamW ({settings.beta1:g}, {settings.beta2:g}), weight decay {settings.weight_decay:g}, "
        f"clip {settings.max_grad_norm:g}, new weights N(0, {settings.init_std:g}²)",
        "seed": str(settings.seed),
        "data": ", ".join(Path(name).name for name in settings.data),
        "held-out text": ", ".join(Path(name).name for name in settings.valid)
        or "the first part of the data, not trained on",
        "held-out perplexity": f"{facts['validation_perplexity']:.2f}, on {facts['validation_tokens']:,} tokens",
        **machine_rows(facts),
        "kvfold": f"{facts['version']}, commit {facts['git_commit'] or 'not known'}",
    }
    what = f"A language model of {facts['parameters']:,} weights, trained from scratch by `kvfold train {facts['recipe']}`."
    use = f'model, tokenizer = kvfold.load("{out.name}"), kvfold.load_tokenizer("{out.name}")'
    return card_text(out.name, what, rows, facts["command"], use)
