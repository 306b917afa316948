"""What lies beside the weights travels whole, and nothing else does."""

from pathlib import Path

from secateurs.checkpoint import companions, copy_companions
from secateurs.checkpoint.companions import bytes_of_companions

KEPT = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "qwen.tiktoken", "chat_template.jinja", "preprocessor_config.json", "params.json",
    "sentence_bert_config.json",
    "additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja",
    "1_Pooling/config.json",
    "modules.json", "LICENSE", "LICENSE.txt", "License.md", "licence", "NOTICE", "Notice.txt", "COPYING",
    "USE_POLICY.md", "README.md", "model_card.pdf", "figures/loss.png", "assets/logo.svg",
    "modeling_mymodel.py", "configuration_mymodel.py", "code/deep/er/util.py", "wordlist.model",
)  # fmt: skip

LEFT = (
    "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json", "consolidated.00.pth", "model.pt", "last.ckpt", "tf_model.h5",
    "flax_model.msgpack", "flax_model.msgpack.index.json", "model.onnx", "model.onnx_data",
    "model-Q4_K_M.gguf",
    "Model-F16.GGUF", "weights.npz", "rust_model.ot", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt",
    "trainer_state.json", "training_args.bin", "secateurs.json", "plots/sparsity.png", ".gitattributes",
    ".git/config", ".cache/huggingface/download/x.lock", "__pycache__/modeling.cpython-311.pyc",
    "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "onnx/config.json",
    "onnx/model.onnx", "checkpoint-500/model.safetensors", "checkpoint-500/config.json",
    "global_step5/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py", "events.out.tfevents.17.host",
)  # fmt: skip


def make(folder: Path) -> Path:
    for name in (*KEPT, *LEFT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + b"\r\n\xff\x00")
    return folder


def test_a_folder_as_the_hub_has_them(tmp_path: Path) -> None:
    folder, target = make(tmp_path / "model"), tmp_path / "copy"
    target.mkdir()
    assert {path.as_posix() for path in companions(folder)} == set(KEPT)
    assert bytes_of_companions(folder) == sum((folder / name).stat().st_size for name in KEPT)
    (target / "config.json").write_text("written before")
    copy_companions(folder, target, replaced={"config.json", "README.md"})
    copied = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert copied == set(KEPT) - {"README.md"}
    assert (target / "config.json").read_text() == "written before"
    for name in copied - {"config.json"}:
        assert (target / name).read_bytes() == (folder / name).read_bytes()


def test_plots_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "evaluation.png").touch()
    assert companions(tmp_path) == [Path("plots/evaluation.png")]


def test_links_are_followed_and_come_out_as_files(tmp_path: Path) -> None:
    blobs, snapshot, target = tmp_path / "blobs", tmp_path / "snapshots" / "abc", tmp_path / "copy"
    for folder in (blobs, snapshot / "extra", target):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("config")
    (blobs / "2").write_text("template")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "extra" / "a.jinja").symlink_to("../../../blobs/2")
    (snapshot / "linked").symlink_to(snapshot / "extra")
    (snapshot / "around").symlink_to(snapshot)  # and for ever
    (snapshot / "gone.json").symlink_to("../../blobs/3")
    copy_companions(snapshot, target, replaced=())
    names = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    assert set(names) == {"config.json", "extra/a.jinja", "linked/a.jinja"}
    assert not any(path.is_symlink() for path in target.rglob("*"))
    assert names["linked/a.jinja"].read_text() == "template"
