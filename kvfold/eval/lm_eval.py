"""The `kvfold` model of lm-evaluation-harness: what its `hf` model does, with every text read through a folded cache.

Prompts, truncation, the token that opens a text and stop sequences are those of `hf`, from which this class descends; what
differs is that methods whose state depends on where calls are cut are fed one token a call, prompts too.
`python -m kvfold.eval.lm_eval` is lm-eval's own command line with this model among the others.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
from datasets import Dataset
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models import MODEL_MAPPING
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from kvfold.data import QuestionFile, holds_lines, read_question_file
from kvfold.errors import UserError
from kvfold.eval.progress import Report, progress_bars
from kvfold.eval.reading import calls, entry_bytes, folded_cache, kept_shares, score_answers
from kvfold.layout.kvlayout import KVLayout
from kvfold.models.decoder import FoldForCausalLM
from kvfold.models.load import load, load_tokenizer

_AUTO_ROWS = 32
"""Requests read side by side where lm-eval is asked to find a number itself."""


class FoldLM(HFLM):
    """A kvfold model as lm-eval asks for it: likelihoods of continuations, of whole texts, and generation."""

    def __init__(
        self, pretrained: str | FoldForCausalLM, tokenizer: Any = None, *, time: str | None = None,
        bits: str | None = None, adapter: str | None = None, dtype: str | None = None, device: str | None = None,
        batch_size: int | str = 1, max_batch_size: int | None = None, max_length: int | None = None,
        add_bos_token: bool | None = None, prefix_token_id: int | None = None, truncation: bool = False,
        report: Report | None = None,
    ):  # fmt: skip
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
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:  # fmt: skip
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


_WORDING = 1
"""Counts the wordings that questions of files have had; figures of one are never taken for another's."""

_OWN_FOLDERS = {"niah": "ruler"}
"""Of lm-eval's tasks, folders that the first part of a task's name does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTask:
    """One task (or group of tasks) that was asked for."""

    name: str
    """As lm-eval calls it; for a file its name without endings."""
    length_tokens: int | None
    """Of its prompts, for synthetic tasks that are made to any length."""
    identity: dict[str, Any]
    """What tells its questions and their wording from others'."""
    load: Callable[[], dict[str, Any]]
    """Gives lm-eval's `tasks`, `groups`, `group_map`; this is what may fetch or make data."""


def find_tasks(
    names: Sequence[str], *, folder: str | Path | None = None, lengths: Sequence[int] = (), tokenizer: str | Path = ""
) -> list[NamedTask]:
    """The tasks of these names, each once. Raises `UserError` for what is unknown, naming the nearest name that is known.

    `folder`: more tasks, as lm-eval's YAML files. `lengths`, in tokens, and `tokenizer`, the folder of one: for synthetic tasks.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder of tasks: correct the path")
    names = list(dict.fromkeys(names))
    known = [name for name in names if not holds_lines(Path(name))]
    manager = _Manager(known, folder, {"tokenizer": str(tokenizer)}) if known else None
    found = []
    for name in names:
        if holds_lines(Path(name)):
            found.append(_task_of_file(read_question_file(name)))
        else:
            found += manager.tasks_of(name, lengths)
    return found


class _Manager:
    """lm-eval's index of tasks, of as few folders as hold the names: indexing all of its 14,000 takes long."""

    def __init__(self, names: Sequence[str], folder: str | Path | None, details: dict[str, Any]):
        root = Path(lm_eval.tasks.__file__).parent
        parts = [part for name in names for part in (name, name.partition("_")[0])]
        near = [root / _OWN_FOLDERS.get(part, part) for part in dict.fromkeys(parts)]
        own = [] if folder is None else [Path(folder)]
        self._details = details
        self._settings = {"include_path": [*(path for path in near if path.is_dir()), *own], "include_defaults": False}
        self._manager = TaskManager(**self._settings, metadata=details)
        if not set(names) <= set(self._manager.all_tasks):
            self._settings = {"include_path": own, "include_defaults": True}
            self._manager = TaskManager(**self._settings, metadata=details)
        for name in names:
            if name not in self._manager.task_index:
                near = get_close_matches(name, self._manager.all_tasks, n=1)
                meant = f"the nearest is '{near[0]}': " if near else ""
                raise UserError(
                    f"task '{name}': lm-eval knows no such task: {meant}name one of its tasks, or a .jsonl file"
                )

    def tasks_of(self, name: str, lengths: Sequence[int]) -> list[NamedTask]:
        """One task, or one for each length where its data is made to measure."""
        entry = self._manager.task_index[name]
        config = json.dumps(entry.cfg, sort_keys=True, default=str)
        identity = {"lm_eval": metadata.version("lm_eval"), "config": hashlib.sha256(config.encode()).hexdigest()}
        made = "custom_dataset" in (entry.cfg or {}) or (
            entry.yaml_path is not None and "ruler" in entry.yaml_path.parts
        )
        return [
            NamedTask(
                name=name, length_tokens=length, identity={**identity, "task": name, "length": length},
                load=lambda length=length: self._load(name, length),
            )
            for length in (lengths if made and lengths else [None])
        ]  # fmt: skip

    def _load(self, name: str, length: int | None) -> dict[str, Any]:
        manager = self._manager
        if length is not None:
            manager = TaskManager(**self._settings, metadata={**self._details, "max_seq_lengths": [length]})
        return manager.load([name])


def _task_of_file(file: QuestionFile) -> NamedTask:
    rows = [
        {"text": worded(one.prefix, one.input), "choices": [choice.strip() for choice in one.choices], "gold": one.gold}
        for one in file.questions
    ]
    config = {
        "task": file.name, "output_type": "multiple_choice", "test_split": "test", "num_fewshot": 0,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": "gold", "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    identity = {"file": file.name, "sha256": file.digest, "wording": _WORDING}
    load = lambda: TaskManager(include_defaults=False).load([config])  # noqa: E731
    return NamedTask(name=file.name, length_tokens=None, identity=identity, load=load)


def worded(prefix: str, question: str) -> str:
    """A question as a model reads it; each choice follows after a space."""
    opening = f"{prefix.rstrip()}\n" if prefix.strip() else ""
    return f"{opening}Q: {question.strip()}\nA:"


def register() -> None:
    """Make `kvfold` known to lm-eval's registry, for its command line and for `lm_eval.simple_evaluate` alike."""
    assert MODEL_MAPPING, "lm-eval registers its own models when its models room is imported"
    if "kvfold" not in model_registry:
        model_registry.register("kvfold", target="kvfold.eval.lm_eval:FoldLM")


def main() -> None:
    """lm-eval's command; bad input ends in one line on stderr and exit code 2, as for every command of kvfold's."""
    register()
    try:
        cli_evaluate()
    except ValueError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
