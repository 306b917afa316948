"""The command line: what it does, and that each mistake is one line and exit status 2."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import decoders
from folders import bytes_of, everything_in, rewrite, save, tensors_of
from secateurs import Solution, Statistics, Wanda, cli
from secateurs.checkpoint import output_lock
from secateurs.pattern import Pattern
from secateurs.pruning import walk

TEXT = "".join(f"It was the {number}th cold evening, and nobody had lit a fire. " for number in range(40))


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str


class Place:
    """A folder to work in, with a model and a text, and the command line run in this process."""

    def __init__(self, folder: Path, run: Callable[[list[str]], Result]) -> None:
        self.folder, self.run = folder, run
        self.text = folder / "text.txt"
        self.text.write_text(TEXT)
        self.output = folder / "out"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def prune(self, *options: str, model: object = None, calibration: object = None) -> Result:
        """Options given twice: the last counts, if they are of one value."""
        text = [] if "--calibration" in options else ["--calibration", str(calibration or self.text)]
        return self.run(
            [
                "prune", str(model or self.model), "--output", str(self.output), *text,
                "--samples", "4", "--length", "24", *options,
            ]
        )  # fmt: skip

    def refuses(self, *parts: str, options: tuple[str, ...] = (), **settings: object) -> None:
        """One line with the parts in it, status 2, and nothing on the disk is other than before."""
        before = everything_in(self.folder)
        result = self.prune(*options, **settings)
        assert result.status == 2
        assert not result.out
        [line] = result.err.splitlines()
        assert line.startswith("secateurs: ")
        assert all(part in line for part in parts), line
        assert everything_in(self.folder) == before


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    def run(arguments: list[str]) -> Result:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["secateurs", *arguments])
            try:
                cli.main()
                status: Any = 0
            except SystemExit as end:
                status = end.code or 0
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    place = Place(tmp_path, run)
    save(place.model, "llama")
    return place


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from secateurs.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# What it does.


def test_prune(place: Place) -> None:
    before = bytes_of(place.model)
    result = place.prune(
        "--pattern", "2:4", "--method", "sparsegpt:block=16", "--seed", "3", "--device", "cpu"
    )
    assert result.status == 0
    [line] = result.out.splitlines()
    assert line.startswith(f"{place.output}: 50.00% zeros in 21 layers, mean relative error 0.")
    assert "Traceback" not in result.err
    for name, weight in tensors_of(place.output).items():
        if "_proj" in name:
            assert ((weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    AutoModelForCausalLM.from_pretrained(place.output)
    settings = json.loads((place.output / "secateurs.json").read_text())["settings"]
    assert settings["method"] == {"name": "sparsegpt", "block": 16, "damping": 0.01}
    assert settings["calibration"]["samples"] == 4
    assert settings["calibration"]["length"] == 24
    assert settings["calibration"]["seed"] == 3
    assert settings["calibration"]["source"] == str(place.text)
    assert bytes_of(place.model) == before


def test_a_budget(place: Place) -> None:
    """What was chosen is said, and how far it is from what is the same for all."""
    result = place.prune("--budget", "120KB", "--method", "wanda")
    assert result.status == 0
    first, chosen, expected, bought = result.out.splitlines()
    assert first.startswith(f"{place.output}: ")
    assert "of rounding 0." in first
    assert chosen.startswith("chosen for each matrix: ")
    assert expected.startswith("expected error ")
    assert "best uniform choice" in expected
    assert bought.startswith("compressed, it takes at most 0.1")
    assert f" of 0.120 MB: secateurs compress {place.output}" in bought
    record = json.loads((place.output / "secateurs.json").read_text())
    assert record["settings"]["budget"] == 120_000
    assert "pattern" not in record["settings"]
    assert len(record["forms"]["forms"]) == 21
    assert "Chosen for each matrix" in (place.output / "README.md").read_text()
    assert place.run(["plot", str(place.output)]).status == 0
    small = place.folder / "small"
    assert place.run(["compress", str(place.output), "--output", str(small)]).status == 0
    assert sum(file.stat().st_size for file in small.glob("*.safetensors")) <= 120_000


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (["of 5.00 KB is below the least that this model can take, "], ["--budget", "5KB"]),
        (["of 5.00 MB holds the model as it is", "there is nothing to prune"], ["--budget", "5MB"]),
        (["leave pattern out"], ["--budget", "90KB", "--pattern", "50%"]),
        (["leave values out"], ["--bytes-per-weight", "0.4", "--values", "int4"]),
        (["leave the allocation uniform"], ["--bytes-per-weight", "0.4", "--allocation", "sensitivity"]),
        (["bytes-per-weight", "--help"], ["--bytes-per-weight", "some"]),
    ],
)
def test_budgets_that_are_refused(parts: list[str], options: list[str], place: Place) -> None:
    place.refuses(*parts, options=tuple(options))


def test_the_defaults_do(place: Place) -> None:
    """Only the model, the text and the output are needed."""
    place.text.write_text(TEXT * 8)
    result = place.run(
        ["prune", str(place.model), "--calibration", str(place.text), "--output", str(place.output)]
    )
    assert result.status == 0
    settings = json.loads((place.output / "secateurs.json").read_text())["settings"]
    assert settings["method"]["name"] == "sparsellm"
    assert settings["target"] == "dense"
    assert (settings["pattern"], settings["allocation"]) == ("50%", "uniform")
    assert settings["calibration"]["samples"] == 128
    assert settings["calibration"]["length"] == 64  # all the positions that the model has


def test_a_file_of_settings(place: Place) -> None:
    """It says what the command line does not, the model included; what both say, the command line decides."""
    file = place.folder / "run.yaml"
    file.write_text(
        f"model: {place.model}\noutput: {place.output}\ncalibration: {place.text}\n"
        'method: wanda\npattern: 2:4\nsamples: 4\nlength: 24\nallocation: {"*.mlp.*": 75%, "*": 50%}\n'
    )
    other = place.folder / "other"
    assert place.run(["prune", "--config", str(file)]).status == 0
    assert place.run(["prune", f"--config={file}", "--output", str(other), "--pattern", "50%"]).status == 0
    given = [
        json.loads((folder / "secateurs.json").read_text())["settings"] for folder in (place.output, other)
    ]
    assert [settings["pattern"] for settings in given] == ["2:4", "50%"]
    assert given[0]["allocation"] == given[1]["allocation"]
    assert given[0]["allocation"]["model.layers.0.mlp.up_proj"] == "75%"
    before = everything_in(place.folder)
    assert place.run(["prune", "--config", str(file)]).status == 0  # finished
    assert everything_in(place.folder) == before


def test_several_texts_and_what_the_model_writes(place: Place) -> None:
    """On the command line, and in a file as a list or as a table of shares."""
    text, file = str(place.text), place.folder / "run.yaml"
    sizes = ["--method", "wanda", "--samples", "4", "--length", "24", "--output"]
    model, several = str(place.model), ["--calibration", f"{text}=0.25", "self"]
    runs = [
        ["prune", model, *several, *sizes],
        ["prune", *several, model, *sizes],  # in the last place of many values, it is the model
        ["prune", "--config", str(file), *sizes],
        ["prune", "--config", str(file), *several, *sizes],
        ["prune", model, f"--calibration={text}=0.25", *sizes[:-1], "--calibration", "self", "--output"],
        ["prune", *several[:2], *sizes[:-1], "--calibration", "self", model, "--output"],
    ]
    file.write_text(f'model: "{model}"\ncalibration: {{"{text}": 0.25, self: 0.75}}\n')
    found = []
    for number, run in enumerate(runs):
        output = place.folder / f"out{number}"
        result = place.run([*run, str(output)])
        assert result.status == 0, result.err
        found.append(json.loads((output / "secateurs.json").read_text())["settings"]["calibration"])
    assert found == [found[0]] * len(runs)
    assert {name: source["samples"] for name, source in found[0]["source"].items()} == {text: 1, "self": 3}
    file.write_text(f"model: {model}\ncalibration: [{text}, self]\n")
    assert place.run([*runs[2], str(place.output)]).status == 0
    listed = json.loads((place.output / "secateurs.json").read_text())["settings"]["calibration"]["source"]
    assert [source["share"] for source in listed.values()] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read '"),
        ("patern: 70%", "there is no setting 'patern'; did you mean 'pattern'?"),
        ("samples: many", "'samples' is 'many': expected integer"),
        ("pattern: half", "'half' is not a pattern"),
        ("target: [a]", "expected layer, block, dense"),
    ],
)
def test_mistakes_in_a_file_of_settings(place: Place, content: str | None, message: str) -> None:
    file = place.folder / "run.yaml"
    if content is not None:
        file.write_text(content)
    place.refuses(message, options=("--config", str(file)))


def test_a_table_of_patterns(place: Place) -> None:
    table = place.folder / "table.json"
    table.write_text('{"*.mlp.*": "75%", "*.q_proj": 0.25}')
    assert place.prune("--allocation", str(table), "--method", "wanda").status == 0
    for name, weight in tensors_of(place.output).items():
        expected = 0.75 if ".mlp." in name else 0.25 if "q_proj" in name else 0.0
        assert (weight == 0).double().mean().item() == pytest.approx(expected, abs=1e-9)


def test_allocations_by_name(place: Place) -> None:
    for index, allocation in enumerate(("owl:level=layer,m=2,lambda=0.1", "sensitivity:tokens=24")):
        output = place.folder / f"out-{index}"
        options = (
            "--allocation",
            allocation,
            "--pattern",
            "60%",
            "--method",
            "wanda",
            "--output",
            str(output),
        )
        result = place.prune(*options)
        assert result.status == 0
        assert "survey of model.layers." in result.err
        settings = json.loads((output / "secateurs.json").read_text())["settings"]
        assert settings["pattern"] == "60%"
        assert settings["allocation"]["name"] == allocation.partition(":")[0]


def test_inspect_and_plot(place: Place) -> None:
    assert place.prune("--pattern", "2:4", "--effort", "best").status == 0
    result = place.run(["inspect", str(place.output), "--against", str(place.model)])
    assert result.status == 0
    assert "top 10% kept" in result.out
    assert f"{place.output}: 50.00% zeros in 21 layers" in result.out.replace("\n", "")
    result = place.run(["plot", str(place.output)])
    assert result.status == 0
    assert sorted(Path(line).name for line in result.out.splitlines()) == [
        "convergence.png",
        "convergence.svg",
        "descent.png",
        "descent.svg",
        "layers.png",
        "layers.svg",
    ]
    result = place.run(["plot", str(place.model)])
    assert result.status == 2
    assert "has no secateurs.json" in result.err


def test_repeated_it_says_the_same_and_changes_nothing(place: Place) -> None:
    first = place.prune()
    before = everything_in(place.folder)
    again = place.prune()
    assert again.status == 0
    assert again.out == first.out
    assert everything_in(place.folder) == before


def test_plan_says_what_a_run_takes_and_runs_nothing(place: Place) -> None:
    for file in place.model.glob("*.safetensors"):
        file.unlink()
    before = everything_in(place.folder)
    result = place.run(["plan", str(place.model), "--device", "h100", "--samples", "8", "--ranks", "2"])
    assert result.status == 0
    assert all(word in result.out for word in ("time: solve", "memory of the card", "of 80.0 GB", "disk"))
    assert everything_in(place.folder) == before
    refused = place.run(["plan", str(place.model), "--device", "tpu"])
    assert refused.status == 2
    assert "tpu" in refused.err
    assert "h100" in refused.err
    assert len(refused.err.splitlines()) == 1


def test_evaluate(place: Place) -> None:
    result = place.run(["eval", str(place.model), "--text", str(place.text), "--length", "32"])
    assert result.status == 0
    assert result.out.startswith(f"{place.text}: perplexity ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["prune", "eval", "demo", "secateurs demo"]),
        (["prune", "--help"], ["--pattern", "2:4", "sparsegpt:block=64", "Example: secateurs prune"]),
        (["eval", "--help"], ["--text", "--tasks", "Example: secateurs eval"]),
    ],
)
def test_help_teaches(place: Place, arguments: list[str], words: list[str]) -> None:
    result = place.run(arguments)
    assert result.status == 0
    assert all(word in result.out for word in words)


# Mistakes in what is asked for.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "gptq"), "unknown method 'gptq'; there are magnitude, wanda, sparsegpt, admm"),
        (("--method", "sparsegpt:blok=3"), "'sparsegpt' has no setting 'blok'"),
        (("--method", "sparsegpt:block=none"), "expected int"),
        (("--pattern", "half"), "'half' is not a pattern"),
        (("--pattern", "4:2"), "1 <= n < m"),
        (("--pattern", "0"), "outside (0, 1)"),
        (("--pattern", "100%"), "outside (0, 1)"),
        (("--pattern", "1.5"), "outside (0, 1)"),
        (("--pattern", "2:7"), "model.layers.0.self_attn.q_proj has 48 inputs"),
        (("--allocation", "missing.json"), "'missing.json' is missing"),
        (("--allocation", "owls"), "unknown allocation"),
        (("--allocation", "owl:level=head"), "block or layer, not 'head'"),
        (("--device", "toaster"), "'toaster' is no device"),
        (("--device", "meta"), "'meta' is no device"),
        (("--device", "cuda:99"), "there is no device 'cuda:99'"),
        (("--length", "65"), "length 65 is more than the 64 positions"),
        (("--length", "0"), "at least 1"),
        (("--samples", "0"), "at least 1"),
        (("--samples", "1000"), "1000 samples of 24 need 24001"),
        (("--batch-size", "0"), "batch_size"),
        (("--calibration", "missing.txt"), "missing.txt"),
        (("--calibration", "self", "self:warm=1"), "'self' has no setting 'warm'"),
        (("--calibration", "self=0.2", "other.txt=0.2"), "add up to 0.4: make it 1"),
        (("--calibration",), "calibration text is needed"),
        (("--calibration", "None"), "calibration text is needed"),
    ],
)
def test_mistakes_in_the_options(place: Place, options: tuple[str, ...], message: str) -> None:
    place.refuses(message, options=options)


def test_a_gpu_that_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    place.refuses("there is no device 'cuda'", "use cpu", options=("--device", "cuda"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["prune", "model"], ["--output", "see secateurs prune --help"]),
        (["prune", "model", "--output"], ["--output"]),
        (["prune", "model", "--output", "out", "--samples", "many"], ["--samples", "'many'"]),
        (["prune", "model", "--output", "out", "--sequential", "sideways"], ["'sideways'", "sublayer"]),
        (["prune", "model", "--output", "out", "--no-such-option", "1"], ["--no-such-option"]),
        (["prune", "model", "other", "--output", "out"], ["other"]),
        (["graft"], ["graft", "see secateurs --help"]),
        ([], ["prune", "demo"]),
    ],
)
def test_mistakes_in_the_command(place: Place, arguments: list[str], parts: list[str]) -> None:
    result = place.run(arguments)
    assert result.status == 2
    [line] = result.err.splitlines()
    assert line.startswith("secateurs: ")
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("arguments", [["prune", "model"], ["prune", "model", "--no", "1"], ["graft"]])
def test_what_boxes_are_drawn_with_is_not_said(
    place: Place, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """They are of other characters where standard output is not UTF-8."""
    said = set()
    for encoding in ("utf-8", "ascii"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            said.add(place.run(arguments).err)
    [line] = said
    assert not any(drawn in line for drawn in ("│", "─", "---"))


@pytest.mark.parametrize("text", ["", " \n\n\t"])
def test_empty_text(place: Place, text: str) -> None:
    place.text.write_text(text)
    place.refuses("text.txt' holds no text")


def test_too_little_text_says_how_much_there_is(place: Place) -> None:
    place.text.write_text(TEXT[:90])
    place.refuses("has 90 tokens, 4 samples of 24 need 97")


def test_too_few_tokens_for_iterations_are_found_before_the_work(place: Place) -> None:
    options = ("--samples", "2", "--length", "2", "--effort", "best")
    place.refuses("too few for SparseLLM's iterations", options=options)


def test_what_is_idle_without_text_is_said(place: Place) -> None:
    with pytest.warns(UserWarning, match="nothing comes of samples, length"):
        result = place.prune("--calibration", "None", "--method", "magnitude")
    assert result.status == 0


def test_a_second_run_says_that_there_is_one(place: Place) -> None:
    with output_lock(place.output):
        result = place.prune()
    assert result.status == 2
    assert result.err == (
        f"secateurs: another run is writing '{place.output}': wait for it or give another output folder\n"
    )
    assert place.prune("--method", "wanda").status == 0


def test_a_record_of_another_kind_is_not_plotted(place: Place) -> None:
    (place.model / "secateurs.json").write_text('{"steps": 3}')
    result = place.run(["plot", str(place.model)])
    assert result.status == 2
    assert "is not the record of a pruning run" in result.err


# Mistakes in the model.


def test_a_warning_is_one_line() -> None:
    warn = (
        "cli.VERBS['demo'] = cli.VERBS['demo']._replace(run=lambda settings: warnings.warn('it is\\nslow')); "
        "cli.main()"
    )
    command = [sys.executable, "-c", f"import warnings; from secateurs import cli; {warn}", "demo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "warning: it is slow\n")


def test_no_model(place: Place) -> None:
    place.refuses("no model folder at", model=place.folder / "missing")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ("config.json' is not readable JSON",)),
        ("[]", ("config.json' does not hold a JSON object",)),
        ("{}", ("config.json", "model_type")),
        ('{"model_type": "nonesuch"}', ("config.json", "nonesuch")),
        ('{"model_type": "llama", "hidden_size": "big"}', ("config.json", "hidden_size")),
        ('{"model_type": "llama", "hidden_size": 50, "num_attention_heads": 6}', ("config.json", "50")),
    ],
)
def test_a_broken_config(place: Place, content: str, parts: tuple[str, ...]) -> None:
    (place.model / "config.json").write_text(content)
    place.refuses(*parts)


def edit_config(place: Place, **changes: object) -> None:
    file = place.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_config_that_does_not_fit_the_weights(place: Place) -> None:
    edit_config(place, intermediate_size=96)
    place.refuses("has shape (80, 48)", "asks for (96, 48)")


def test_a_config_of_more_blocks_than_there_are(place: Place) -> None:
    edit_config(place, num_hidden_layers=4)
    place.refuses("holds no tensor 'model.layers.3.")


def test_quantised_weights(place: Place) -> None:
    edit_config(place, quantization_config={"quant_method": "fp8"})
    place.refuses("quantised weights")


def test_an_unsupported_architecture(place: Place) -> None:
    shutil.rmtree(place.model)
    decoders.save("hrm_text", place.model)
    place.refuses("unsupported architecture: 'hrm_text'", "stacks of blocks, where one is needed")


def test_pickled_weights(place: Place) -> None:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    place.refuses("'pytorch_model.bin' is pickled")


@pytest.mark.parametrize("keep", [0, 6, 100, -1])
def test_truncated_weights(place: Place, keep: int) -> None:
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    place.refuses("model.safetensors' is truncated or not a safetensors file")


def test_a_corrupted_header(place: Place) -> None:
    file = place.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\x00" * 32
    file.write_bytes(content)
    place.refuses("model.safetensors' is truncated or not a safetensors file")


@pytest.mark.parametrize("target", ["../x.safetensors", "/x.safetensors"])
def test_an_index_that_points_outside(place: Place, target: str) -> None:
    file = place.model / "model.safetensors"
    weights = dict.fromkeys(tensors_of(place.model), target)
    file.rename(place.folder / "x.safetensors")
    (place.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    place.refuses("points outside its folder", target)


def test_an_index_that_promises_too_much(place: Place) -> None:
    names = list(tensors_of(place.model))
    (place.model / "model.safetensors").rename(place.model / "one.safetensors")
    index = place.model / "model.safetensors.index.json"
    weight_map = dict.fromkeys(names, "one.safetensors")
    index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: "two.safetensors"}}))
    place.refuses("lists 'two.safetensors', which is missing")
    save_file({"other": torch.ones(1)}, place.model / "two.safetensors")
    place.refuses(f"promises '{names[0]}' in 'two.safetensors'")


def test_a_tensor_that_is_missing(place: Place) -> None:
    weights = tensors_of(place.model)
    del weights["model.layers.1.mlp.up_proj.weight"]
    rewrite(place.model, weights)
    place.refuses("holds no tensor 'model.layers.1.mlp.up_proj.weight'")


def test_no_tokenizer(place: Place) -> None:
    (place.model / "tokenizer.json").unlink()
    place.refuses("no tokenizer in")


def test_a_broken_tokenizer(place: Place) -> None:
    (place.model / "tokenizer.json").write_text("{")
    place.refuses("tokenizer in", "cannot be read")


# Mistakes in where the result is to go.


@pytest.fixture
def unread_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text may take minutes to read, and the model may have to write it."""
    monkeypatch.setattr(walk, "_calibration", lambda *_: pytest.fail("text was read first"))


@pytest.mark.usefixtures("unread_text")
def test_output_folders_that_are_taken(place: Place) -> None:
    place.refuses("is the model's own folder", options=("--output", str(place.model)))
    place.output.mkdir()
    (place.output / "notes.txt").write_text("mine")
    place.refuses("exists and is not this run's")


def test_another_run_has_the_output(place: Place, request: pytest.FixtureRequest) -> None:
    assert place.prune("--pattern", "60%").status == 0
    place.refuses("exists and is not this run's", options=("--pattern", "60%", "--samples", "3"))
    request.getfixturevalue("unread_text")
    place.refuses("exists and is not this run's", options=("--pattern", "70%"))


def test_a_disk_that_is_too_small(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    place.refuses("the output needs", "GB free")


# What shows only once the work has begun: the last line says it, and there is no output.


def fails(place: Place, *parts: str) -> None:
    result = place.prune("--method", "wanda")
    assert result.status == 2
    assert "Traceback" not in result.err
    *_, line = result.err.splitlines()
    assert line.startswith("secateurs: ")
    assert all(part in line for part in parts), line
    assert not place.output.exists()
    assert not list(place.folder.rglob("*.tmp"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"]
)
def test_weights_that_are_not_finite(place: Place, name: str, value: float) -> None:
    weights = tensors_of(place.model)
    weights[name][3, 5] = value
    rewrite(place.model, weights)
    fails(place, f"'{name}'", "NaN or Inf")


def test_activations_that_are_not_finite(place: Place) -> None:
    shutil.rmtree(place.model)
    save(place.model, "llama", torch.float16)
    weights = tensors_of(place.model)
    weights["model.layers.1.post_attention_layernorm.weight"].fill_(60_000)  # gate * up overflows float16
    rewrite(place.model, weights)
    fails(place, "inputs of 'model.layers.1.mlp.", "NaN or Inf on the calibration text")


def test_interrupted_it_says_how_to_go_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: Wanda, weight: Tensor, statistics: Statistics, pattern: Pattern) -> Solution:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Wanda, "solve", interrupt)
        result = place.prune("--method", "wanda")
    assert result.status == 130
    assert result.err.splitlines()[-1] == "interrupted: run the same command again"
    assert "Traceback" not in result.err
    assert not place.output.exists()
    assert place.prune("--method", "wanda").status == 0


# The same as processes.


def test_a_mistake_in_a_process(place: Place) -> None:
    (place.model / "config.json").write_text("{")
    result = command(
        "prune", str(place.model), "--calibration", str(place.text), "--output", str(place.output)
    )
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("secateurs: ")
    assert not place.output.exists()


@pytest.mark.parametrize("arguments", [["--version"], ["prune", "--help"]])
def test_a_reader_that_has_gone(arguments: list[str]) -> None:
    """As with `| head`."""
    ends = os.pipe()
    os.close(ends[0])
    run = [sys.executable, "-c", "from secateurs.cli import main; main()", *arguments]
    result = subprocess.run(run, stdout=ends[1], stderr=subprocess.PIPE, text=True)
    os.close(ends[1])
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_ctrl_c_in_a_process(place: Place) -> None:
    """The signal comes while a layer is being solved."""
    script = (
        "import os, signal, secateurs.cli\n"
        "from secateurs.pruning.solvers.wanda import Wanda\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored below a job in the background
        "Wanda.solve = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "secateurs.cli.main()"
    )
    result = subprocess.run(
        [
            sys.executable, "-c", script, "prune", str(place.model), "--calibration", str(place.text),
            "--output", str(place.output), "--samples", "2", "--method", "wanda",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 128 + signal.SIGINT
    assert "Traceback" not in result.stderr
    assert not place.output.exists()
