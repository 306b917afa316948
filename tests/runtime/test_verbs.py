"""The verbs that run a model, through the command line where that is how they are used."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from small_models import pruned
from transformers import AutoModelForCausalLM

from characters import characters
from secateurs.evaluation.speed import bench, table
from secateurs.runtime import compress
from secateurs.runtime.generate import Pace, generate

COMMAND = [sys.executable, "-c", "from secateurs.cli import main; main()"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs") / "dense"
    pruned("llama").save_pretrained(folder)
    characters().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(dense: Path) -> Path:
    compress(dense, dense.parent / "compressed")
    return dense.parent / "compressed"


def test_generate_continues_as_transformers_does(dense: Path, compressed: Path) -> None:
    ids = characters()("once", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(dense)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    pace = Pace()
    continued = list(generate(compressed, "once", tokens=12, device="cpu", pace=pace))
    prompt, whole = (characters().decode(ids, skip_special_tokens=True) for ids in (ids[0], expected[0]))
    assert prompt + "".join(continued) == whole
    assert pace.tokens == 12
    assert pace.tokens_per_second > 0
    assert pace.memory_bytes > 0


def test_generate_shows_only_whole_characters(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Halves:
        """Two tokens to a character."""

        def __call__(self, prompt: str, return_tensors: str) -> "Halves":
            return self

        input_ids = torch.tensor([[5, 6]])

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "é" * (len(ids) // 2) + "\ufffd" * (len(ids) % 2)

        def convert_ids_to_tokens(self, token: int) -> str:
            return "half"

    monkeypatch.setattr("secateurs.runtime.generate.load_tokenizer", lambda folder: Halves())
    assert [piece for piece in generate(dense, "x", tokens=4, device="cpu") if piece] == ["é", "é"]


@pytest.mark.parametrize(("prompt", "tokens"), [("", 5), ("once", 0)])
def test_nothing_to_generate_is_refused(dense: Path, prompt: str, tokens: int) -> None:
    with pytest.raises(ValueError, match="nothing to generate"):
        generate(dense, prompt, tokens=tokens)


def test_more_tokens_than_positions_are_refused(dense: Path) -> None:
    positions = json.loads((dense / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(ValueError, match=f"made for {positions}: ask for fewer"):
        generate(dense, "once", tokens=positions, device="cpu")


def test_bench_finds_mistakes_before_it_measures(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model folder"):
        bench(dense, against=tmp_path / "none")


def test_bench_measures_both(
    dense: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads of a tiny model mostly wait for each other
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 120)
    costs = bench(compressed, against=dense, text=str(text), device="cpu")
    assert [cost.model for cost in costs] == [str(compressed), str(dense)]
    assert costs[0].file_bytes == (compressed / "model.safetensors").stat().st_size < costs[1].file_bytes
    assert costs[0].perplexity == pytest.approx(costs[1].perplexity, rel=1e-3)
    assert all(cost.tokens_per_second > 0 and cost.seconds_to_first_token > 0 for cost in costs)
    assert [len(line) for line in table(costs).splitlines()] == [len(table(costs).splitlines()[0])] * 6


def test_the_command_line(dense: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
        )

    done = run("compress", dense, "--output", tmp_path / "small")
    assert done.returncode == 0, done.stderr
    assert "15 layers compressed, 0 left dense" in done.stdout
    done = run("generate", tmp_path / "small", "--prompt", "once", "--tokens", 3, "--stats")
    assert done.stdout.startswith("once")
    assert "tokens per second" in done.stderr
    done = run("compress", tmp_path / "small", "--output", tmp_path / "smaller")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("is compressed already")


def test_serve_streams_to_an_http_client(compressed: Path) -> None:
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    port = 18_000 + int(time.time()) % 2000
    server = subprocess.Popen(
        [*COMMAND, "serve", str(compressed), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_CACHE": str(compressed.parent / "no-cache")},
    )
    try:
        question = {"model": str(compressed), "prompt": "once", "max_tokens": 5, "stream": True}
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/completions",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        models = f"http://localhost:{port}/v1/models"
        for _ in range(240):
            assert server.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    events = [line.decode() for line in reply if line.startswith(b"data: {")]
                with urllib.request.urlopen(models, timeout=60) as reply:
                    names = [model["id"] for model in json.load(reply)["data"]]
                break
            except urllib.error.URLError:
                time.sleep(0.25)
    finally:
        server.terminate()
        server.wait(30)
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert sum(bool(choice["text"]) for choice in choices) >= 2
    assert names == [str(compressed)]
    assert choices[-1]["finish_reason"] == "length"
