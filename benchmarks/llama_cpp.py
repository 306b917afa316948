"""llama.cpp's programs, as a rival: what it makes of a GGUF file, and how fast it and we decode.

They are best built on the machine, with GGML_NATIVE: llama-quantize, llama-imatrix and llama-bench in one
folder.
"""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import LlamaForCausalLM

from secateurs.runtime.generate import Pace, greedy_tokens

NEW_TOKENS = 64
"""Decoded one by one, after an empty prompt."""


def write_gguf(model: LlamaForCausalLM, file: Path, tokenizer: Any = None) -> Path:
    """A float16 file of a Llama, with the rows of q and k in llama.cpp's order.

    Args:
        model: whose weights are written.
        file: is made, or made anew.
        tokenizer: of bytes in pairs, split as GPT-2 splits; a file without one has its speed measured only.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():  # a tied head is no second parameter
        theirs = names.get_name(name, try_suffixes=(".weight",))
        kind = torch.float32 if weight.ndim == 1 else torch.float16
        stored = weight.detach().to(kind)
        if count := heads.get(name.split(".")[-2]):  # pairs that turn together lie side by side there
            halves = stored.view(count, 2, -1, stored.shape[1])
            stored = halves.transpose(1, 2).reshape(stored.shape)
        writer.add_tensor(theirs, stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[token in tokenizer.all_special_tokens] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


def quantised(file: Path, kind: str, llama: Path, cache: Path, matrix: Path | None = None) -> Path:
    """llama.cpp's file of that kind, with an importance matrix if there is one."""
    output = cache / f"{file.stem}-{kind}.gguf"
    if not output.exists():
        told = [] if matrix is None else ["--imatrix", matrix]
        command = [llama / "llama-quantize", "--allow-requantize", *told, file, output, kind]
        subprocess.run(command, check=True, capture_output=True)
    return output


def importance_matrix(gguf: Path, llama: Path, ids: torch.Tensor, tokenizer: Any, cache: Path) -> Path:
    output = cache / f"{gguf.stem}-imatrix.gguf"
    if not output.exists():
        text = cache / "calibration.txt"
        text.write_text("".join(tokenizer.batch_decode(ids)))
        chunks = ["-c", str(ids.shape[1]), "--chunks", str(len(ids))]
        command = [llama / "llama-imatrix", "-m", gguf, "-f", text, "-o", output, *chunks, "-t", "1"]
        subprocess.run(command, check=True, capture_output=True)
    return output


def bench_of_gguf(file: Path, llama: Path, threads: int, new: int, prompt: int = 0) -> dict[str, Any]:
    """What llama-bench tells of itself and of a run."""
    command = [llama / "llama-bench", "-m", file, "-p", str(prompt), "-n", str(new), "-r", "1"]
    command += ["-t", str(threads), "-o", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)[0]
    return told


def speed_of_gguf(file: Path, llama: Path, threads: int, prompt: int = 0) -> float:
    """Tokens a second: new ones, or with a prompt those of the prompt."""
    return float(bench_of_gguf(file, llama, threads, 0 if prompt else NEW_TOKENS, prompt)["avg_ts"])


def build_of(llama: Path, file: Path) -> dict[str, Any]:
    """Which llama.cpp it is, and on what."""
    told = bench_of_gguf(file, llama, 1, 1)
    return {name: told[name] for name in ("build_commit", "build_number", "cpu_info", "backends")}


@torch.inference_mode()
def speed_of_folder(model: Any, threads: int, prompt: int = 0) -> float:
    """The same of ours."""
    torch.set_num_threads(threads)
    if prompt:
        start = time.perf_counter()
        model(input_ids=torch.ones(1, prompt, dtype=torch.long), logits_to_keep=1)
        return prompt / (time.perf_counter() - start)
    pace = Pace()
    for _ in greedy_tokens(model, torch.ones(1, 1, dtype=torch.long), pace):
        if pace.tokens == NEW_TOKENS:
            break
    return pace.tokens_per_second
