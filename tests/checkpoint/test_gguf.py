"""A .gguf file is a model like any other, and is the model that was written into it."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

pytest.importorskip("gguf")

import folders
import gguf_files
from secateurs.checkpoint import Checkpoint, resolve
from secateurs.checkpoint import gguf as unpacking
from secateurs.evaluation import evaluate, load_model
from secateurs.evaluation.inspect import inspect
from secateurs.pruning.walk import prune
from secateurs.runtime import compress
from secateurs.runtime.generate import generate
from secateurs.training.run import train


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "secateurs"


def ids() -> torch.Tensor:
    return torch.randint(3, len(gguf_files.TOKENS), (2, 24), generator=torch.Generator().manual_seed(0))


def check(file: Path, model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Whether the file is read as the model, to the last bit."""
    assert {tensor.dtype for tensor in folders.tensors_of(resolve(file)).values()} == {dtype}
    loaded = load_model(resolve(file), "cpu", torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        for name, weight in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], weight), name
        assert torch.equal(loaded(ids()).logits, model(ids()).logits)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_were_written(kind: str, tied: bool, tmp_path: Path) -> None:
    model = gguf_files.llama(tie_word_embeddings=tied)
    file = gguf_files.write(tmp_path / "tiny.gguf", model, kind)
    check(file, model, torch.float32 if kind == "F32" else torch.bfloat16)


def test_the_configuration_and_the_tokenizer(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama(), "Q8_0")
    folder = resolve(file)
    config = json.loads((folder / "config.json").read_text())
    for name in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "head_dim"):
        assert config[name] == getattr(gguf_files.CONFIG, name), name
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = ["<s>", "the", "Ġthe", "Ġ", "th", "o", "Ã", "¶"]
    assert tokenizer("the the thoö").input_ids == [gguf_files.TOKENS.index(word) for word in words]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>hi</s>"
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 2


def test_llama_3_scales_its_positions(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 32.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    model = gguf_files.llama(rope_parameters=scaled)
    plain = 50000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))[0]
    tensors = {"rope_freqs.weight": factors}
    file = gguf_files.write(tmp_path / "tiny.gguf", model, tensors=tensors)
    check(file, model)
    assert load_model(resolve(file), "cpu").config.rope_parameters == scaled
    odd = gguf_files.write(tmp_path / "odd.gguf", model, tensors={"rope_freqs.weight": factors.flip(0)})
    with pytest.raises(
        ValueError, match=r"\A'.*odd\.gguf' scales its rotary positions otherwise than Llama 3"
    ):
        resolve(odd)


def test_positions_that_are_scaled_evenly(tmp_path: Path) -> None:
    model = gguf_files.llama(rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 50000.0})
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    check(gguf_files.write(tmp_path / "tiny.gguf", model, metadata=metadata), model)


def completed(config: PretrainedConfig, **metadata: Any) -> Any:
    kind = config.model_type.removesuffix("_text").replace("_", "")
    named = {f"{kind}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    return unpacking._completed(config, {"general.architecture": kind, **named}, (), Path("x.gguf"))


def test_what_transformers_takes_for_granted_is_read() -> None:
    assert completed(Qwen3Config(), attention__key_length=64).head_dim == 64
    assert completed(Qwen3MoeConfig(), expert_feed_forward_length=1536).moe_intermediate_size == 1536
    # The published configurations of Gemma 2 and 3: 27B, and a smaller one of each.
    for kind, layers, hidden, heads, width, scalar in (
        (Gemma2Config, 46, 4608, 32, 128, 144),
        (Gemma2Config, 42, 3584, 16, 256, 256),
        (Gemma3TextConfig, 62, 5376, 32, 128, 168),
        (Gemma3TextConfig, 48, 3840, 16, 256, 256),
    ):
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        config = completed(kind(**sizes, head_dim=width), attention__key_length=width)
        assert config.query_pre_attn_scalar == scalar
    scaled = completed(Gemma3TextConfig(), rope__scaling__type="linear", rope__scaling__factor=8.0)
    assert scaled.rope_parameters["full_attention"]["factor"] == 8
    assert scaled.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert scaled.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_every_verb_takes_it(tmp_path: Path) -> None:
    model = gguf_files.llama()
    (tmp_path / "models").mkdir()
    file = gguf_files.write(tmp_path / "models" / "tiny.gguf", model, "F16")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    (figure,) = evaluate(file, text=text, length=64, device="cpu")
    assert figure.value > 1
    assert list(generate(file.parent, "the", tokens=4, device="cpu"))
    prune(file, output=out, method="wanda", calibration=ids(), pattern="70%")
    assert json.loads((out / "secateurs.json").read_text())["settings"]["model"] == str(file)
    assert ModelCard.load(out / "README.md").data.license == "apache-2.0"
    assert not list(out.glob("*.gguf"))
    assert inspect(out, against=file.parent).sparsity == pytest.approx(0.7, abs=0.01)
    compress(out, tmp_path / "small")
    train(file, text=text, output=tmp_path / "trained", steps=1, batch_size=2, length=32, device="cpu")
    AutoModelForCausalLM.from_pretrained(tmp_path / "trained")


def test_it_writes_its_own_calibration_text(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama(), "Q8_0")
    report = prune(
        file,
        output=tmp_path / "pruned",
        calibration="self",
        method="wanda",
        samples=4,
        length=16,
        device="cpu",
    )
    source = report.settings["calibration"]["source"]["self"]
    assert source == {"share": 1.0, "samples": 4, "temperature": 1.0, "conversations": 2}  # it has a template


def test_it_is_unpacked_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama())
    calls, unpack = [], unpacking._unpack

    def counted(*args: Any) -> None:
        calls.append(args)
        unpack(*args)

    monkeypatch.setattr(unpacking, "_unpack", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == len(calls) == 1
    assert len(found) == 3
    before = Checkpoint(found[0]).identity()
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {found[0].name}
    # Made anew it is the same model, for a run that goes on as well.
    shutil.rmtree(found[0])
    assert Checkpoint(resolve(file)).identity() == before
    # Another file of the name is another model.
    gguf_files.write(file, gguf_files.llama(rms_norm_eps=1e-6))
    assert resolve(file) != found[0]


def test_what_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(
            OSError, match=r"\A'.*tiny.gguf', unpacked, needs 0.02 GB, the disk of .* has 0.00 GB"
        ):
            resolve(file)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    with monkeypatch.context() as blocked:
        (tmp_path / "a file").touch()
        blocked.setattr(constants, "HF_HOME", str(tmp_path / "a file"))
        with pytest.raises(OSError, match=r"\A'.*tiny.gguf' cannot be unpacked into .*: set HF_HOME"):
            resolve(file)
    resolve(file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"architecture": "unheard-of"}, r"cannot be unpacked \(.*unheard-of is not supported"),
        ({"architecture": "t5"}, r"does not describe a causal language model \(t5\)|cannot be unpacked"),
        ({"metadata": {"split.count": 2}}, "is one of 2 parts of a model: join them first"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "scales its rotary positions by 'yarn'"),
        ({"without": "blk.1.ffn_up.weight"}, "missing_keys: model.layers.1.mlp.up_proj.weight"),
        (
            {"tensors": {"blk.0.attn_q.bias": torch.ones(64)}},
            "holds 'blk.0.attn_q.bias', for which LlamaForCausalLM",
        ),
        ({"metadata": {"llama.embedding_length": 32}}, r"\A"),
    ],
)
def test_what_would_be_another_model_is_refused(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama(), **how)
    with pytest.raises(ValueError, match=rf"\A'{file}' ") as caught:
        resolve(file)
    caught.match(message)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_nan_is_found(kind: str, tmp_path: Path) -> None:
    model = gguf_files.llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = torch.nan
    file = gguf_files.write(tmp_path / "tiny.gguf", model, kind)
    with pytest.raises(ValueError, match=r"holds NaN or Inf \('model.layers.1.input_layernorm.weight'\)\Z"):
        resolve(file)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_files_that_are_cut_off(share: float, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.llama())
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"\A'{file}' cannot be unpacked \([^\n]*\)\Z") as caught:
        resolve(file)
    assert "/model.gguf" not in str(caught.value)  # what it is called while it is unpacked says nothing


def test_which_file_a_folder_means(tmp_path: Path) -> None:
    folder, model = tmp_path / "models", gguf_files.llama()
    folder.mkdir()
    gguf_files.write(folder / "a.gguf", model)
    assert resolve(folder) == resolve(folder / "a.gguf")
    (folder / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds several models \('a\.gguf', 'b\.gguf'\): give one of these"):
        resolve(folder)
    model.save_pretrained(folder)
    assert resolve(folder) == folder
    with pytest.raises(ValueError, match=r"\Ano file at '"):
        resolve("models/missing.gguf")
    part = tmp_path / "big-00001-of-00003.gguf"
    part.touch()
    with pytest.raises(ValueError, match=r"is one of 3 parts of a model: join them first"):
        resolve(part)
