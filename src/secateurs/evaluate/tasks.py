"""Zero-shot tasks through lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

The task is always lm-eval's own: its questions, its choices, its metrics. Where a task's data are in local
files, a configuration that includes lm-eval's and replaces only where the data come from takes its place.
"""

import json
import logging
from collections.abc import Mapping
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    task_data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Evaluate a causal language model on tasks of lm-eval.

    Args:
        model: runs where it is; its training mode is restored afterwards.
        tokenizer: the model's.
        tasks: names of lm-eval's tasks, groups or tags, such as `piqa`.
        task_data: a folder with `TASK.jsonl` for each task that is to be read from there, one question a
            line, with the fields that the task's data set has; or with PIQA as it is published, `valid.jsonl`
            and `valid-labels.lst`. The data of any other task are fetched from the Hugging Face hub.
        limit: questions of each task, the first ones; None takes all.
        batch_size: sequences run at once.

    Returns:
        For each task its metrics by lm-eval's names, such as `acc`, `acc_norm` and their standard errors
        `acc_stderr`, `acc_norm_stderr`; shares from 0 to 1.

    Raises:
        ValueError: lm-eval is not installed, it has no task of a name, the local data are not a task's, a
            task with local data is not a zero-shot one, or data could not be fetched.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"tasks need lm-eval ({error}): pip install 'secateurs[tasks]'") from error

    was_training = model.training
    logger = logging.getLogger("lm_eval")
    level = logger.level
    # It warns of what is on purpose here, such as a model that is loaded already.
    logger.setLevel(logging.ERROR)
    try:
        manager = TaskManager()
        for task in tasks:
            if task not in manager.all_tasks:
                similar = ", ".join(get_close_matches(task, manager.all_tasks)) or "see lm-eval's list"
                raise ValueError(f"lm-eval has no task '{task}' ({similar})")
        with TemporaryDirectory() as scratch:
            local = _use_local_data(manager, Path(task_data), Path(scratch)) if task_data else set()
            results = simple_evaluate(
                # It gives the tokenizer a padding token where there is none: the caller's stays as it is.
                model=HFLM(pretrained=model, tokenizer=deepcopy(tokenizer), batch_size=batch_size),
                tasks=[part for task in tasks for part in _load(manager, task, local)],
                task_manager=manager,
                limit=limit,
                log_samples=False,
            )
    finally:
        logger.setLevel(level)
        model.train(was_training)
    return {task: _numbers(metrics) for task, metrics in results["results"].items()}


def _use_local_data(manager: "TaskManager", folder: Path, scratch: Path) -> set[str]:
    """Have the tasks whose data are in a folder read them from there; their names."""
    files = {file.stem: file for file in folder.glob("*.jsonl") if file.stem in manager.task_index}
    if (folder / "valid.jsonl").is_file() and (folder / "valid-labels.lst").is_file():
        files["piqa"] = _labelled_piqa(folder, scratch)
    if not files:
        raise ValueError(
            f"no task's data in '{folder}': name files TASK.jsonl, such as piqa.jsonl, or give PIQA's "
            "valid.jsonl and valid-labels.lst"
        )
    for task, file in files.items():
        config = {
            "include": str(manager.task_index[task].yaml_path),
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            # The copy that `datasets` makes goes when the run ends.
            "dataset_kwargs": {"data_files": {"test": str(file.resolve())}, "cache_dir": str(scratch)},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": None,
        }
        # JSON is YAML too.
        (scratch / f"{task}.yaml").write_text(json.dumps(config), encoding="utf-8")
    replacements = type(manager)(include_path=str(scratch), include_defaults=False)
    manager.task_index.update(replacements.task_index)
    return set(files)


def _labelled_piqa(folder: Path, scratch: Path) -> Path:
    """PIQA keeps its labels in a file of their own; lm-eval expects them in the rows."""
    questions = (folder / "valid.jsonl").read_text(encoding="utf-8").strip().split("\n")
    labels = (folder / "valid-labels.lst").read_text(encoding="utf-8").split()
    if len(questions) != len(labels):
        raise ValueError(f"{len(questions)} questions but {len(labels)} labels in '{folder}'")
    rows = (
        {**json.loads(question), "label": int(label)}
        for question, label in zip(questions, labels, strict=True)
    )
    file = scratch / "piqa.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def _load(manager: "TaskManager", name: str, local: set[str]) -> list[Any]:
    """The task or group of a name, or the tasks of a tag, with their data."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # the hub, the network, the parser, the task's own code: each raises its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if name in local:
            raise ValueError(f"the local data of the task '{name}' do not suit it ({reason})") from error
        raise ValueError(
            f"the data of the task '{name}' could not be had from the Hugging Face hub ({reason}); "
            f"give a folder with '{name}.jsonl'"
        ) from error
    for task_name, task in loaded["tasks"].items():
        fixed_examples = task.config.fewshot_config and task.config.fewshot_config.samples
        if task_name in local and task.config.num_fewshot and not fixed_examples:
            raise ValueError(
                f"task '{task_name}' shows {task.config.num_fewshot} solved examples of its training data; "
                "local data serve zero-shot tasks"
            )
    groups = loaded.get("groups", {})
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """lm-eval's figures, `metric,filter`, without the name of the filter that lets everything through."""
    return {
        metric.removesuffix(",none"): float(value)
        for metric, value in metrics.items()
        if "," in metric and isinstance(value, int | float)
    }
