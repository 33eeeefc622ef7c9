"""A model from scratch, from beginning to end: a tokenizer, packed text, a new model, training, and what is written of it.

Every step that takes long leaves a note in the run's folder, so that the same call goes on wherever it was stopped.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kvfold.errors import UserError
from kvfold.eval.progress import Report, silent
from kvfold.train.curve import Curve, read_curve
from kvfold.train.data import TrainingOrder
from kvfold.train.design_space import recipes
from kvfold.train.loop import Loop, OnStep, load_checkpoint
from kvfold.train.packing import drawn_texts, is_packed, pack, packed, sequences_of
from kvfold.train.pretrain_card import pretrain_card
from kvfold.train.pretrain_settings import PretrainSettings
from kvfold.train.pretrain_trainer import FromScratch, perplexity
from kvfold.train.processes import check_processes, join, shard, unsharded, wait_for_all
from kvfold.train.results import write_model
from kvfold.train.run_folder import RunFolder, leads
from kvfold.train.scratch import new_model
from kvfold.train.vocabulary import given_tokenizer, train_tokenizer

_CURVE_POINTS = 60
"""Of a result's curve: each the mean of neighbouring steps."""


def _nobody(point: dict[str, Any]) -> None:
    """Nobody listens."""


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
    about: dict[str, Any] = field(default_factory=dict)
    """For the card: command, version, commit, hardware."""
    report: Report = silent
    on_step: OnStep = _nobody

    def run(self) -> dict[str, Any]:
        """Train, or go on training, and write the result. Gives its facts, on the main process."""
        if self.settings.shard:
            check_processes()
        device = join(self.device)
        if leads():
            begin(self.folder, self.recipe, self.settings, self.text, report=self.report)
        wait_for_all()
        tokenizer, train_NT, held_out_NT = read_text(self.text)
        model = new_model(self.settings, tokenizer).to(device)
        self._train(model, train_NT, held_out_NT)
        model = unsharded(model)
        facts = self._finished(model, tokenizer) if leads() else {}
        wait_for_all()  # what is written now is there for all
        return facts

    def _train(self, model: torch.nn.Module, train_NT: Tensor, held_out_NT: Tensor) -> None:
        settings, checkpoint, done = self.settings, self.folder.checkpoint, self.folder.done_steps
        if done >= settings.total_steps:
            load_checkpoint(checkpoint, model)
            return
        samples = TrainingOrder(
            train_NT, steps=settings.total_steps, batch=settings.batch_sequences, seed=settings.seed
        )
        curve = Curve(self.folder.training, done_steps=done) if leads() else None

        def on_step(point: dict[str, Any]) -> None:
            if point["step"] >= settings.total_steps:
                losses = [round(one, 6) for one in objective.validated.tolist()]
                self.folder.write("validation", {"sequence_losses": losses})
            curve.add(point)
            self.on_step(point)

        if settings.shard:
            shard(model)
        objective = FromScratch(model, held_out_NT, settings)
        try:
            Loop(objective, samples, settings, self.folder.training, on_step=on_step).run()
        finally:
            if curve is not None:
                curve.close()

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
            "validation_tokens": len(losses) * (settings.sequence_tokens - 1), "validation_sequence_losses": losses,
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
        "paper_perplexity": None if known is None else known.paper_perplexity,
        "paper_tuned_perplexity": None if known is None else known.paper_tuned_perplexity,
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
    folder.begin(recipe, settings)
    try:
        prepare_text(settings, text, report=report)
    except Exception:  # an interrupt leaves it: the same call goes on
        folder.give_up()
        raise


def prepare_text(settings: PretrainSettings, folder: Path, *, report: Report) -> None:
    """Tokenizer and packed text in `folder`, unless they lie there. Raises `UserError` where the data is too short."""
    if is_packed(folder / "train.bin"):
        return
    length, options = settings.sequence_tokens, {"vocabulary": settings.vocabulary, "report": report}
    tokenizer = _tokenizer(settings, report)
    train = sequences_of(drawn_texts(settings.data, length), tokenizer, length)
    held = sequences_of(drawn_texts(settings.valid, length), tokenizer, length) if settings.valid else train
    found = pack(held, folder / "valid.bin", most=max(1, settings.validation_tokens // length), **options)
    tokenizer.save_pretrained(folder / "tokenizer")
    wanted = settings.total_steps * settings.batch_sequences
    if not pack(train, folder / "train.bin", most=wanted, **options) or not found:
        raise UserError(
            f"data too short: {found} sequences of {length:,} tokens are held out, and none is left: "
            "give more text, shorter sequences, or fewer validation_tokens"
        )


def _tokenizer(settings: PretrainSettings, report: Report) -> PreTrainedTokenizerBase:
    if settings.tokenizer is not None:
        return given_tokenizer(settings.tokenizer, settings.vocabulary)
    report("training the tokenizer", 0, 1)
    texts = drawn_texts(settings.data, settings.sequence_tokens)
    found = train_tokenizer(texts, settings.vocabulary)
    report("training the tokenizer", 1, 1)
    return found


def read_text(folder: Path) -> tuple[PreTrainedTokenizerBase, Tensor, Tensor]:
    """Tokenizer, sequences to train on, held-out sequences."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return tokenizer, packed(folder / "train.bin"), packed(folder / "valid.bin")
