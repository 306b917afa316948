"""The plugin for axolotl, under axolotl where it is installed, else under a stand-in for its interface."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from test_callback import Shapes, losses_of, trainer
from test_loggers import Logger

from families import build

RECIPE = Path(__file__).parents[2] / "docs/recipes/axolotl.yaml"
NAME = "secateurs.integrations.axolotl"


class Plugin:
    """As axolotl 0.19's `integrations/base.py` has it, as far as the plugin here goes."""

    def get_input_args(self) -> str | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What axolotl makes of the name in its YAML."""
    if importlib.util.find_spec("axolotl") is None:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = Plugin  # type: ignore[attr-defined]
        monkeypatch.delitem(sys.modules, NAME, raising=False)
    [told] = yaml.safe_load(RECIPE.read_text())["plugins"]
    module, name = told.rsplit(".", 1)
    made = getattr(importlib.import_module(module), name)()
    yield made
    sys.modules.pop(NAME, None)


def settings_of(plugin: Any, **told: Any) -> Any:
    """Settings checked as axolotl does: its own schema and those of plugins in one class."""
    module, name = plugin.get_input_args().rsplit(".", 1)
    arguments = getattr(importlib.import_module(module), name)
    mixed = type("Input", (type("Own", (BaseModel,), {}), arguments), {})
    return SimpleNamespace(**mixed(**told).model_dump(exclude_none=True))


def test_the_trainer_that_axolotl_made_trains_sparsely_and_tells_loggers(plugin: Any, tmp_path: Path) -> None:
    shapes, logger = Shapes(), Logger()
    run = trainer(build("llama"), tmp_path, shapes, logger)
    plugin.post_trainer_create(settings_of(plugin, omission=0.5), run)
    run.train()
    assert shapes.channels == [40] * 4 + [48, 64, 72] + [80] * 3
    assert [entry["omission_rate"] for entry in logger.logs][:5] == pytest.approx([0.5] * 4 + [0.375])


def test_without_omission_it_is_plain_training(plugin: Any, tmp_path: Path) -> None:
    runs = [trainer(build("llama"), tmp_path) for _ in range(2)]
    plugin.post_trainer_create(settings_of(plugin, omission=0), runs[0])
    for run in runs:
        run.train()
    assert losses_of(runs[0]) == losses_of(runs[1])


def test_the_recipe_says_what_the_plugin_knows(plugin: Any) -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    own = {name: value for name, value in recipe.items() if name.startswith("omission")}
    known = vars(settings_of(plugin, **recipe))
    assert own.items() <= known.items()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"omission": 1.5}, "1.5"),
        ({"omission": "half"}, "auto"),
        ({"omission_schedule": "zigzag"}, "ladder"),
        ({"omission_probe_every": 0}, "at least 1, not 0"),
    ],
)
def test_mistakes_are_found_as_the_settings_are_read(plugin: Any, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings_of(plugin, **told)


@pytest.mark.skipif(importlib.util.find_spec("axolotl") is not None, reason="axolotl is installed")
def test_without_axolotl_it_is_one_clear_line() -> None:
    with pytest.raises(ImportError, match="plugin of axolotl, which is not installed: pip install axolotl"):
        importlib.import_module(NAME)
