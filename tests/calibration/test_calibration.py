"""Sources and shares, what is read and what the model writes, and runs that go on."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateurs.calibration.sequences
from characters import BEGIN, characters
from folders import bytes_of, rewrite, save, tensors_of
from secateurs import calibration_blocks, prune
from secateurs.calibration.sequences import CalibrationText, calibration_text, sha256_of
from secateurs.calibration.sources import counts_of, interleaved, sources_of
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config

LENGTH = 16


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save(tmp_path / "llama", "llama")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    """One of letters, one of digits."""
    for name, line in (("a.txt", "the quick brown fox "), ("b.txt", "31415926535897932384")):
        (tmp_path / name).write_text(line * 50)
    return str(tmp_path / "a.txt"), str(tmp_path / "b.txt")


def text_of(model: Path, calibration: Any, **how: Any) -> CalibrationText:
    checkpoint = Checkpoint(model)
    how = {"samples": 8, "length": LENGTH, **how}
    return calibration_text(calibration, checkpoint, read_config(checkpoint), torch.device("cpu"), **how)


@pytest.mark.parametrize(
    ("calibration", "shares"),
    [
        ("a.txt", {"a.txt": 1}),
        (["a.txt", "self"], {"a.txt": 0.5, "self": 0.5}),
        (("a.txt", Path("b.txt"), "self"), {"a.txt": 1 / 3, "b.txt": 1 / 3, "self": 1 / 3}),
        (["a.txt=0.25", "self"], {"a.txt": 0.25, "self": 0.75}),
        (["a.txt=25%", "b.txt", "self"], {"a.txt": 0.25, "b.txt": 0.375, "self": 0.375}),
        (["a=0.33", "b=0.33", "c=0.33"], {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        (["self:temperature=0.9", "a"], {"self:temperature=0.9": 0.5, "a": 0.5}),
        (["self:temperature=0.9=0.2", "a"], {"self:temperature=0.9": 0.2, "a": 0.8}),
        ({"a.txt": 0.5, "self": 0.5}, {"a.txt": 0.5, "self": 0.5}),
        ({"a.txt": None, "self": 0.1}, {"a.txt": 0.9, "self": 0.1}),
        (["name=x.txt", "self=0.5"], {"name=x.txt": 0.5, "self": 0.5}),
    ],
)
def test_shares(calibration: Any, shares: dict[str, float]) -> None:
    sources = sources_of(calibration)
    assert {str(source.text): source.share for source in sources} == pytest.approx(shares)


def test_what_is_there_is_no_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.5").write_text("some text")
    assert [(source.text, source.share) for source in sources_of("lr=0.5")] == [("lr=0.5", 1)]
    assert [(source.text, source.share) for source in sources_of(["lr=0.5=0.2", "b"])] == [
        ("lr=0.5", 0.2),
        ("b", 0.8),
    ]
    written, file = sources_of(["self", "./self"])
    assert written.writer
    assert file.writer is None
    assert sources_of(Path("self"))[0].writer is None
    assert sources_of("self:temperature=0.7")[0].writer.temperature == 0.7  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration text is needed"),
        (["a", "a=0.5"], "'a' is among the calibration texts twice"),
        (["a=0.7", "b=0.7"], "add up to 1.4: make it 1"),
        (["a=0.5", "b=0.2"], "add up to 0.7: make it 1"),
        (["a=1", "self"], "add up to 1, and 1 more have none: make it 1"),
        (["a=0", "b"], "share of 'a' is above 0 and up to 1, not 0"),
        (["a=nan", "b"], "not nan"),
        ({"a": "much"}, "not much"),
        ("self:heat=1", "'self' has no setting 'heat'; it has: temperature"),
        ("self:temperature=0", "above 0, not 0"),
        ("self:temperature=hot", "expected float"),
    ],
)
def test_mistakes_in_sources(calibration: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sources_of(calibration)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(1, 300))
def test_shares_are_kept_to_less_than_a_sequence(weights: list[int], samples: int) -> None:
    shares = {str(i): weight / sum(weights) for i, weight in enumerate(weights)}
    sources = sources_of(shares)
    if samples < 4 * sum(weights):
        return
    counts = counts_of(sources, samples)
    assert sum(counts) == samples
    assert all(abs(count - share * samples) < 1 for count, share in zip(counts, shares.values(), strict=True))


def test_a_source_that_would_give_nothing_is_said() -> None:
    with pytest.raises(ValueError, match="of 8 samples 'b' would give none"):
        counts_of(sources_of({"a": 0.99, "b": 0.01}), 8)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(5, 40))
def test_few_and_every_eighth_hold_all_sources(weights: list[int], times: int) -> None:
    """What descent holds out, and what an allocation measures on."""
    counts = [weight * times for weight in weights]
    order = interleaved(counts)
    assert Counter(order) == dict(enumerate(counts))
    for some in (order[1::8], order[: len(order) // 8]):
        for part, count in enumerate(counts):
            assert abs(some.count(part) - count / len(order) * len(some)) < 3


def test_one_text_gives_the_blocks_that_it_always_gave(llama: Path, texts: tuple[str, str]) -> None:
    text = text_of(llama, texts[0], seed=5)
    blocks = calibration_blocks(
        texts[0], AutoTokenizer.from_pretrained(llama), samples=8, length=LENGTH, seed=5
    )
    assert torch.equal(text.tokens(), blocks)
    assert text.record == {
        "source": texts[0],
        "field": "text",
        "bos": False,
        "samples": 8,
        "length": LENGTH,
        "seed": 5,
        "sha256": sha256_of(blocks),
    }
    assert torch.equal(text_of(llama, [texts[0]], seed=5).tokens(), blocks)
    assert torch.equal(text_of(llama, blocks).tokens(), blocks)


def kinds_of(tokens: Tensor) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for row in tokens.tolist():
        characters = "".join(map(chr, row))
        if row[0] == BEGIN:
            kinds["self"] += 1
        else:
            kinds["b" if characters.isdigit() else "a"] += 1
    return kinds


def test_sources_are_mixed_by_their_shares(llama: Path, texts: tuple[str, str]) -> None:
    mixture = {texts[0]: 0.25, texts[1]: 0.25, "self:temperature=0.5": 0.5}
    text = text_of(llama, mixture, samples=16)
    tokens = text.tokens()
    assert tokens.shape == (16, LENGTH)
    assert kinds_of(tokens) == {"a": 4, "b": 4, "self": 8}
    assert kinds_of(tokens[1::8]).total() == 2
    assert text.record["source"] == {
        texts[0]: {"share": 0.25, "samples": 4},
        texts[1]: {"share": 0.25, "samples": 4},
        "self:temperature=0.5": {"share": 0.5, "samples": 8, "temperature": 0.5, "conversations": 0},
    }
    assert torch.equal(text_of(llama, mixture, samples=16).tokens(), tokens)


def test_half_of_an_instruct_models_text_is_conversations(llama: Path) -> None:
    tokenizer = characters()
    tokenizer.chat_template = (
        "{% for message in messages %}<pad>{{ message['role'][:1] }}:{{ message['content'] }}</s>{% endfor %}"
    )
    tokenizer.save_pretrained(llama)
    text = text_of(llama, "self", samples=16)
    tokens = text.tokens()
    assert text.record["source"]["self"]["conversations"] == 8
    assert (tokens[:, 0] == BEGIN).sum() == 8
    assert [row[:3] for row in tokens.tolist() if row[0] != BEGIN] == [[0, ord("u"), ord(":")]] * 8
    assert set(tokens[1::8, 0].tolist()) == {0, BEGIN}  # what descent holds out has both


def run(model: Path, output: Path, **how: Any) -> Any:
    return prune(
        model,
        output=output,
        **{"calibration": "self", "method": "wanda", "samples": 8, "length": LENGTH, "device": "cpu", **how},
    )


def test_without_any_text(llama: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out")
    calibration = report.settings["calibration"]
    assert calibration["source"] == {
        "self": {"share": 1.0, "samples": 8, "temperature": 1.0, "conversations": 0}
    }
    tokens = text_of(llama, "self").tokens()
    assert calibration["sha256"] == sha256_of(tokens)
    given = run(llama, tmp_path / "given", calibration=tokens)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "given" / name).read_bytes()
    assert given.error == report.error
    assert ("Calibration", "8 x 16 tokens of self (8)") in report.facts


def test_an_interrupted_writer_goes_on(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps what it has written, and is not asked again."""
    module: Any = secateurs.calibration.sequences
    monkeypatch.setattr(module, "AT_ONCE", 2 * LENGTH)
    run(llama, tmp_path / "whole")
    real, calls = module.write, []

    def write(*args: Any, **how: Any) -> Tensor:
        calls.append(how["seed"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **how)

    monkeypatch.setattr(module, "write", write)
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path / "out")
    kept = sorted((tmp_path / "out.partial" / "progress").glob("written-*"))
    assert len(kept) == 2
    first = load_file(kept[0])["tokens"]
    run(llama, tmp_path / "out")
    assert len(calls) == 5
    assert calls[2] == calls[3]  # the one that was cut short
    assert len(set(calls)) == 4
    out, whole = bytes_of(tmp_path / "out"), bytes_of(tmp_path / "whole")
    assert out["model.safetensors"] == whole["model.safetensors"]
    records = [json.loads(folder["secateurs.json"])["settings"]["calibration"] for folder in (out, whole)]
    assert records[0] == records[1]
    assert first.shape == (2, LENGTH)


def test_a_run_that_goes_on_calibrates_on_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model would write something else by now."""
    run(llama, tmp_path / "whole")
    module: Any = secateurs.pruning.walk
    real = module.WorkFolder.write_block

    def fail(work: Any, index: int, *args: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        real(work, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module.WorkFolder, "write_block", fail)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out")
    monkeypatch.setattr(secateurs.calibration.sequences, "write", None)
    report = run(llama, tmp_path / "out")
    assert run(llama, tmp_path / "out").settings == report.settings  # finished: nothing is done
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_does_not_fit_says_so_beforehand(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Little:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    with pytest.raises(ValueError, match=r"whole model .* memory: .* give a text instead of 'self'"):
        run(llama, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_model_that_has_nothing_to_begin_with(llama: Path, tmp_path: Path) -> None:
    tokenizer = characters()
    tokenizer.bos_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": None}))
    with pytest.raises(ValueError, match="cannot write its own text"):
        run(llama, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_predictions_that_are_not_finite(llama: Path, tmp_path: Path) -> None:
    tensors = tensors_of(llama)
    rewrite(llama, tensors | {"lm_head.weight": tensors["lm_head.weight"] * 1e38 * 1e2})
    with pytest.raises((FloatingPointError, ValueError), match="NaN or Inf"):
        run(llama, tmp_path / "out")


def test_a_text_that_has_changed_is_another_run(llama: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    run(llama, tmp_path / "out", calibration=[texts[0], "self"])
    Path(texts[0]).write_text("another one entirely, " * 40)
    with pytest.raises(ValueError, match="not this run's"):
        run(llama, tmp_path / "out", calibration=[texts[0], "self"])


def test_descent_and_allocation_on_a_mixture(llama: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    report = run(
        llama,
        tmp_path / "out",
        calibration=[f"{texts[0]}=0.25", "self"],
        method="sparsellm:iterations=1",
        allocation="sensitivity",
        refine=1,
        pattern="50%",
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
