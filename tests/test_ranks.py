"""Two and three ranks against one process: sums, weights, quality, errors and runs that are cut short."""

import json
import math
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import decoders
import folders
from rank_processes import (
    BROKEN,
    Found,
    Job,
    averaged,
    broken_off,
    calibration,
    descended,
    divided,
    few,
    measured,
    mistaken,
    not_finite,
    pruned,
    recovered,
    run_in_ranks,
    sharing,
    statistics,
    unwritten,
)
from secateurs import evaluate, prune, ranks
from secateurs.device import resolve_device

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why it does. " * 40
GRADIENTS, WEIGHTS = torch.randn(3, 23, generator=torch.Generator().manual_seed(1)), [3, 0, 1]
INPUTS = torch.randn(70, 5, generator=torch.Generator().manual_seed(0)) + 1

SETTINGS: dict[str, dict[str, Any]] = {
    "local": {"method": "sparsegpt", "pattern": "2:4"},
    "joint": {"method": "sparsellm:iterations=2", "pattern": "50%", "refine": 0},
    "descent": {
        "method": "magnitude",
        "target": "block",
        "pattern": "50%",
        "refine": 8,
        "calibration": few(),
    },
    "rounded": {"method": "wanda", "pattern": "50%", "values": "int4", "embedding": "int8"},
    "divided": {"method": "sparsegpt", "pattern": "2:4"},
    "divided joint": {"method": "sparsellm:solver=sparsegpt,iterations=1", "pattern": "2:4", "refine": 0},
    "divided rounded": {"method": "sparsegpt", "pattern": "2:4", "values": "int4"},
    "owl": {"method": "wanda", "pattern": "50%", "allocation": "owl:level=layer"},
    "experts": {"method": "wanda", "pattern": "2:4", "sequential": "linear"},
    "joint experts": {"method": "sparsellm:solver=wanda,iterations=1", "pattern": "2:4", "refine": 0},
    "fewer experts": {"method": "wanda", "pattern": "50%", "experts": 0.5},
}
"""Of runs of `prune`, each on the model that its name says."""

WORLDS = {"local": (2, 3), "joint": (2, 3), "divided joint": (2, 3)}
"""How many ranks; where nothing is said, two."""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    folders.save(folder / "llama", "llama")
    decoders.save("qwen3_moe", folder / "moe")
    (folder / "text.txt").write_text(TEXT)
    return folder


def model_of(name: str, here: Path) -> Path:
    return here / ("moe" if "experts" in name else "llama")


@pytest.fixture(scope="module")
def found(here: Path) -> dict[str, list[Found]]:
    """What the ranks find, all of it."""
    jobs = [("statistics", 3, statistics, (INPUTS,)), ("sharing", 2, sharing, ())]
    jobs.append(("averaged", 3, averaged, (GRADIENTS, WEIGHTS)))
    jobs.append(("descended", 2, descended, (here / "llama", here / "descended")))
    for name in SETTINGS:
        for world in WORLDS.get(name, (2,)):
            run = (model_of(name, here), here / f"{name} {world}", SETTINGS[name])
            how = divided if "divided" in name else pruned
            jobs.append((f"{name} {world}", world, how, run))
    llama, again = here / "llama", (here / "llama", here / "again", SETTINGS["joint"])
    cut_short = (llama, here / "resumed", SETTINGS["local"])
    stopped = (llama, here / "continued", SETTINGS["joint"])
    arguments = ["prune", str(llama), "--output", str(here / "none"), "--method", "wanda", "--samples", "1"]
    arguments += ["--calibration", str(here / "text.txt"), "--length", "32", "--pattern", "50%"]
    jobs += [
        ("again", 3, pruned, again),
        ("measured", 3, measured, (llama, here / "text.txt")),
        ("broken off", 2, broken_off, cut_short),
        ("resumed", 3, pruned, cut_short),
        ("stopped", 2, broken_off, stopped),
        ("continued", 2, pruned, stopped),
        ("mistaken", 3, mistaken, (arguments,)),
        ("not finite", 2, not_finite, (llama,)),
        ("unwritten", 2, unwritten, (llama, here / "unwritten")),
        ("recovered", 2, recovered, (llama, here / "local 2", here / "recovered")),
    ]
    return run_in_ranks(here, [Job(job) for job in jobs])


@pytest.fixture(scope="module")
def alone(here: Path, found: dict[str, list[Found]]) -> dict[str, Path]:
    """The same by one process."""
    outputs = {name: here / f"{name} 1" for name in SETTINGS}
    for name, output in outputs.items():
        settings = {"calibration": calibration(), **SETTINGS[name]}
        prune(model_of(name, here), output=output, **settings)
    return outputs


def perplexity(model: Path, here: Path) -> float:
    (figure,) = evaluate(model, text=[here / "text.txt"], length=32)
    return figure.value


def test_sums_are_those_of_all_tokens(found: dict[str, list[Found]]) -> None:
    inputs = INPUTS.double()
    for own in found["statistics"]:
        assert own["count"] == len(INPUTS)
        torch.testing.assert_close(
            own["moment"].double(), inputs.T @ inputs / len(inputs), rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(own["mean"].double(), inputs.mean(dim=0), rtol=1e-6, atol=1e-6)


def test_gradients_are_the_mean_of_all_sequences(found: dict[str, list[Found]]) -> None:
    mean = (torch.tensor(WEIGHTS).double() @ GRADIENTS.double() / sum(WEIGHTS)).split([12, 6, 5])
    for own in found["averaged"]:
        for found_, wanted in zip(own["mean"], mean, strict=True):
            torch.testing.assert_close(found_.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_descent_over_ranks_sees_less_of_each_sequence_and_does_as_well(
    here: Path, found: dict[str, list[Found]]
) -> None:
    first, second = found["descended"]
    assert first == second
    alone = descended(0, here / "llama", here / "descended alone")
    assert first["sparsity"] == alone["sparsity"]
    shown = []
    for name in ("descended", "descended alone"):
        record = json.loads((here / name / "secateurs.json").read_text())
        refined = record["refinements"]
        assert all(each["after"] < each["before"] for each in refined)
        shown.append({each["tokens"] for each in refined})
    assert shown == [{32}, {64}]
    one = perplexity(here / "descended alone", here)
    assert perplexity(here / "descended", here) == pytest.approx(one, rel=0.01)


def test_tasks_are_shared_out_by_cost_and_their_errors_are_everyones(found: dict[str, list[Found]]) -> None:
    first, second = found["sharing"]
    assert first == second
    [squares, by, rows] = zip(*(part for [part] in first["squares"]), strict=True)
    assert squares == (49, 1, 9, 16)
    assert len(set(by)) == 2
    assert by[0] != by[2] == by[3]  # 7, and 4 with 3
    assert set(rows) == {None}
    assert first["error"] == "no square of -4 on rank 1"


def test_tasks_are_divided_where_ranks_would_wait(found: dict[str, list[Found]]) -> None:
    first, second = found["sharing"]
    assert first == second
    assert [len(parts) for parts in first["few rows"]] == [1, 1]  # nearly balanced, too
    halves, others = first["rows"]
    for square, parts in ((25, halves), (1, others)):
        values, by, rows = zip(*parts, strict=True)
        assert values == (square, square)
        assert len(set(by)) == 2
        assert sorted(rows[0] + rows[1]) == list(range(2 * ranks.LEAST_ROWS))
    assert first["free"] == [[None]]


@given(rows=st.integers(1, 300), count=st.integers(1, 16))
def test_parts_have_one_of_every_so_many_rows(rows: int, count: int) -> None:
    parts = ranks.rows_of_parts(rows, count)
    assert len(parts) == count
    assert torch.cat(parts).sort().values.tolist() == list(range(rows))
    for part in parts:
        assert sorted({int(row) // count for row in part}) == [int(row) // count for row in part]
        assert len(part) in (rows // count, -(-rows // count))


@pytest.mark.parametrize("name", [f"{n} {w}" for n in SETTINGS for w in WORLDS.get(n, (2,))])
def test_ranks_prune_as_one_process_does(
    name: str, here: Path, found: dict[str, list[Found]], alone: dict[str, Path]
) -> None:
    kind = name.rpartition(" ")[0]
    assert all(own == found[name][0] for own in found[name])
    ours, theirs = folders.tensors_of(here / name), folders.tensors_of(alone[kind])
    assert {n: int((t == 0).sum()) for n, t in ours.items() if t.ndim > 1} == {
        n: int((t == 0).sum()) for n, t in theirs.items() if t.ndim > 1
    }
    one = perplexity(alone[kind], here)
    assert perplexity(here / name, here) == pytest.approx(one, rel=0.003)
    records = [json.loads((folder / "secateurs.json").read_text()) for folder in (here / name, alone[kind])]
    assert records[0]["run"] == records[1]["run"]
    for part in ("experts", "choice"):
        counts = [[entry["tokens"] for entry in record.get(part, ())] for record in records]
        assert [list(map(sum, each)) for each in counts[:1]] == [list(map(sum, each)) for each in counts[1:]]
    assert not (here / f"{name}.partial").exists()
    assert not (here / f"{name}.lock").exists()


def test_as_many_ranks_write_the_same_bytes(here: Path, found: dict[str, list[Found]]) -> None:
    for one, other in (("again", "joint 3"), ("continued", "joint 2")):
        weights = [(here / name / "model.safetensors").read_bytes() for name in (one, other)]
        assert weights[0] == weights[1]


def test_ranks_recover_as_one_process_does(here: Path, found: dict[str, list[Found]]) -> None:
    """Each step's sequences are shared out, and blocks are compared on each."""
    first, second = found["recovered"]
    assert first == second
    alone = recovered(0, here / "llama", here / "local 2", here / "recovered alone")
    assert first["steps"] == alone["steps"] == 4
    assert first["before"] == pytest.approx(alone["before"], rel=1e-6)
    assert first["after"] < 0.95 * first["before"]
    assert first["after"] == pytest.approx(alone["after"], rel=0.01)
    ours, pruned = (folders.tensors_of(here / name) for name in ("recovered", "local 2"))
    assert all(torch.equal(ours[name] == 0, pruned[name] == 0) for name in pruned)


def test_ranks_measure_as_one_process_does(here: Path, found: dict[str, list[Found]]) -> None:
    one = perplexity(here / "llama", here)
    assert [own["world"] for own in found["measured"]] == [1] * 3  # with a figure each is by itself
    assert [own["perplexity"] for own in found["measured"]] == pytest.approx([one] * 3, rel=1e-6)


def test_a_rank_that_breaks_off_ends_all_and_other_ranks_go_on(
    here: Path, found: dict[str, list[Found]], alone: dict[str, Path]
) -> None:
    stayed, broke = found["broken off"]
    assert broke["error"] == f"RuntimeError: {BROKEN}"
    assert stayed["error"].startswith("ConnectionError: another of the ranks has ended")
    assert math.isfinite(found["resumed"][0]["error"])
    one = perplexity(alone["local"], here)
    assert perplexity(here / "resumed", here) == pytest.approx(one, rel=0.003)


def test_what_one_rank_finds_wrong_all_say(found: dict[str, list[Found]]) -> None:
    line = "the loss of window 2 (tokens 32 to 47) is not finite"
    assert found["not finite"] == [{"error": line, "world": 2}] * 2
    assert found["unwritten"] == [{"error": "[Errno 13] no such right"}] * 2


def test_a_mistake_is_said_once(found: dict[str, list[Found]]) -> None:
    lines = [own["said"] for own in found["mistaken"]]
    assert [own["code"] for own in found["mistaken"]] == [2, 2, 2]
    assert sorted(map(bool, lines)) == [False, False, True]
    assert "".join(lines) == (
        "secateurs: 3 ranks cannot share 1 sequences: give more, or start fewer ranks\n"
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As one of two ranks, of which the other never comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_who_waits_for_ranks_that_do_not_come_hears_why(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(ranks, "MEETING", timedelta(seconds=1))
    with pytest.raises(ConnectionError, match=r"WORLD_SIZE is 2.*unset it"), ranks.together():
        pass


def test_a_launcher_says_whose_a_gpu_is(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(torch.cuda, "device_count", lambda: 2)
    launched.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK"), ranks.together():
        pass


def test_ranks_do_not_share_one_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(ValueError, match="use cuda"):
        resolve_device("cuda:0")


def test_without_other_ranks_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # some schedulers set it for whatever they start
    monkeypatch.delenv("RANK", raising=False)
    with ranks.together():
        assert ranks.world() == 1
        assert ranks.is_main()
