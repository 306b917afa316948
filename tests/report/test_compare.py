"""Two models beside each other: in Python, on the command line, and as a page."""

import sys
from pathlib import Path

import pytest

from secateurs import cli, compare
from secateurs.evaluation.answers import Answer
from secateurs.report.texts import END, beside


def test_python_and_the_command_line_say_the_same(
    outputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = compare(outputs["source"], outputs["wanda"], ["once <b>", "a b"], tokens=6, device="cpu")
    assert (found.a, found.b) == ("source", "wanda")
    assert [each.prompt for each in found.answers] == ["once <b>", "a b"]
    values = [value for each in found.answers for value in each.b.divergence or ()]
    assert found.divergence == pytest.approx(sum(values) / 12)
    page = tmp_path / "page.html"
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "secateurs", "compare", str(outputs["source"]), str(outputs["wanda"]), "--prompt", "once <b>",
            "--prompt=a b", "--tokens", "6", "--device", "cpu", "--output", str(page),
        ],
    )  # fmt: skip
    cli.main()
    said = capsys.readouterr().out
    assert str(found) in said
    assert all(each.prompt in said for each in found.answers)
    source = page.read_text()
    assert str(found) in source
    assert "once &lt;b&gt;" in source
    assert source.count(' nats" style=') == 12, "each token of the first answers has its divergence"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": ()}, "give a prompt"),
        ({"prompt": ("a", "")}, "a prompt is empty"),
        ({"tokens": 0}, "tokens are at least 1"),
        ({"output": "."}, "is a folder"),
        ({"output": Path(__file__) / "page.html"}, "cannot be made in"),
        ({"prompt": ["Who is \udcff?"]}, "the prompt is not UTF-8"),
        ({"device": "toaster"}, "toaster"),
    ],
)
def test_mistakes_are_one_line(outputs: dict[str, Path], settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compare(outputs["source"], outputs["wanda"], **settings)


def test_tokens_that_share_a_character_share_a_piece() -> None:
    """A character comes with the last of its tokens, and is as far off as the farthest of them."""
    first = Answer((1, 2, 3, 4), (" a", "", "é", ""))
    others = [Answer((1,), ("a",), (0.1, 2.0, 0.5, 0.25), 1), Answer((1,), ("a",), (0.0, 0.0, 3.0, 0.0), 1)]
    column, *rest = beside(["first", "one", "two"], "once", [first, *others]).columns
    assert [(part.text, part.tip) for part in column.parts] == [
        ("a", "one 0.100, two 0.000 nats"),
        ("é", "one 2.000, two 3.000 nats"),
        (END, "one 0.250, two 0.000 nats"),
    ]
    assert column.parts[1].shade > column.parts[2].shade > column.parts[0].shade
    assert [each.note.partition(";")[0] for each in rest] == ["parts at token 2"] * 2
