"""Image-text models are what transformers makes of them, vision tower and all; text goes through as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoTokenizer

import families
import folders
import wrappers
from secateurs.checkpoint import Checkpoint
from secateurs.checkpoint.config import read_config
from secateurs.checkpoint.names import skeleton_of
from secateurs.evaluation import evaluate, load_model
from secateurs.runtime import compress, decompress
from secateurs.runtime.generate import generate
from secateurs.training.model import sequence_length
from secateurs.training.weights import StoredWeights

every = pytest.mark.parametrize("name", wrappers.WRAPPERS)


@every
def test_a_folder_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    folder, ids = wrappers.save(tmp_path / "model", name, torch.bfloat16), families.tokens()
    expected = AutoModelForImageTextToText.from_pretrained(folder)
    skeleton, loaded = skeleton_of(Checkpoint(folder)), load_model(folder, "cpu")
    assert type(skeleton) is type(loaded) is type(expected)
    assert skeleton.state_dict().keys() == expected.state_dict().keys()
    assert loaded.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, expected(input_ids=ids).logits)


@every
def test_trained_weights_go_back_where_they_were(name: str, tmp_path: Path) -> None:
    if name == "qwen3_5_moe":
        pytest.skip("its files hold experts one by one")
    folder = wrappers.save(tmp_path / "model", name, torch.bfloat16)
    loaded = load_model(folder, "cpu", torch.float32)
    with torch.no_grad():
        loaded.get_output_embeddings().weight[5] += 1
    StoredWeights(loaded, Checkpoint(folder)).write(tmp_path, most=10**9)
    before, after = folders.tensors_of(folder), folders.tensors_of(tmp_path)
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == 1
    assert before[changed[0]].shape == loaded.get_output_embeddings().weight.shape


@every
def test_text_alone_is_measured_and_continued(name: str, tmp_path: Path) -> None:
    folder, text = wrappers.save(tmp_path / "model", name), tmp_path / "text.txt"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text.write_text("the quick brown fox jumps over the lazy dog " * 3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    (figure,) = evaluate(folder, text=text, length=32, bos="no", device="cpu")
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    assert figure.value == pytest.approx(float(loss.exp()), rel=1e-4)

    prompt = tokenizer("once upon", return_tensors="pt").input_ids
    whole = model.generate(prompt, max_new_tokens=12, do_sample=False)[0]
    begin, end = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt[0], whole))
    assert begin + "".join(generate(folder, "once upon", tokens=12, device="cpu")) == end


@every
def test_what_is_not_packed_stays_byte_for_byte(name: str, tmp_path: Path) -> None:
    folder, ids = wrappers.save(tmp_path / "model", name, zeros=0.7), families.tokens()
    compress(folder, tmp_path / "small")
    before, after = folders.tensors_of(folder), folders.tensors_of(tmp_path / "small")
    packed = {key for key in after if after[key].dtype == torch.uint8}
    assert packed
    assert all(torch.equal(before[key], after[key]) for key in after.keys() - packed)
    dense = AutoModelForImageTextToText.from_pretrained(folder)
    for loaded in (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "small"),
        load_model(tmp_path / "small", "cpu"),
    ):
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-4, rtol=1e-4
            )
    decompress(tmp_path / "small", tmp_path / "back")
    again = folders.tensors_of(tmp_path / "back")
    assert before.keys() == again.keys()
    assert all(torch.equal(before[key], again[key]) for key in before)
    for made in ("small", "back"):
        card = ModelCard.load(tmp_path / made / "README.md")
        assert card.data.pipeline_tag == "image-text-to-text"
        assert "AutoModelForImageTextToText.from_pretrained" in card.text
        assert "processor = AutoProcessor.from_pretrained" in card.text


def test_the_language_model_says_how_long_texts_may_be(tmp_path: Path) -> None:
    folder = wrappers.save(tmp_path, "gemma3")
    config = read_config(Checkpoint(folder))
    assert not hasattr(config, "max_position_embeddings")
    assert sequence_length(None, config) == 64
    with pytest.raises(ValueError, match="from 2 to 64 suit this model"):
        sequence_length(65, config)
    with pytest.raises(ValueError, match="made for 64: ask for fewer"):
        generate(folder, "once", tokens=64, device="cpu")


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_an_attention_that_is_not_installed(part: str | None, tmp_path: Path) -> None:
    folder, ids = wrappers.save(tmp_path, "llava"), families.tokens()
    expected = load_model(folder, "cpu")(input_ids=ids).logits
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part])["_attn_implementation"] = "flash_attention_2"
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_model(folder, "cpu")(input_ids=ids).logits, expected)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = wrappers.save(tmp_path, "qwen3_vl")
    tensors = folders.tensors_of(folder)
    del tensors["model.visual.blocks.0.attn.qkv.weight"]
    folders.rewrite(folder, tensors)
    with pytest.raises(ValueError, match=r"holds no tensor 'model\.visual\.blocks\.0\.attn\.qkv\.weight'\Z"):
        load_model(folder, "cpu")


@pytest.mark.parametrize("kind", ["pix2struct", "florence2", "clip"])
def test_what_reads_text_with_an_encoder_is_no_causal_model(kind: str, tmp_path: Path) -> None:
    folder = folders.save(tmp_path / "model", "llama")
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(
        ValueError, match=rf"\A'[^\n]*' does not describe a causal language model \({kind}\)\Z"
    ):
        load_model(folder, "cpu")


def test_files_with_a_wrappers_prefix(tmp_path: Path) -> None:
    folder, ids = wrappers.save(tmp_path / "model", "qwen3_vl"), families.tokens()
    expected = load_model(folder, "cpu")(input_ids=ids).logits
    tensors = folders.tensors_of(folder)
    folders.rewrite(folder, {f"module.{key}": tensor for key, tensor in tensors.items()})
    assert torch.equal(load_model(folder, "cpu")(input_ids=ids).logits, expected)
    shutil.rmtree(folder)
