"""Where a model is looked for, and what of it is fetched."""

from pathlib import Path

import pytest

from secateurs.checkpoint import resolve


def test_a_model_that_is_nowhere_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
    for name in (tmp_path / "missing", "./missing", "../missing", "~/missing", "some/deep/missing"):
        with pytest.raises(ValueError, match=r"\Ano model folder at '"):
            resolve(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network\nand much more to say")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"\A'owner/model' is not a folder here .*\(no network\).*\Z"):
        resolve("owner/model")


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a file: give the model folder"):
        resolve(tmp_path / "model.safetensors")


def test_weights_that_are_never_read_are_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[dict[str, list[str]]] = []

    def fetch(name: str, **patterns: list[str]) -> str:
        asked.append(patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("owner/model") == tmp_path
    wanted = {
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.model",
        "README.md", "USE_POLICY.md", "LICENSE", "modeling_x.py", "1_Pooling/config.json", "figure.png",
        "additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "tekken.json",
        "quantised/scales.safetensors",
    }  # fmt: skip
    others = {
        "pytorch_model-00001-of-00002.bin", "consolidated.safetensors", "original/consolidated.00.pth",
        "original/params.json", "onnx/model.onnx", "onnx/model.onnx_data", "tf_model.h5", "model-q4.gguf",
        "flax_model.msgpack", "metal/model.bin", "unmerged/model.safetensors", "adapter_model.safetensors",
    }  # fmt: skip
    fetched = [set(filter_repo_objects(wanted | others, **patterns)) for patterns in asked]
    assert set.union(*fetched) == wanted
