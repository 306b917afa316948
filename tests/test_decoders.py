"""Every text decoder that transformers knows, through every verb; exceptions are listed, with reasons."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

import decoders
from verbs import VERBS, WHOLE, Place, blocks_of, outcome_of

EXCEPTIONS: dict[tuple[str, str], tuple[str, str]] = {}
"""(model, verb) -> what is expected instead of WHOLE, and a part of what the library says of it."""

IDLE = ("indexer", "router", "patcher", "e_score_correction_bias")
"""Parts of names of what chooses and is not differentiated."""


@pytest.mark.parametrize("name", decoders.NAMES)
def test_verbs(name: str, tmp_path: Path) -> None:
    place = Place(name, tmp_path)
    for verb in VERBS:
        outcome = outcome_of(verb, place)
        word, note = EXCEPTIONS.get((name, verb), (WHOLE, ""))
        assert outcome.word == word, f"{verb}: {outcome}"
        assert note in outcome.note, f"{verb}: {outcome}"


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
