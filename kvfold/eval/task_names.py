"""From what `--tasks` names to what lm-evaluation-harness can score: names of its tasks, YAML files of a folder, and files
of questions, which become tasks here and are read without lm-eval's loaders, so that nothing asks the network for them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.tasks import TaskManager

from kvfold.data.texts import QuestionFile, is_question_file, read_question_file
from kvfold.errors import UserError

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
    known = [name for name in names if not is_question_file(name)]
    manager = _Manager(known, folder, {"tokenizer": str(tokenizer)}) if known else None
    found = []
    for name in names:
        if is_question_file(name):
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
