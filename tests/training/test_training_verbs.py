"""`secateurs profile` and `secateurs train`: what they print, and that a mistake is one line, status 2."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import decoders
from folders import bytes_of, everything_in, save
from secateurs import cli

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(40))


@dataclass(frozen=True)
class Place:
    """A folder with a model, a text and a chat in it, and the command line run in this process."""

    folder: Path
    run: Callable[[list[str]], tuple[int, str, str]]

    def train(self, *options: str) -> tuple[int, str, str]:
        """Options given twice: the last counts."""
        folder = self.folder
        return self.run(
            [
                "train", str(folder / "model"), "--output", str(folder / "out"), "--length", "32",
                "--batch-size", "4", "--steps", "5", "--device", "cpu", *options,
            ]
        )  # fmt: skip

    def refuses(self, message: str, arguments: list[str]) -> None:
        """One line with the message in it, status 2, and nothing on the disk is other than before."""
        before = everything_in(self.folder)
        status, out, err = self.run(arguments)
        assert status == 2
        assert not out
        [line] = err.splitlines()
        assert line.startswith("secateurs: ")
        assert message in line
        assert everything_in(self.folder) == before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    def run(arguments: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["secateurs", *arguments])
            status: Any = 0
            try:
                cli.main()
            except SystemExit as end:
                status = end.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    save(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    row = {"question": "2+2?", "answer": "4"}
    (tmp_path / "chat.jsonl").write_text((json.dumps(row) + "\n") * 12)
    return Place(tmp_path, run)


def test_profile(place: Place) -> None:
    before = bytes_of(place.folder / "model")
    model, text, out = (str(place.folder / name) for name in ("model", "text.txt", "out"))
    status, shown, _ = place.run(["profile", model, "--text", text, "--length", "32", "--output", out])
    assert status == 0
    assert "barely active" in shown
    assert sum(line.count("%") == 6 for line in shown.splitlines()) == 3
    assert (place.folder / "out" / "profile.png").is_file()
    assert bytes_of(place.folder / "model") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt"], "missing.txt"),
        (["--length", "65"], "sequences of 65 tokens"),
        (["--samples", "0"], "at least 1 sample"),
        (["--output", "model"], "is the model's own folder: give another output folder"),
        (["--output", "text.txt"], "exists already: give another output folder"),
        (["--device", "toaster"], "'toaster' is no device"),
    ],
)
def test_mistakes_in_profile(
    place: Place, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    place.refuses(message, ["profile", "model", "--text", "text.txt", *options])


def test_train_on_text(place: Place) -> None:
    before = bytes_of(place.folder / "model")
    text = str(place.folder / "text.txt")
    status, shown, err = place.train("--text", text, "--validation", text, "--importance", "weighted")
    assert status == 0
    first, flops, losses = shown.splitlines()
    assert first.startswith(f"{place.folder / 'out'}: 5 steps, 640 tokens in ")
    assert "tokens per second, peak memory" in first
    assert "of what dense steps take" in flops
    assert losses.startswith("train loss ")
    assert "validation loss" in losses
    assert "5/5" in err
    assert "tokens/s" in err
    assert "loss" in err
    assert "Traceback" not in err
    AutoModelForCausalLM.from_pretrained(place.folder / "out")
    settings = json.loads((place.folder / "out" / "secateurs.json").read_text())["settings"]
    assert settings["omission"] == 0.5
    assert settings["importance"] == "weighted"
    assert settings["trainer"]["per_device_train_batch_size"] == 4
    assert bytes_of(place.folder / "model") == before


def test_rates_that_are_measured_are_told(place: Place) -> None:
    (place.folder / "run.yaml").write_text("omission: auto\n")
    text, config = str(place.folder / "text.txt"), str(place.folder / "run.yaml")
    status, shown, _ = place.train("--text", text, "--config", config)
    assert status == 0
    assert "highest omission of heads by block: " in shown
    assert "highest omission of channels by block: " in shown
    record = json.loads((place.folder / "out" / "secateurs.json").read_text())
    assert record["settings"]["omission"] == "auto"
    layers = len(record["rates"]["mlp"])
    assert {len(rates) for rates in record["rates"].values()} == {layers}
    assert max(record["rates"]["mlp"]) > 0
    card = (place.folder / "out" / "README.md").read_text()
    assert "up to half of what can be left out, by measured rates (ladder)" in card


def test_trained_it_can_be_evaluated(place: Place) -> None:
    assert place.train("--chat", str(place.folder / "chat.jsonl"), "--omission", "0.25")[0] == 0
    status, shown, _ = place.run(
        ["eval", str(place.folder / "out"), "--text", str(place.folder / "text.txt"), "--length", "32"]
    )
    assert status == 0
    assert "perplexity" in shown


def test_interrupted_it_says_how_to_go_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    text = str(place.folder / "text.txt")
    with monkeypatch.context() as patch:
        patch.setattr("secateurs.training.watch.Watch.on_step_end", interrupt)
        status, _, err = place.train("--text", text)
    assert status == 130
    assert err.splitlines()[-1] == "interrupted: run the same command again"
    assert not (place.folder / "out").exists()
    assert place.train("--text", text)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either text to pre-train on or chat to fine-tune on"),
        (["--text", "text.txt", "--chat", "chat.jsonl"], "give either text"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--chat", "text.txt"], "'text.txt', line 1: not JSON"),
        (["--chat", "lines.jsonl"], "'lines.jsonl', line 2: needs the field 'messages'"),
        (["--text", "lines.jsonl"], "'lines.jsonl', line 2: needs the field 'messages'"),
        (["--text", "text.txt", "--validation", "body.jsonl"], "'body.jsonl', line 1: no field 'text'"),
        (["--text", "text.txt", "--omission", "1"], "in [0, 1)"),
        (["--text", "text.txt", "--omission", "-0.5"], "in [0, 1)"),
        (["--text", "text.txt", "--omission", "0.9"], "leaves a layer"),
        (["--text", "text.txt", "--context", "read"], "context goes with chat"),
        (["--text", "text.txt", "--prune-to", "most"], "'most' is not a pattern"),
        (["--text", "text.txt", "--prune-to", "2:5"], "which is not a multiple of 5"),
        (["--text", "text.txt", "--prune-to", "70%", "--prune-end", "1"], "above 0 and below 1"),
        (["--text", "text.txt", "--prune-to", "70%", "--warmup", "0.7"], "must end after it starts"),
        (["--text", "text.txt", "--prune-to", "70%", "--warmup", "9", "--steps", "5"], "start at step 9"),
        (["--text", "text.txt", "--prune-to", "70%", "--settings", "best.yaml"], "load_best_model_at_end"),
        (["--text", "text.txt", "--length", "65"], "sequences of 65 tokens"),
        (["--text", "text.txt", "--batch-size", "0"], "per_device_train_batch_size is at least 1"),
        (["--text", "text.txt", "--lora", "0"], "the rank of LoRA is at least 1"),
        (["--text", "text.txt", "--settings", "missing.yaml"], "cannot read 'missing.yaml'"),
        (["--text", "text.txt", "--report-to", "clay-tablets"], "'clay-tablets' is not installed"),
        (["--text", "text.txt", "--device", "cuda:7"], "'cuda:7' is no device to train on"),
        (["--text", "text.txt", "--output", "model"], "is the model's own folder"),
        (["--text", "text.txt", "--output", "."], "exists and is not this run's"),
    ],
)
def test_mistakes_in_train(
    place: Place, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All before the model is loaded."""
    monkeypatch.chdir(place.folder)
    (place.folder / "best.yaml").write_text("load_best_model_at_end: true\n")
    (place.folder / "body.jsonl").write_text('{"body": "Such is life."}\n')
    (place.folder / "lines.jsonl").write_text('{"question": "2+2?", "answer": "4"}\n{"question": "3+3?"}\n')

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("secateurs.training.run.load_model", load)
    common = ["train", "model", "--length", "32", "--device", "cpu"]
    place.refuses(message, [*common, *([] if "--output" in options else ["--output", "out"]), *options])


@pytest.mark.parametrize(
    "options", [["--importance", "vibes"], ["--schedule", "zigzag"], ["--select", "all"]]
)
def test_what_the_command_line_does_not_know(place: Place, options: list[str]) -> None:
    status, _, err = place.train("--text", str(place.folder / "text.txt"), *options)
    assert status == 2
    assert "Traceback" not in err
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize(("option", "package"), [("--lora=2", "peft"), ("--chat=chat.jsonl", "trl")])
def test_a_package_that_is_missing(
    option: str, package: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["train", str(place.folder / "model"), "--output", str(place.folder / "out"), option]
    if package == "peft":
        arguments += ["--text", str(place.folder / "text.txt")]
    place.refuses(f"this needs {package}, which is not installed: pip install 'secateurs[train]'", arguments)


def test_an_unsupported_family(place: Place) -> None:
    folder = decoders.save("hrm_text", place.folder / "hrm_text")
    text, out = str(place.folder / "text.txt"), str(place.folder / "out")
    for verb in (
        ["profile", str(folder), "--text", text],
        ["train", str(folder), "--text", text, "--output", out],
    ):
        place.refuses("unsupported architecture: 'hrm_text'", verb)


def test_an_output_that_another_run_began(place: Place) -> None:
    text = str(place.folder / "text.txt")
    assert place.train("--text", text)[0] == 0
    status, _, err = place.train("--text", text, "--omission", "0.25")
    assert status == 2
    assert "exists and is not this run's" in err


@pytest.mark.parametrize(("rank", "shown"), [("0", "the report\n"), ("1", "")])
def test_of_several_processes_the_first_prints(
    place: Place, rank: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli, "train", lambda *_, **__: "the report")
    assert place.train("--text", "text.txt")[:2] == (0, shown)
