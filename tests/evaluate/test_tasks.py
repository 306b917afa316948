import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import families
from characters import characters
from secateurs.evaluate import evaluate_tasks

lm_eval_tasks = pytest.importorskip("lm_eval.tasks")

# One right answer is much longer than the wrong one, so that `acc` and `acc_norm` may differ.
ROWS = [
    {"goal": "open a jar", "sol1": "twist its lid", "sol2": "boil it", "label": 0},
    {"goal": "dry a cup", "sol1": "fill it", "sol2": "turn it over on a clean cloth", "label": 1},
    {"goal": "cut bread", "sol1": "with a spoon", "sol2": "with a knife", "label": 1},
    {"goal": "keep warm", "sol1": "wear wool", "sol2": "wear ice", "label": 0},
    {"goal": "light a lamp", "sol1": "a match", "sol2": "a fish", "label": 0},
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = families.FAMILIES["llama"].to_dict() | {"max_position_embeddings": 128}
    torch.manual_seed(0)
    return type(families.build("llama"))(type(families.FAMILIES["llama"])(**config)).eval()


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan three of lm-eval's folders: all of them take ten seconds."""
    whole = lm_eval_tasks.TaskManager
    folder = Path(lm_eval_tasks.__file__).parent

    class Few(whole):  # type: ignore[misc, valid-type]
        def __init__(self, include_path: Any = None, include_defaults: bool = True) -> None:
            few = [folder / name for name in ("piqa", "gsm8k", "arc")]
            super().__init__(include_path=few if include_defaults else include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", Few)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_published_piqa(folder: Path) -> None:
    """Labels in a file of their own, as PIQA is published."""
    write_jsonl(folder / "valid.jsonl", [{key: row[key] for key in ("goal", "sol1", "sol2")} for row in ROWS])
    (folder / "valid-labels.lst").write_text("".join(f"{row['label']}\n" for row in ROWS))


def naive_accuracy(model: PreTrainedModel, *, per_character: bool) -> float:
    """PIQA as lm-eval describes it, by hand: which continuation of the question is likelier."""
    right = 0
    for row in ROWS:
        prompt = f"Question: {row['goal']}\nAnswer:"
        scores = []
        for answer in (row["sol1"], row["sol2"]):
            ids = torch.tensor([[ord(character) for character in f"{prompt} {answer}"]])
            with torch.no_grad():
                losses = model(input_ids=ids).logits.double().log_softmax(-1)
            likelihood = losses[0, :-1].gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
            scores.append(likelihood / len(answer) if per_character else likelihood)
        right += int(scores[1] > scores[0]) == row["label"]
    return right / len(ROWS)


@pytest.mark.parametrize("published", [True, False])
def test_piqa_from_local_files(model: PreTrainedModel, tmp_path: Path, published: bool) -> None:
    if published:
        write_published_piqa(tmp_path)
    else:
        write_jsonl(tmp_path / "piqa.jsonl", ROWS)
    tokenizer = characters(window=1000)
    tokenizer.pad_token = None
    model.train()
    metrics = evaluate_tasks(model, tokenizer, ["piqa"], task_data=tmp_path)["piqa"]
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert model.training
    assert tokenizer.pad_token is None
    model.eval()
    assert metrics["acc"] == pytest.approx(naive_accuracy(model, per_character=False))
    assert metrics["acc_norm"] == pytest.approx(naive_accuracy(model, per_character=True))


def test_the_tasks_of_a_tag_and_a_limit(model: PreTrainedModel, tmp_path: Path) -> None:
    # ARC's fields are others than PIQA's. Where all choices are the same the first one is taken.
    choices = {"text": ["rain", "rain"], "label": ["A", "B"]}
    rows = [{"question": "What is wet?", "choices": choices, "answerKey": key} for key in "ABB"]
    write_jsonl(tmp_path / "arc_easy.jsonl", rows)
    write_jsonl(tmp_path / "arc_challenge.jsonl", rows[1:])
    both = evaluate_tasks(model, characters(window=1000), ["ai2_arc"], task_data=tmp_path)
    assert {task: metrics["acc"] for task, metrics in both.items()} == {
        "arc_easy": pytest.approx(1 / 3),
        "arc_challenge": 0.0,
    }
    first = evaluate_tasks(model, characters(window=1000), ["arc_easy"], task_data=tmp_path, limit=1)
    assert first["arc_easy"]["acc"] == 1.0


def test_a_name_that_lm_eval_does_not_know(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"lm-eval has no task 'piqua' \(piqa"):
        evaluate_tasks(model, characters(), ["piqua"])


def test_local_data_that_will_not_do(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no task's data in"):
        evaluate_tasks(model, characters(), ["piqa"], task_data=tmp_path)
    write_published_piqa(tmp_path)
    (tmp_path / "valid-labels.lst").write_text("0\n1\n")
    with pytest.raises(ValueError, match="5 questions but 2 labels"):
        evaluate_tasks(model, characters(), ["piqa"], task_data=tmp_path)
    (tmp_path / "valid.jsonl").unlink()
    write_jsonl(tmp_path / "piqa.jsonl", [{"goal": "open a jar", "answer": "twist its lid"}])
    with pytest.raises(ValueError, match="the local data of the task 'piqa' do not suit it") as caught:
        evaluate_tasks(model, characters(), ["piqa"], task_data=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_task_with_solved_examples_is_not_made_zero_shot_in_silence(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    with pytest.raises(ValueError, match="task 'gsm8k' shows 5 solved examples"):
        evaluate_tasks(model, characters(), ["gsm8k"], task_data=tmp_path)


def test_without_a_network_a_folder_is_asked_for(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def unreachable(**request: Any) -> Any:
        asked.update(request)
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"Couldn't reach .*; give a folder with 'piqa.jsonl'"):
        evaluate_tasks(model, characters(), ["piqa"])
    assert asked == {"path": "baber/piqa", "name": None}


def test_without_lm_eval_it_says_what_to_install(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'secateurs\[tasks\]'"):
        evaluate_tasks(model, characters(), ["piqa"])
