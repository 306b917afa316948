"""What README, the tutorial and the recipes tell people to type works.

Every block of the pages in RUN is run, in its order, in a folder that has what the page speaks of, as small
as it can be. Where a block has `<!-- not run: why -->` above it, its commands are only parsed; so are those
of all other pages.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from huggingface_hub import constants
from transformers import TrainingArguments

import folders
import gguf_files
import secateurs
from secateurs import cli
from secateurs.training.arguments import read_settings

ROOT = Path(__file__).parents[1]
RUN = ("docs/index.md", "docs/choose.md", "docs/recipes.md", "docs/plan.md", "docs/extend.md")
PARSED = sorted({"README.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))} - {*RUN})

SMALL = {
    "prune": ("--samples", "8", "--length", "32"),
    "plan": ("--length", "32"),
    "recover": ("--samples", "8", "--length", "32", "--tokens", "2048"),
    "sweep": ("--samples", "8", "--length", "32"),
    "train": ("--length", "32", "--batch-size", "2"),
    "profile": ("--samples", "4", "--length", "32"),
    "eval": ("--length", "32"),
    "report": ("--tokens", "4"),
    "generate": ("--tokens", "4"),
}
"""Options that make a verb quick; of those that a command gives twice the last counts."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int
    """Of the page, on which it opens."""
    runs: bool


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"(<!-- not run: [^\n]+ -->\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(each[2], each[3], text.count("\n", 0, each.start(3)), not each[1]) for each in found]


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell's lines."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def arguments_of(words: list[str]) -> list[str] | None:
    """What secateurs is called with, by itself or by torchrun; None of any other command."""
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    return words[1:] if words[0] == "secateurs" else None


Run = Callable[[list[str]], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["secateurs", *arguments])
            status: Any = 0
            try:
                cli.main()
            except SystemExit as end:
                status = end.code
        assert not status, f"{shlex.join(arguments)}: {capsys.readouterr().err}"

    return run


@pytest.fixture
def parse(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Everything but the work: names, types and what settings refuse."""
    idle = {name: verb._replace(run=lambda *subject, settings: None) for name, verb in cli.VERBS.items()}

    def parse(arguments: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cli, "VERBS", idle)
            run(arguments)

    return parse


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that pages speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    words = "".join(f"It was the {n}th cold evening, and nobody had lit a fire. " for n in range(300))
    for model in ("my-llama", "demo/model"):
        config = folders.save(tmp_path / model, "llama") / "config.json"
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "max_position_embeddings": 256}))
    for text in ("text.txt", "novel.txt", "papers/one.txt", "demo/calibration.txt", "demo/held_out.txt"):
        (tmp_path / text).parent.mkdir(exist_ok=True)
        (tmp_path / text).write_text(words[:2000] if text.startswith("papers") else words)
    (tmp_path / "questions.jsonl").write_text('{"question": "Is it cold?", "answer": "It is."}\n' * 64)
    gguf_files.write(tmp_path / "my-llama-Q4_K_M.gguf", gguf_files.llama())
    return tmp_path


@pytest.mark.parametrize("page", RUN)
def test_a_page_does_what_it_says(page: str, place: Path, run: Run, parse: Run) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "bash":
            for words in commands_in(block.text):
                arguments = arguments_of(words)
                if not block.runs:
                    if arguments:
                        parse(arguments)
                    continue
                assert arguments, f"{page}:{block.line}: what is run is secateurs, not {words[0]}"
                run([*arguments, *SMALL.get(arguments[0], ())])
        elif block.language == "yaml" and block.runs:
            name = block.text.partition("\n")[0].removeprefix("# ")
            (place / name).write_text(block.text)
        elif block.language == "python" and block.runs:
            code = "\n" * block.line + block.text  # so that a traceback has the page's lines
            exec(compile(code, str(ROOT / page), "exec"), names)


@pytest.mark.parametrize("recipe", ["pretrain", "chat", "lora", "prune-to"])
def test_a_recipe_trains(recipe: str, place: Path, run: Run) -> None:
    file = ROOT / f"docs/recipes/{recipe}.yaml"
    run(["train", "--config", str(file), *SMALL["train"]])
    assert (place / yaml.safe_load(file.read_text())["output"] / "model.safetensors").is_file()


def test_the_recipe_for_several_gpus_is_understood() -> None:
    """That it shards is shown in tests/training/test_distributed.py, by the same settings."""
    assert read_settings(ROOT / "docs/recipes/fsdp2.yaml", TrainingArguments) == {
        "fsdp": True,
        "fsdp_config": {"version": 2, "activation_checkpointing": True},
    }


@pytest.mark.parametrize("page", PARSED)
def test_commands_of_a_page_are_understood(page: str, parse: Run) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    indented = re.findall(r"^ {4}((?:secateurs|torchrun) .*)$", text, re.MULTILINE)
    fenced = [block.text for block in blocks_of(page) if block.language == "bash"]
    for words in commands_in("\n".join([*indented, *fenced])):
        if arguments := arguments_of(words):
            parse(arguments)


def test_the_reference_has_all_public_names() -> None:
    listed = re.findall(r"^::: secateurs\.([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    names = [name.rpartition(".")[2] for name in listed]
    assert sorted(names) == sorted(set(secateurs.__all__) - {"__version__"})


def test_errors_that_are_explained_are_those_that_are_raised() -> None:
    """Each message that the page quotes is in the code, but for what stands for names and numbers: `...`."""
    code = "".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    code = re.sub(r'"\n\s*f?"', "", code)  # messages that go on in another line
    quoted = re.findall(r"^> (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        for part in message.strip("` ").split("..."):
            assert part.strip() in code, message


def test_the_notebook_runs(place: Path) -> None:
    """As it is, but with a smaller model, and less of everything."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "docs/notebook.ipynb", as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"""
from pathlib import Path

MODEL, CALIBRATION, HELD_OUT = Path("{place}/my-llama"), "{place}/text.txt", "{place}/novel.txt"
PATTERN, SAMPLES, LENGTH, TOKENS = "50%", 8, 32, 2048
"""
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(place)}}).execute()
    assert "perplexity on the novel" in notebook.cells[-2].outputs[-1].text
