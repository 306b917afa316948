"""What the library does with a tiny model of `decoders`, verb by verb, each held against transformers itself.

A check gives what the verb could do in a word, and raises AssertionError where what it did is wrong.
`tests/test_decoders.py` holds the words against what is expected, `tools/models_page.py` makes a page of
them.
"""

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import decoders
import secateurs
from characters import characters
from folders import tensors_of
from secateurs.blockwise import BlockwiseModel
from secateurs.runtime.generate import generate

WHOLE = "whole"
LOCAL = "local method"
"""Of SparseLLM: no block's MLP was found, so every matrix was pruned by itself."""
PART = "in part"
REFUSED = "refused"

LENGTH = 16
PROMPT = "once upon a time"


class Outcome(NamedTuple):
    """What a verb could do with a model."""

    word: str
    """WHOLE, PART, LOCAL, REFUSED, or how much of it: "80%"."""
    note: str = ""
    """What the library said."""


class Place:
    """A folder with a tiny model, a text, and what the verbs made of them so far."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.model = decoders.save(name, folder / "model")
        self.text = folder / "text.txt"
        generator = torch.Generator().manual_seed(0)
        codes = torch.randint(32, 127, (40 * LENGTH,), generator=generator)
        self.text.write_text("".join(chr(code) for code in codes.tolist()))

    def load(self, folder: Path) -> PreTrainedModel:
        """What transformers makes of a folder, all of whose tensors it finds."""
        auto: Any = AutoModelForImageTextToText if self.name in decoders.WRAPPERS else AutoModelForCausalLM
        # Expert by expert, as blocks run by themselves: other ways round otherwise.
        model, found = auto.from_pretrained(folder, output_loading_info=True)
        model.set_experts_implementation("eager")
        assert not any(found.values()), found
        for tensor in (*model.parameters(), *model.buffers()):
            # In a file they lie at any address, and by where its operands lie a product may round otherwise.
            tensor.data = tensor.data.clone()
        return model.eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As transformers reads it from the folder, which for some models is not as it was written."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.model)
        return tokenizer

    @cached_property
    def dense(self) -> PreTrainedModel:
        return self.load(self.model)

    @cached_property
    def pruned(self) -> Path:
        """The model with zeros: as `prune` left it, or where that refused, in half of each matrix."""
        if (self.folder / "sparsegpt").exists():
            return self.folder / "sparsegpt"
        model = self.load(self.model)
        with torch.no_grad():
            for parameter in blocks_of(model).parameters():
                if parameter.dim() > 1 and min(parameter.shape[-2:]) >= 16:
                    parameter[parameter.abs() < parameter.abs().median()] = 0
        model.save_pretrained(self.folder / "zeroed")
        characters().save_pretrained(self.folder / "zeroed")
        return self.folder / "zeroed"


def prune_sparsegpt(place: Place) -> Outcome:
    check_blocks(place)
    report = _prune(place, "sparsegpt", secateurs.SparseGPT())
    weights = sum(layer.weights for layer in report.layers)
    return Outcome(WHOLE, f"{weights / matrices_in(blocks_of(place.dense)):.0%}")


def prune_sparsellm(place: Place) -> Outcome:
    method = secateurs.SparseLLM(secateurs.SparseGPT(), iterations=1)
    report = _prune(place, "sparsellm", method, refine=1)
    if not report.alone:
        return Outcome(WHOLE)
    return Outcome(PART if report.mlps else LOCAL, "by the local solver: " + ", ".join(report.alone))


def evaluate(place: Place) -> Outcome:
    [measured] = secateurs.evaluate(place.model, text=[place.text], length=LENGTH, bos="no", device="cpu")
    ids = place.tokenizer(place.text.read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        logits = place.dense(input_ids=ids, use_cache=False).logits.float()
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert math.isclose(measured.value, losses.exp().item(), rel_tol=1e-5), measured
    return Outcome(WHOLE)


def compress(place: Place) -> Outcome:
    done = secateurs.compress(place.pruned, place.folder / "compressed")
    zeros = [tensor for tensor in tensors_of(place.pruned).values() if (tensor == 0).float().mean() > 0.4]
    packed = done.share * sum(tensor.nbytes for tensor in tensors_of(place.pruned).values())
    share = packed / sum(tensor.nbytes for tensor in zeros if tensor.dim() > 1)
    return Outcome(WHOLE if share > 0.999 else f"{share:.0%}", str(done))


def generate_compressed(place: Place) -> Outcome:
    folder = place.folder / "compressed"
    continued = generate(folder if folder.exists() else place.pruned, PROMPT, tokens=8, device="cpu")
    ids = place.tokenizer(PROMPT, return_tensors="pt").input_ids
    [expected] = place.load(place.pruned).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    prompt, text = (place.tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0], expected))
    assert prompt + "".join(continued) == text, "other tokens than transformers gives for the dense folder"
    return Outcome(WHOLE if folder.exists() else "dense")


def train(place: Place) -> Outcome:
    report = secateurs.train(
        place.model,
        text=place.text,
        output=place.folder / "trained",
        length=LENGTH,
        batch_size=4,
        steps=2,
        schedule="constant",
        device="cpu",
    )
    assert math.isfinite(report.train_loss)
    assert report.flops is not None
    assert report.dense_flops is not None
    assert report.whole or report.flops < report.dense_flops
    before, after = place.dense.state_dict(), place.load(place.folder / "trained").state_dict()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items()), "nothing moved"
    return Outcome(PART if report.whole else WHOLE, report.whole or "")


VERBS: dict[str, Callable[[Place], Outcome]] = {
    "prune, SparseGPT": prune_sparsegpt,
    "prune, SparseLLM": prune_sparsellm,
    "eval": evaluate,
    "compress": compress,
    "generate": generate_compressed,
    "train (SAT)": train,
}
"""In the order in which they are to be run: some go on with what others made."""


def outcome_of(verb: str, place: Place) -> Outcome:
    """What a verb could do; refusals are an outcome too."""
    try:
        return VERBS[verb](place)
    except ValueError as error:
        return Outcome(REFUSED, str(error))


def check_blocks(place: Place) -> None:
    """Block by block, hidden states are those of the whole model, to the bit, in every sequence."""
    ids, whole = decoders.tokens(4, LENGTH), place.dense
    model = BlockwiseModel(secateurs.Checkpoint(place.model), torch.device("cpu"))
    stream = model.embed(ids, batch_size=2)
    assert len(stream) == 2
    expected = [states_of(whole, ids[batch.at[0] : batch.at[-1] + 1]) for batch in stream]
    for batch, (first, *_) in zip(stream, expected, strict=True):
        assert torch.equal(batch.states, first), "what the first block reads"
    for index in range(len(model.blocks)):
        with model.block(index):
            for batch, (_, *results) in zip(stream, expected, strict=True):
                model.push(index, batch)
                assert torch.equal(batch.states, results[index]), f"block {index}"


def states_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """The first block's input, and every block's output, when the whole model reads (batch, length) ids."""
    states: list[Tensor] = []
    blocks = blocks_of(model)

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple | list) else output)

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in blocks]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: of the lists of modules in it the one with most weights."""
    # Where the head is called decoder, that is what get_decoder gives.
    for part in (model.get_decoder(), model):
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        if lists:
            return max(lists, key=matrices_in)
    raise AssertionError(f"{type(model).__name__} has no blocks")


def matrices_in(module: nn.Module) -> int:
    """Weights in a module's matrices, those of experts among them."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


def _prune(place: Place, name: str, method: Any, **settings: Any) -> secateurs.Report:
    """Prune half of the weights, and see to it that they are the output's only zeros and its only changes."""
    output = place.folder / name
    report = secateurs.prune(
        place.model,
        output=output,
        method=method,
        pattern="50%",
        calibration=place.text,
        samples=8,
        length=LENGTH,
        device="cpu",
        **settings,
    )
    stored, written = tensors_of(place.model), tensors_of(output)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in written.items()
    }
    before, after = place.dense.state_dict(), place.load(output).state_dict()
    touched = set()
    for layer in report.layers:
        key, matrix = matrix_of(after, layer)
        assert matrix.numel() == layer.weights, layer.name
        assert int((matrix == 0).sum()) == layer.weights // 2, layer.name
        assert layer.sparsity == 0.5
        touched |= {key, key.removesuffix("weight") + "bias"}
    for key, tensor in before.items():
        assert key in touched or torch.equal(tensor, after[key]), key
    return report


def matrix_of(tensors: dict[str, Tensor], layer: secateurs.LayerReport) -> tuple[str, Tensor]:
    """A reported matrix: a layer's weight, or the part of one expert; and what it lies in."""
    for name in (f"{layer.name}.weight", layer.name):
        if name in tensors:
            return name, tensors[name]
    experts, expert, leaf = layer.name.rsplit(".", 2)
    # Experts may be a dimension of their own or not: one lies behind the other.
    parts = tensors[f"{experts}.{leaf}"].reshape(-1, layer.weights)
    return f"{experts}.{leaf}", parts[int(expert)]
