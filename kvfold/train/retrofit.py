"""A retrofit from beginning to end: draw text, make the student, train it, set its gates right, measure it, write it.

Every step that takes long leaves a note in the run's folder, so that the same call goes on wherever it was stopped.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvfold.errors import UserError
from kvfold.eval.perplexity import measure_quality
from kvfold.eval.progress import OnStep, Report, silent
from kvfold.eval.reading import Protocol
from kvfold.models.adapters import Base
from kvfold.models.decoder import FoldForCausalLM
from kvfold.record import write_whole_file
from kvfold.train.calibrate import calibrate, fit_importance, least_missed_channel, measure_kept_ratios, warm_start
from kvfold.train.data import TrainingOrder, TrainingText, draw_text
from kvfold.train.loop import Loop, join, load_result, shard, unsharded
from kvfold.train.objectives import Distillation, ignored_tokens
from kvfold.train.run_folder import RunFolder, card_text, leads, machine_rows, read_curve, step_of
from kvfold.train.settings import RetrofitSettings
from kvfold.train.student import (
    Student,
    check_method,
    make_student,
    num_trained,
    retention_of,
    takes_over,
    widest_layout,
    write_trained,
)

MEASURED_WINDOWS = 8
"""Windows of held-out text that the card's figures come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retrofit:
    """What one retrofit works with."""

    model: FoldForCausalLM
    """The source; it is changed in place."""
    tokenizer: PreTrainedTokenizerBase
    source: str
    """As it was given, to know the run again."""
    name: str
    """What the source is called."""
    settings: RetrofitSettings
    folder: RunFolder
    teacher: FoldForCausalLM | None = None
    about: dict[str, Any]
    """For the card: command, version, commit, hardware."""
    snapshot: Path | None = None
    """A folder for the newest checkpoint as a result of its own; nothing is trained then."""
    report: Report = silent
    on_step: OnStep = lambda point: None

    def run(self) -> dict[str, Any]:
        """Train, or go on training, and write the result. Gives the facts of the card, on the main process."""
        with self.folder.locked() if leads() and self.snapshot is None else nullcontext():
            return self._run()

    def _run(self) -> dict[str, Any]:
        self.model.to(join(self.model.device, spreads=self.settings.fsdp))
        widest_layout(self.model, self.settings)  # refused before anything takes long
        check_method(self.model, self.settings, self.teacher)
        base = Base.of(self.model, self.name)
        text = self._text()
        facts: dict[str, Any] = {"base": self.name, **self.about}
        if leads():
            self.folder.begin(self.source, self.settings, str(self.model.dtype).removeprefix("torch."))
            self.folder.keep_text(hashlib.sha256(text.train.numpy().tobytes()).hexdigest())
            facts["before"] = self._noted("before", lambda: self._measured(text))
        if self.settings.find_channel and self.settings.trains_gates:
            asked = self.model, text.calibration, self.settings
            facts["freed"] = self._noted("channel", lambda: least_missed_channel(*asked, report=self.report))
            found = self.settings.with_values(channel=facts["freed"]["channel"], find_channel=False)
            return replace(self, settings=found)._trained(facts, text, base)
        return self._trained(facts, text, base)

    def _trained(self, facts: dict[str, Any], text: TrainingText, base: Base) -> dict[str, Any]:
        """The student made and trained, or its newest checkpoint looked at."""
        student = make_student(self.model, self.settings, teacher=self.teacher)
        if self.settings.trains_gates:
            facts["nominal"] = retention_of(self.model, self.settings).nominal_for(self.settings.compression)
        facts["trained_parameters"] = num_trained(self.model, self.settings)
        if self.snapshot is not None:
            return self._snapped(facts, text, base)
        if self.settings.compresses and (self.settings.warm_start or self.settings.start is not None):
            facts["warm_start"] = self._warm_started(text)
        self._train(student, text, base)
        done = replace(self, model=unsharded(self.model))
        if leads():
            facts = done._written(facts, text, base, self.folder.out, done_steps=self.settings.total_steps)
            self.folder.write("done", facts)
            self.folder.clear()  # what was kept to go on with
        return facts

    def _snapped(self, facts: dict[str, Any], text: TrainingText, base: Base) -> dict[str, Any]:
        """The newest checkpoint as a result; the run can go on."""
        done = self.folder.done_steps
        self._load(self.folder.checkpoint)
        facts["warm_start"] = self.folder.read("warm_start")
        facts["planned_tokens"] = self.settings.total_steps * self.settings.step_tokens
        return self._written(facts, text, base, self.snapshot, done_steps=done)

    def _written(
        self, facts: dict[str, Any], text: TrainingText, base: Base, out: Path, *, done_steps: int
    ) -> dict[str, Any]:
        """Gates set right, measured, written."""
        settings = self.settings
        self.model.eval()
        if settings.trains_gates and settings.calibrate:
            facts["calibration"] = calibrate(self.model, text.calibration, settings, report=self.report)
        if settings.compresses:
            self.model.config.kept_ratios = measure_kept_ratios(self.model, text.calibration, report=self.report)
        points = [point for point in read_curve(self.folder.curve) if point["step"] <= done_steps]
        facts["tokens"] = points[-1]["tokens"]
        facts["seconds"] = sum(point["seconds"] for point in points)
        facts["after"] = self._measured(text)
        write_trained(
            self.model, self.tokenizer, settings, base, out, card=write_card(settings, facts, out), tokens=facts["tokens"]
        )  # fmt: skip
        return facts

    def _load(self, checkpoint: Path) -> None:
        settings = self.settings
        load_result(checkpoint, self.model, settings)
        if settings.compresses and settings.trains == "full" and settings.spec.gate_form.zero_out:
            # The rows go before the step after.
            self.model.free_channel(write=step_of(checkpoint) <= settings.stages.zero_out_steps)

    def _text(self) -> TrainingText:
        settings, most = self.settings, self.model.config.max_position_embeddings
        if settings.seq_len > most:
            raise UserError(f"seq_len {settings.seq_len:,}: the model reads {most:,} at most: use shorter sequences")
        self.report("drawing text", 0, 1)
        sizes = {"tokens": settings.total_steps * settings.step_tokens, "seq_len": settings.seq_len}
        text = draw_text(settings.data, self.tokenizer, seed=settings.seed, **sizes)
        self.report("drawing text", 1, 1)
        return text

    def _noted(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        found = self.folder.read(name)
        if found is None:
            found = make()
            if leads():
                self.folder.write(name, found)
        return found

    def _warm_started(self, text: TrainingText) -> dict[str, Any]:
        """Fitted once; a run that goes on has the gates of its checkpoint."""
        if self.folder.checkpoint is not None:
            return self.folder.read("warm_start") or {}
        found = self._begin_gates(text)
        if leads():
            self.folder.write("warm_start", found)
        return found

    def _begin_gates(self, text: TrainingText) -> dict[str, Any]:
        """Gates as training finds them: fitted to attention, taken over with what is new, or shifted to the compression."""
        settings = self.settings
        if settings.warm_start:
            return warm_start(self.model, text.train, settings, report=self.report)
        if takes_over(settings):
            return fit_importance(self.model, text.train, report=self.report)
        if settings.trains_gates and settings.calibrate:
            return calibrate(self.model, text.calibration, settings, report=self.report)
        return {}

    def _train(self, student: Student, text: TrainingText, base: Base) -> None:
        settings, checkpoint, done = self.settings, self.folder.checkpoint, self.folder.done_steps
        if done >= settings.total_steps:
            self._load(checkpoint)
            return
        ignored = ignored_tokens(self.model)
        samples = TrainingOrder(
            text.train,
            steps=settings.total_steps,
            batch=settings.global_batch_size,
            seed=settings.seed,
            ignored=ignored,
        )

        def on_unit(unit: int, model: FoldForCausalLM) -> None:
            write_trained(model, self.tokenizer, settings, base, self.folder.out / "ramp" / f"{unit}x")

        if settings.fsdp:
            shard(self.model)
        objective = Distillation(student, settings, ignored, on_unit=on_unit)
        Loop(objective, samples, settings, self.folder.training, on_step=self.on_step).run()

    def _measured(self, text: TrainingText) -> dict[str, Any]:
        """Perplexity and real compression on the held-out blocks, read through the cache."""
        settings = self.settings
        path = self.folder.training / "held_out.jsonl"
        texts = self.tokenizer.batch_decode(text.held_out, skip_special_tokens=True)
        write_whole_file(path, "".join(json.dumps({"text": one}) + "\n" for one in texts))
        method = self.model.config.layout.time_text()
        protocol = Protocol(windows=MEASURED_WINDOWS, context_tokens=settings.seq_len, batch=MEASURED_WINDOWS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* all are taken")
            result = measure_quality(
                self.model, self.tokenizer, [path], [method], name=self.name, protocol=protocol, report=self.report
            )
        row = next(row for row in result["rows"] if row["method"] == method)
        # The divergence is from the same weights unfolded: from the original only where these are frozen.
        names = ("perplexity", "tokens", "compression", *(("kl",) if settings.trains == "adapter" else ()))
        return {**{name: row[name] for name in names}, "context_tokens": settings.seq_len}


def device_name(device: torch.device, processor: str) -> str:
    """What the card calls the machine; `processor` is the name of its CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor}, {torch.get_num_threads()} threads"


_WHAT = {"adapter": "An adapter", "lora": "A low-rank adapter", "full": "A model"}


def write_card(settings: RetrofitSettings, facts: Mapping[str, Any], out: Path) -> str:
    """The text of the card. `facts`: see `Retrofit`, which gathers them."""
    before, after, control = facts["before"], facts["after"], "the original"
    method = f"`{settings.time}`" if settings.compresses else "no method (plain uptraining)"
    if settings.control:
        method, control = f"no method: the control of a retrofit with `{settings.time}`", "this is one"
    elif settings.trains == "adapter":
        control += ": its weights are frozen"
    elif settings.compresses:
        control = "not in this folder: the same command with `--control` makes it"
    # With a teacher of its own, what is trained was converted first.
    start = "the original" if settings.teacher is None else f"{facts['base']} before training"
    learned = {
        "adapter": "gates alone" if settings.trains_gates or not settings.gated else "what stands beside the gates",
        "lora": f"rank {settings.rank} on q, k, v, o",
        "full": "all",
    }[settings.trains]
    # What a snapshot says of the run that it was taken from.
    planned = f" of {facts['planned_tokens']:,} planned" if "planned_tokens" in facts else ""
    change = 100 * (after["perplexity"] / before["perplexity"] - 1)
    rows = {
        "base": facts["base"],
        "method": method,
        **(_method_rows(settings, facts) if settings.compresses else {}),
        "trained weights": f"{facts['trained_parameters']:,} ({learned})",
        "loss": _loss(settings),
        "tokens": f"{facts['tokens']:,}{planned}, in sequences of {settings.seq_len:,}",
        "data": ", ".join(Path(name).name for name in settings.data),
        **machine_rows(facts),
        "compression reached on held-out text": after.get("compression")
        and f"{after['compression']:.2f}, window included",
        f"held-out perplexity of {start}": f"{before['perplexity']:.2f}",
        "held-out perplexity of the result": f"{after['perplexity']:.2f} ({change:+.1f} %), on {after['tokens']:,} tokens in "
        f"windows of {after['context_tokens']:,}",
        "control": control,
        "kvfold": f"{facts['version']}, commit {facts['git_commit'] or 'not known'}",
    }
    what = f"{_WHAT[settings.trains]} for {facts['base']}, written by `kvfold retrofit`."
    named = f'"{out.name}"' if settings.trains == "full" else f'base, adapter="{out.name}"'
    return card_text(out.name, what, rows, facts["command"], f"model = kvfold.load({named})")


def _method_rows(settings: RetrofitSettings, facts: Mapping[str, Any]) -> dict[str, str | None]:
    if not settings.trains_gates:
        fitted = facts.get("warm_start") or {}
        return {
            "gates": f"those of {settings.start}, as they are",
            "importance": f"fitted to {fitted['tokens']:,} tokens, then trained" if fitted else "gone on from",
        }
    own = settings.reads == "own" or "next" not in settings.spec.gate_form.reads
    source = "an adapter" if settings.gate_source == "adapter" else "a freed channel"
    freed, warm, shifted = facts.get("freed"), facts.get("warm_start"), facts.get("calibration")
    return {
        "compression asked for": f"{settings.compression:g} at the end of {settings.seq_len:,} tokens, window included "
        f"({facts['nominal']:.2f} by the gates alone)",
        "decisions": f"from {source}, {'each token' if own else 'the next token'}'s{' own' if own else ''}, "
        f"one for each {'KV head' if settings.per == 'head' else 'layer'}",
        "freed channel": freed
        and f"{freed['channel']}, the one missed least: KL {freed['kl']:.3f} without it, {freed['kl_of_last']:.3f} without the "
        "last",
        "start": settings.start and f"the gates of {settings.start}, shifted by {(warm or {}).get('shift', 0):+.3f}",
        "warm start": settings.warm_start
        and warm
        and f"gates fitted to {warm['tokens']:,} tokens without back-propagation",
        "calibrated": shifted
        and f"all gates shifted by {shifted['shift']:+.3f} on held-out text: {shifted['before']:.2f} before, "
        f"{shifted['after']:.2f} after",
    }


def _loss(settings: RetrofitSettings) -> str:
    if settings.distils == "none":
        return "next token"
    towards = "student from teacher" if settings.distils == "reverse" else "teacher from student"
    return f"KL of {towards}, teacher {Path(settings.teacher).name if settings.teacher else 'the original'}"
