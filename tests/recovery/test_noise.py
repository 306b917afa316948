"""What models do at random in training."""

from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

import decoders
from secateurs.recovery.steps import NOISE, without_noise

SAMPLE = ("opt", "gpt2", "dbrx", "mixtral", "qwen3_moe", "xglm")

OWN_WAY = ("phimoe",)
"""Whose routers draw experts in training, which is how they learn."""


@pytest.mark.parametrize("name", decoders.sampled(SAMPLE, OWN_WAY))
def test_in_training_models_give_what_they_give_in_evaluation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all noise on that their configurations know and stand."""
    config_of = decoders.config_of

    def noisy(name: str) -> PretrainedConfig:
        config = config_of(name)
        for one in (config, config.get_text_config(decoder=True)):
            for setting, value in list(vars(one).items()):
                known = any(part in setting for part in NOISE) and not isinstance(value, bool)
                if known and (value is None or isinstance(value, int | float)):
                    setattr(one, setting, 0.3)
        return config

    model: nn.Module = decoders.build(name)
    with monkeypatch.context() as patch, suppress(ValueError):  # DiffLlama refuses dropout
        patch.setattr(decoders, "config_of", noisy)
        model = decoders.build(name)
    ids = decoders.tokens(2, 16)
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids, use_cache=False).logits
        model.train()
        without_noise(model)
        for seed in (0, 1):
            torch.manual_seed(seed)
            torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, wanted)
