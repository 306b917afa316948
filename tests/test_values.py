import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.values import Values, parse_values

KINDS = [
    Values(bits, group, grid)
    for bits in (2, 3, 4, 8)
    for group in (32, 64)
    for grid in ("whole", "half")
    if bits < 8 or grid == "whole"
]


@pytest.mark.parametrize("values", KINDS, ids=str)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_codes_are_of_the_nearest_levels(values: Values, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = 3, 70
    weight = torch.randn(rows, columns, generator=generator)
    scales = torch.randn(rows, values.groups(columns), generator=generator).bfloat16()
    nearest = values.decode(values.encode(weight, scales), scales)
    levels = torch.tensor([values.lowest + values.step * code for code in range(2**values.bits)]).double()
    assert levels[-1] == values.highest
    for column in range(columns):
        lie = levels * scales[:, column // values.group, None].double()  # (rows, levels)
        best = (lie - weight[:, column, None].double()).abs().amin(1)
        gap = (nearest[:, column] - weight[:, column]).abs()
        assert (gap <= best * (1 + 1e-5) + 1e-6).all()


def test_levels() -> None:
    assert (Values(4).lowest, Values(4).highest) == (-8, 7)
    assert (Values(2, grid="half").lowest, Values(2, grid="half").highest) == (-3, 3)


@pytest.mark.parametrize("values", KINDS, ids=str)
def test_codes_are_found_again_in_bfloat16(values: Values) -> None:
    codes = torch.arange(2**values.bits, dtype=torch.uint8).repeat(2, 1)
    scales = torch.tensor([[0.0371], [-1.7e-5]]).bfloat16().expand(2, values.groups(codes.shape[1]))
    stored = values.decode(codes, scales).bfloat16()
    assert torch.equal(values.encode(stored, scales), codes)


def test_a_scale_of_zero() -> None:
    values = Values(4)
    scales = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert not values.decode(values.encode(torch.randn(1, 5), scales), scales).any()


def test_the_description_is_the_constructors() -> None:
    assert all(Values(**values.describe()) == values for values in KINDS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 5},
        {"bits": 4.0},
        {"bits": 4, "group": 48},
        {"bits": 4, "grid": "gap"},
        {"bits": 8, "grid": "half"},
    ],
)
def test_what_is_no_grid(wrong: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match="is"):
        Values(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("int4", Values(4)),
        ("INT8", Values(8)),
        ("int2", Values(2, grid="half")),
        ("int2:grid=whole", Values(2)),
        (" int3: group = 128, grid=half ", Values(3, 128, "half")),
    ],
)
def test_values_as_people_write_them(text: str, values: Values) -> None:
    assert parse_values(text) == values


@pytest.mark.parametrize("wrong", ["", "int", "int5", "int44", "4", "bf16"])
def test_what_is_no_values(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"unknown values .* there are int8, int4, int3, int2$"):
        parse_values(wrong)
