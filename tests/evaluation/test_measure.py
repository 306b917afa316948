import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import families
from characters import characters
from secateurs import Checkpoint
from secateurs.evaluation import evaluate, load_model, perplexity
from secateurs.evaluation.measured import read_measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    families.build("llama", torch.bfloat16).save_pretrained(path)
    characters().save_pretrained(path)
    return path


def test_each_text_has_its_figure(folder: Path, tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("the quick brown fox " * 10)
    texts[1].write_text("jumps over the lazy dog " * 20)
    for figure, text in zip(evaluate(folder, text=texts, length=30, device="cpu"), texts, strict=True):
        ids = torch.tensor([ord(character) for character in text.read_text()])
        expected = perplexity(families.build("llama", torch.bfloat16), ids, length=30)
        assert (figure.on, figure.metric) == (str(text), "perplexity")
        assert figure.value == pytest.approx(expected, rel=1e-6)
        assert str(figure).startswith(f"{text}: perplexity {expected:.4f} (")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match=r"\Ano model folder at '.*missing'\Z"):
            load_model(missing)


def test_the_dtype_is_the_stored_one(folder: Path) -> None:
    model = load_model(folder, "cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training


def test_nothing_to_measure_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="give texts or tasks"):
        next(evaluate(folder))


def test_a_model_that_lacks_a_weight_is_not_given_a_random_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds no tensor 'model.layers.1.mlp.down_proj.weight'"):
        load_model(tmp_path / "broken", "cpu")


def test_figures_go_into_a_folder_that_reports_are_made_of(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc abc " * 20)
    found = list(evaluate(folder, text=[text], length=8, output=tmp_path / "deep" / "figures"))
    [row] = read_measured(tmp_path / "deep" / "figures")
    assert row.name == str(folder)
    assert row.figures == {str(text): {"perplexity": found[0].value}}
    assert row.bytes == Checkpoint(folder).tensor_bytes
    told = json.loads((tmp_path / "deep" / "figures" / "secateurs.json").read_text())["settings"]
    assert (told["text"], told["length"], told["bos"], told["limit"]) == ([str(text)], 8, "no", None)
    with pytest.raises(ValueError, match="lies in the model's own folder"):
        next(evaluate(folder, text=["not read"], output=folder / "figures"))
    with pytest.raises(ValueError, match="exists: give another output folder"):
        list(evaluate(folder, text=[text], output=tmp_path / "deep" / "figures"))
