"""What matrices become within a budget: bytes against the packed format's, choices against uniform ones."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateurs.pruning.allocation.fitting import choose_forms
from secateurs.pruning.allocation.forms import AS_STORED, FORMS, Choice, Form
from secateurs.pruning.allocation.room import Parameter, Room
from secateurs.pruning.block.rounding import within
from secateurs.runtime.format import layout_of, pack
from secateurs.values import Values


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_packed_matrix_takes_more_than_its_form_says(data: Any) -> None:
    """Whatever the mask prefers: here also some of the columns, or some of the rows."""
    form = data.draw(st.sampled_from([form for form in FORMS if form != AS_STORED]))
    rows, columns = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 400))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.rand(rows, columns, generator=generator)
    leaning = data.draw(st.sampled_from(["none", "columns", "rows"]))
    if leaning == "columns":
        scores += 2 * (torch.arange(columns) % 128 < 64)
    elif leaning == "rows":
        scores += 2 * (torch.arange(rows)[:, None] % 2)
    pattern = form.pattern
    assert pattern is not None
    kept, grid = pattern.keep(scores), None
    if form.values is None:
        weight = torch.randn(rows, columns, generator=generator).bfloat16() * kept
    else:
        values = form.values
        codes = torch.randint(0, 2**values.bits, (rows, columns), generator=generator).to(torch.uint8)
        scales = (torch.rand(rows, values.groups(columns), generator=generator) + 0.5).bfloat16()
        weight, grid = values.decode(codes, scales).bfloat16(), (values, scales)
        if form.zeros:
            fitting = within(kept, weight, values, form.masked_bytes((rows, columns)))
            assert not (fitting & ~kept).any()
            weight *= fitting
    packed, layout = pack(weight, grid)
    assert layout == layout_of(weight, grid)
    assert (layout.codes is None) == (form.values is None)
    assert packed.nbytes <= form.bytes((rows, columns), torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_chance_costs_few_weights(bits: Any) -> None:
    """Of a mask that prefers nothing next to none is taken."""
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    form = Form(0.5, Values(bits, 64, "half"))
    assert form.pattern is not None
    kept = form.pattern.keep(weight.abs())
    assert form.values is not None
    fitting = within(kept, weight, form.values, form.masked_bytes((256, 1024)))
    assert int(fitting.sum()) >= 0.999 * int(kept.sum())
    # Those that go are the smallest.
    assert weight[kept & ~fitting].abs().sum() <= weight[kept].abs().sort().values[:200].sum()


def rooms(data: Any) -> tuple[Room, list[list[float]]]:
    parameters = tuple(
        Parameter(
            tuple(f"{i}.{j}" for j in range(data.draw(st.integers(1, 3)))),
            (data.draw(st.integers(1, 20)) * 16, data.draw(st.sampled_from([64, 96, 256]))),
            data.draw(st.sampled_from([torch.bfloat16, torch.float32])),
            data.draw(st.booleans()),
        )
        for i in range(data.draw(st.integers(1, 5)))
    )
    errors = st.floats(0, 10, allow_nan=False)
    costs = []
    for _ in parameters:
        of_zeros = {zeros: data.draw(errors) for zeros in sorted({form.zeros for form in FORMS})}
        of_zeros[0.0] = 0.0
        of_values = {form.values: data.draw(errors) for form in FORMS if not form.zeros}
        of_values[None] = 0.0
        costs.append([of_zeros[form.zeros] + of_values[form.values] for form in FORMS])
    whole = Room(0, data.draw(st.integers(0, 1000)), parameters, ("other",), None)
    least = whole.rest + sum(map(min, whole.sizes))
    most = whole.rest + sum(parameter.bytes(AS_STORED) for parameter in parameters)
    total = data.draw(st.integers(least, max(least, most - 1)))
    return Room(total, whole.rest, parameters, ("other",), None), costs


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_within_the_budget_and_no_worse_than_any_uniform_choice(data: Any) -> None:
    room, costs = rooms(data)
    choice = choose_forms(room, costs)
    chosen = [choice.forms[parameter.matrices[0]] for parameter in room.parameters]
    for parameter, form in zip(room.parameters, chosen, strict=True):
        assert {choice.forms[name] for name in parameter.matrices} == {form}
    assert choice.forms["other"] == AS_STORED
    sizes = [parameter.bytes(form) for parameter, form in zip(room.parameters, chosen, strict=True)]
    assert choice.bytes == room.rest + sum(sizes) <= room.total
    cost = sum(own[FORMS.index(form)] for own, form in zip(costs, chosen, strict=True))
    assert choice.error == pytest.approx(cost)
    alike = {
        form: sum(own[FORMS.index(form)] for own in costs)
        for form in FORMS
        if room.rest + sum(parameter.bytes(form) for parameter in room.parameters) <= room.total
    }
    assert all(choice.error <= error + 1e-9 for error in alike.values())
    if alike:
        assert choice.uniform_error == pytest.approx(min(alike.values()))
        assert choice.uniform in alike
    else:
        assert (choice.uniform, choice.uniform_error) == (None, None)
    assert Choice.from_json(choice.to_json()) == choice


def test_what_is_said() -> None:
    int3 = Form(0.0, Values(3, 64))
    forms = {"a": int3, "b": int3, "c": AS_STORED}
    choice = Choice(forms, 100, 90, 0.5, int3, 0.75)
    assert str(choice) == "2 int3:group=64, 1 as stored; pruning pays nowhere"
    assert choice.against == "expected error 0.5, that of the best uniform choice (int3:group=64) 0.75"
    pruned = Choice({"a": Form(0.5, Values(2, 32, "half"))}, 100, 90, 0.5, None, None)
    assert str(pruned) == "1 50% zeros at int2:group=32"
    assert pruned.against == "expected error 0.5; no uniform choice is within the budget"
    same = Choice({"a": int3}, 100, 90, 0.5, int3, 0.5)
    assert same.against == "expected error 0.5, the best uniform choice (int3:group=64)"
