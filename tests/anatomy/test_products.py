"""Products with experts' matrices are seen wherever these lie in a parameter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from secateurs.anatomy import Matrix
from secateurs.anatomy.products import Watch


def seen(parameter: Tensor, weight: Tensor) -> list[tuple[str, int | None]]:
    """What a product with a weight (out, in) is said to be of."""
    told: list[tuple[str, int | None]] = []
    watch = Watch({"w": parameter}, lambda name, expert, _: told.append((name, expert)), lambda *_: None)
    with watch:
        functional.linear(torch.randn(2, weight.shape[1]), weight)
    return told


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(2, 6), st.booleans(), st.booleans())
def test_an_expert_is_found_in_a_dimension_of_its_own_or_below_others(
    experts: int, rows: int, columns: int, flat: bool, transposed: bool
) -> None:
    parts = [torch.randn(rows, columns) for _ in range(experts)]
    parameter = torch.cat(parts) if flat else torch.stack(parts)
    bias = torch.arange(experts * rows).view(experts, rows)
    for number, part in enumerate(parts):
        own = parameter.view(experts, rows, columns)[number]
        assert seen(parameter, own.T if transposed else own) == [("w", number)]
        shape = (columns, rows) if transposed else (rows, columns)
        matrix = Matrix(f"{number}.w", "w", shape, transposed=transposed, expert=number)
        expected = part.T if transposed else part
        assert torch.equal(matrix.of(parameter), expected)
        if not transposed:
            assert torch.equal(matrix.bias_of(bias.flatten() if flat else bias), bias[number])
        matrix.of(parameter).zero_()  # a view
        assert not own.any()


@pytest.mark.parametrize("part", [slice(1, 3), slice(0, 4), slice(3, 6)])
def test_other_rows_of_a_parameter_are_no_experts(part: slice) -> None:
    parameter = torch.randn(6, 5)
    assert seen(parameter, parameter[part]) == ([("w", 1)] if part.start == 3 else [])


def test_another_tensor_may_take_a_products_place() -> None:
    x, parameter = torch.randn(2, 5), torch.randn(3, 4, 5)
    products = x @ parameter.mT  # (experts, tokens, out)

    def doubled(name: str, expert: int | None, product: Tensor) -> Tensor | None:
        return 2 * product if expert == 1 else None

    with Watch({"w": parameter}, lambda *_: None, doubled):
        one, other = functional.linear(x, parameter[1]), functional.linear(x, parameter[2])
        together = torch.bmm(x.expand(3, -1, -1), parameter.mT)
    torch.testing.assert_close(one, 2 * products[1])
    torch.testing.assert_close(other, products[2])
    torch.testing.assert_close(together, torch.stack([products[0], 2 * products[1], products[2]]))
