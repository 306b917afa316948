"""Every text decoder that transformers knows, through every verb; exceptions are listed, with reasons."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import decoders
from verbs import REFUSED, VERBS, WHOLE, Place, blocks_of, outcome_of

REFUSED_BY_PRUNE = {
    "blt": "stacks of blocks, where one is needed",
    "hrm_text": "stacks of blocks, where one is needed",
    "glm_moe_dsa": "they hand more than hidden states on",
    "hy_v4": "they hand more than hidden states on",
    "rwkv": "they hand more than hidden states on",
    "zaya": "they hand more than hidden states on",
    "qwen4_exp_text": "Cannot copy out of meta tensor",
}
"""Model -> a part of what the library says of it."""

SAMPLE = [
    *("llama", "gemma3_text", "gemma4_text", "granite", "cohere", "falcon", "bloom", "olmo2", "apertus"),
    *("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text"),
    *("qwen3_5_text", "nemotron_h", "falcon_h1", "lfm2", "jamba", "zamba2", "gemma3", "qwen3_vl_moe"),
]
"""Models of all kinds: the others go through all verbs with `pytest -m slow`, or for docs/models.md."""

IDLE = ("indexer", "router", "patcher", "e_score_correction_bias")
"""Parts of names of what chooses and is not differentiated."""


@pytest.mark.parametrize("name", decoders.NAMES)
def test_pruning(name: str, tmp_path: Path) -> None:
    """Block by block each is the whole model, and half of each of its matrices is zero."""
    outcome = outcome_of("prune, SparseGPT", Place(name, tmp_path))
    if name in REFUSED_BY_PRUNE:
        assert outcome.word == REFUSED
        assert REFUSED_BY_PRUNE[name] in outcome.note
    else:
        assert outcome.word == WHOLE, outcome


@pytest.mark.parametrize("name", decoders.sampled(SAMPLE))
def test_verbs(name: str, tmp_path: Path) -> None:
    """What a verb does is right, or it says in a line why it does not."""
    place = Place(name, tmp_path)
    for verb in VERBS:
        outcome = outcome_of(verb, place)
        assert "\n" not in outcome.note, f"{verb}: {outcome}"
        if name in SAMPLE and verb in ("prune, SparseGPT", "eval", "generate"):
            assert outcome.word == WHOLE, f"{verb}: {outcome}"


@pytest.mark.parametrize("name", decoders.NAMES)
def test_tiny_models_are_models(name: str, tmp_path: Path) -> None:
    """Transformers loads what it saved, and every matrix of a block has a part in the loss."""
    place, ids = Place(name, tmp_path), decoders.tokens()
    built, loaded = (
        model(input_ids=ids, use_cache=False).logits for model in (decoders.build(name), place.dense)
    )
    assert torch.allclose(built, loaded, atol=1e-5)
    functional.cross_entropy(loaded[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for parameter_name, parameter in blocks_of(place.dense).named_parameters():
        if parameter.dim() > 1 and not any(part in parameter_name for part in IDLE):
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.any(), parameter_name


def test_what_is_no_decoder_is_known() -> None:
    known = decoders.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert decoders.NO_DECODERS.keys() <= set(known)
    assert {name.partition("+")[0] for name in decoders.PARTICULAR} <= set(decoders.CONFIG_MAPPING)
    assert not decoders.NO_DECODERS.keys() & set(decoders.text_decoders())
