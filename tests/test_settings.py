"""Settings: one definition for Python, the command line, files and docs."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from secateurs import cli
from secateurs.settings import OnDevice, documentation, options, read_config, read_yaml, takes

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


@dataclass(frozen=True)
class Trip(OnDevice):
    """A trip."""

    where: str
    """The place,
    by name."""

    days: int = 3
    """How long."""

    pace: float | None = None
    """Miles a day."""

    by: Literal["foot", "rail"] = "foot"
    """Means."""

    stops: tuple[str, ...] = ()
    """On the way."""

    home: bool = True
    """Whether to come back."""

    map: Path | None = None
    """A file."""

    def __post_init__(self) -> None:
        if self.days < 1:
            raise ValueError("a trip takes a day or more")


@takes(Trip)
def plan(who: str, *, settings: Trip, loud: bool = False) -> tuple[str, Trip, bool]:
    """Plan a trip."""
    return who, settings, loud


def test_settings_or_fields_or_both() -> None:
    trip = Trip("Rome", days=4)
    assert (
        plan("me", trip)
        == plan("me", settings=trip)
        == plan("me", where="Rome", days=4)
        == ("me", trip, False)
    )
    assert plan("me", "Rome", 4) == plan(who="me", where="Rome", days=4)  # in order, as before
    assert plan("me", trip, days=5, loud=True) == ("me", Trip("Rome", days=5), True)


def test_what_does_not_suit() -> None:
    with pytest.raises(ValueError, match="a day or more"):
        plan("me", where="Rome", days=0)
    with pytest.raises(TypeError, match="weeks"):
        plan("me", where="Rome", weeks=2)
    with pytest.raises(TypeError, match="where"):
        plan("me")
    with pytest.raises(TypeError, match="position"):
        plan("me", "Rome", 4, None, "foot", (), True, None, "cpu")


def test_docstrings_are_what_options_say() -> None:
    assert documentation(Trip)["where"] == "The place,\nby name."
    told = {option.name: option.help for option in options(Trip)}
    assert told["where"] == "The place, by name."
    assert told["device"] == "cpu, cuda, cuda:1. By default a GPU if there is one."
    assert "Miles a day." in str(plan.__doc__)


KNOWN = {option.field: option.type for option in options(Trip)}


def written(text: str, folder: Path) -> dict[str, object]:
    file = folder / "trip.yaml"
    file.write_text(text)
    return read_config(file, {**KNOWN, "pair": tuple[str, str]})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("pace: 1e-4", {"pace": 1e-4}),
        ("pace: 2", {"pace": 2.0}),
        ("pace:", {"pace": None}),
        ("pace: ~", {"pace": None}),
        ("where: 2:4", {"where": "2:4"}),
        ("where: no", {"where": "no"}),
        ("where: 70%", {"where": "70%"}),
        ("where: 0.7", {"where": "0.7"}),
        ("where: '12'", {"where": "12"}),
        ("days: 1_000", {"days": 1000}),
        ("days: 010", {"days": 10}),
        ("home: no", {"home": False}),
        ("home: Off", {"home": False}),
        ("home: true", {"home": True}),
        ("stops: [a, b]", {"stops": ("a", "b")}),
        ("stops: a", {"stops": ("a",)}),
        ("stops:\n- a", {"stops": ("a",)}),
        ("pair: [a, b]", {"pair": ("a", "b")}),
        ("by: rail", {"by": "rail"}),
        ("map: x/y.txt", {"map": Path("x/y.txt")}),
        ("device: cuda:1", {"device": "cuda:1"}),
        ('where: {"*.mlp.*": 70%}', {"where": '{"*.mlp.*": "70%"}'}),
    ],
)
def test_yaml_as_people_write_it(text: str, value: dict[str, object], tmp_path: Path) -> None:
    assert written(text, tmp_path) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wher: x", "there is no setting 'wher'; did you mean 'where'"),
        ("zzz: x", "there is no setting 'zzz'; there are "),
        ("days: many", "'days' is 'many': expected integer"),
        ("days: 2.5", "'days' is 2.5: expected integer"),
        ("days: true", "'days' is True: expected integer"),
        ("by: boat", "'by' is 'boat': expected foot, rail"),
        ("home: maybe", "'home' is 'maybe': expected switch"),
        ("pair: [a]", r"'pair' is \['a'\]: expected 2"),
        ("days: 1\ndays: 2", "'days' is there twice"),
        ("map: a\nMAP: b", "there is no setting 'MAP'"),
        ("- a", "does not hold settings by name"),
        ("", "does not hold settings by name"),
        ("a: [", "is not YAML"),
        ("a: !!python/object:os.system x", "is not YAML"),
    ],
)
def test_mistakes_in_yaml(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        written(text, tmp_path)
    assert "\n" not in str(raised.value)


@given(
    st.dictionaries(
        st.text("abcxyz_", min_size=1),
        st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.text("abc %:.-#")),
    )
)
def test_what_pyyaml_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object]
) -> None:
    file = tmp_path_factory.mktemp("yaml") / "a.yaml"
    file.write_text(yaml.safe_dump(content))
    assert read_yaml(file) == content


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_setting_is_documented(name: str) -> None:
    kind = cli.VERBS[name].settings
    assert documentation(kind).keys() >= {field.name for field in dataclasses.fields(kind)}
    assert str(kind.__doc__).count("Example: secateurs") >= (name != "demo")


def test_the_page_of_settings_is_current() -> None:
    """If it is not: python tools/settings_page.py."""
    import settings_page

    assert PAGE.read_text(encoding="utf-8") == settings_page.page()
