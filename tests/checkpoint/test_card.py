"""The card of a written folder: metadata that the hub reads, and nothing of whoever wrote it."""

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from secateurs.checkpoint.card import base_model, write_card

ORIGINAL = """---
license: llama3.2
license_link: LICENSE.txt
language:
- en
- de
extra_gated_prompt: "agree to this"
extra_gated_fields:
  Affiliation: text
tags:
- facebook
base_model: meta-llama/Llama-3.2-1B
---

# Llama

It can | say --- things.
"""


def written(
    tmp_path: Path, readme: str | bytes | None, name: str | None = None, config: str = "{}"
) -> ModelCard:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(config)
    if readme is not None:
        (source / "README.md").write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    write_card(
        target,
        source,
        name or str(source),
        title="pruned to 50%",
        facts=[("method", "sparsellm | 2:4"), ("calibration", str(tmp_path / "secret" / "text.txt"))],
        usage="import secateurs",
        tags=["pruned", "secateurs"],
    )
    assert str(tmp_path) not in (target / "README.md").read_text()
    return ModelCard.load(target / "README.md")


def test_metadata_is_carried_over_and_the_text_follows(tmp_path: Path) -> None:
    card = written(tmp_path, ORIGINAL)
    assert card.data.to_dict() == {
        "base_model": "meta-llama/Llama-3.2-1B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["secateurs", "pruned"],
        "license": "llama3.2",
        "license_link": "LICENSE.txt",
        "language": ["en", "de"],
    }
    assert "# Llama-3.2-1B, pruned to 50%" in card.text
    assert "| method | sparsellm \\| 2:4 |" in card.text
    assert "| calibration | text.txt |" in card.text
    assert "import secateurs\nfrom transformers import" in card.text
    assert card.text.rstrip().endswith(ModelCard(ORIGINAL).text.strip())


@pytest.mark.parametrize(
    "readme",
    [
        None,
        "",
        "licence: llama3",
        "# Only text\n---\nand a line",
        "---\nlicense: [unclosed\n---\ntext",
        "---\n- a\n- list\n---\ntext",
        "---\nlicense: 3\nlanguage: {}\nbase_model: [1]\n---\ntext",
        "---\nlicense: mit\nmodel-index: broken\n---\ntext",
        "---\nlicense: mit",
        b"---\nlicense: mit\n---\n\xff\xfe caf\xe9",
        "---\r\nlicense: mit\r\n---\r\ntext",
    ],
)
def test_cards_as_people_write_them(readme: str | bytes | None, tmp_path: Path) -> None:
    card = written(tmp_path, readme)
    assert card.data.library_name == "transformers"
    assert yaml.safe_load(card.data.to_yaml()) == card.data.to_dict()
    assert card.data.get("base_model") is None
    assert "Model, pruned to 50%" in card.text
    if isinstance(readme, str) and "text" in readme:
        assert "text" in card.text.partition("follows")[2]


@pytest.mark.parametrize(
    ("name", "stated", "config", "expected"),
    [
        ("owner/model", "other/base", '{"_name_or_path": "third/base"}', "owner/model"),
        (None, "other/base", '{"_name_or_path": "third/base"}', "other/base"),
        (None, ["other/base"], "{}", "other/base"),
        (None, ["a/merge", "of/two"], '{"_name_or_path": "third/base"}', "third/base"),
        (None, None, '{"_name_or_path": "third/base"}', "third/base"),
        (None, "/home/me/model", '{"_name_or_path": "../model"}', None),
        (None, "a/b/c", '{"_name_or_path": "out/checkpoint-500"}', None),
        (None, None, '{"_name_or_path": "models/llama"}', None),
        (None, None, '{"_name_or_path": 7}', None),
        (None, None, "{}", None),
    ],
)
def test_what_it_was_made_from(
    name: str | None, stated: object, config: str, expected: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert base_model(tmp_path, name or str(tmp_path), {"base_model": stated}) == expected


def test_the_hubs_cache_knows_names(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--model-1.5" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert base_model(snapshot, str(snapshot), {}) == "owner/model-1.5"


def test_a_card_of_a_card(tmp_path: Path) -> None:
    first = written(tmp_path, ORIGINAL)
    (tmp_path / "again").mkdir()
    second = written(tmp_path / "again", str(first))
    assert isinstance(second.data, ModelCardData)
    assert second.data.to_dict() == first.data.to_dict()
    assert second.text.count("pruned to 50%") == 2
