"""`all_finite` beside numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from secateurs.finite import all_finite


@given(arrays.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_it_finds_what_numpy_finds(values: np.ndarray) -> None:
    assert all_finite(torch.from_numpy(values)) == np.isfinite(values).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]
)
def test_one_bad_value_of_many_in_every_dtype(dtype: torch.dtype, bad: float) -> None:
    values = torch.linspace(-3, 3, 5001, dtype=torch.float64)
    values[0], values[1] = torch.finfo(dtype).max, torch.finfo(dtype).min
    assert all_finite(values.to(dtype))
    values[4321] = bad
    assert not all_finite(values.to(dtype))
