"""Output folders to report on, as the verbs leave them: some made by them, some by their records' format."""

import json
import shutil
from pathlib import Path

import pytest

from families import tokens
from folders import save
from secateurs import prune
from secateurs.evaluation.measured import Measured, write_measured

RUDE = "x<b>&\"'"
"""A name that is HTML."""


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by what they hold."""
    folder = tmp_path_factory.mktemp("outputs")
    source = save(folder / "source", "llama")
    found = {"source": source}
    for method in ("magnitude", "wanda"):
        found[method] = prune(
            source, output=folder / method, calibration=tokens(), method=method, pattern="60%"
        ).output
    found["sparsellm"] = folder / RUDE
    shutil.copytree(found["wanda"], found["sparsellm"])
    _amend(
        found["sparsellm"],
        mlps=[
            {
                "name": f"model.layers.{block}",
                "iterates": [
                    {
                        "objective": 0.5 / i if i else None,
                        "terms": {"gate": 0.2 / i, "output": 0.1} if i else {},
                        "held_out": 0.3 / (i + 1),
                    }
                    for i in range(3)
                ],
                "kept": 2,
            }
            for block in range(2)
        ],
        refinements=[{"name": f"model.layers.{block}", "before": 0.2, "after": 0.1} for block in range(2)],
    )
    found["trained"] = folder / "trained"
    found["trained"].mkdir()
    record = {
        "settings": {
            "model": str(source), "text": RUDE, "chat": None, "omission": 0.5, "schedule": "ladder",
            "lora": None,
        },
        "versions": {"secateurs": "0.1.0"},
        "seconds": 2.0, "steps": 4, "tokens": 400, "peak_memory_bytes": 10**8, "flops": 8e9,
        "dense_flops": 1e10, "train_loss": 2.5, "validation_loss": 2.75,
        "history": [
            {"step": step, "loss": 4.0 - step / 4, "omission_rate": 0.5 * (step < 3), "seconds": step / 2,
             "tokens": 100 * step, "speedup_by_flops": 1.5 - step / 16}
            | {f"{units}_kept/{block}": 0.5 + 0.5 * (step > 2) for units in ("heads", "channels")
               for block in range(2) if step in (1, 3)}
            for step in range(1, 5)
        ],
    }  # fmt: skip
    (found["trained"] / "secateurs.json").write_text(json.dumps(record))
    found["measured"] = folder / "measured"
    found["measured"].mkdir()
    rows = [
        Measured("dense", 10**7, {"novel.txt": {"perplexity": 20.0}}),
        *(
            Measured(
                f"{method} {pattern}",
                int(10**7 * size),
                {"novel.txt": {"perplexity": 20 / size, "divergence": 1 - size}},
                method=method,
                pattern=pattern,
            )
            for method in ("admm", "wanda")
            for pattern, size in (("50%", 0.6), ("2:4", 0.5))
        ),
        Measured("wanda 99%", method="wanda", pattern="99%", error="it <i>failed</i>"),
    ]
    write_measured(found["measured"], rows, {"versions": {"secateurs": "0.1.0"}})
    found["profile"] = folder / "profile"
    found["profile"].mkdir()
    numbers = {"barely_active": 0.9, "quiet": 0.1, "half_keeps": 0.8, "means": [1.0, 1.0]}
    profile = {
        "settings": {"model": str(source), "text": "novel.txt", "windows": 2, "length": 8},
        "blocks": [{"heads": None, "channels": numbers}, {"heads": numbers, "channels": numbers}],
    }
    (found["profile"] / "profile.json").write_text(json.dumps(profile))
    return found


def _amend(folder: Path, **entries: object) -> None:
    file = folder / "secateurs.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
