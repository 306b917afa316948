"""Dropping whole experts: which ones against sums over single tokens, and what is left against transformers'
own model that is kept from choosing the others."""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import decoders
import secateurs
from folders import bytes_of, tensors_of
from secateurs.pruning.folder import WorkFolder
from secateurs.pruning.reap import best
from secateurs.runtime.generate import generate

GROUPED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
CASES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe", "dbrx", "llama4_text"]
"""Some have a tensor for each expert in their files, some one for all."""

CHANGES = {"deepseek_v3": GROUPED}

OTHERS = [
    *("gemma4_text+moe", "ernie4_5_moe", "qwen3_vl_moe", "inkling2_text", "longcat_flash"),
    *("afmoe", "aria_text", "axk1", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v32", "dots1"),
    *("exaone_moe", "flex_olmo", "glm4_moe_lite", "granitemoehybrid", "hunyuan_v1_moe", "hy_v3", "jamba"),
    *(
        "inkling_text",
        "kimi_linear",
        "laguna",
        "lfm2_moe",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "phimoe",
    ),
    *("nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_next", "solar_open", "minimax_m3_vl_text"),
]

ROUTERS = ("gate.weight", "gate.wg.weight", "router.weight", "router.layer.weight", "router.proj.weight")
CORRECTIONS = ("e_score_correction_bias", "expert_bias")


def save(name: str, folder: Path, **changes: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        particular = {**decoders.PARTICULAR.get(name, {}), **changes}
        patch.setitem(decoders.PARTICULAR, name, particular)
        return decoders.save(name, folder)


def load(name: str, folder: Path) -> PreTrainedModel:
    auto: Any = AutoModelForImageTextToText if name in decoders.WRAPPERS else AutoModelForCausalLM
    model, found = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    model.set_experts_implementation("eager")
    loaded: PreTrainedModel = model.eval()
    return loaded


def drop(folder: Path, output: Path, **settings: Any) -> secateurs.Report:
    return secateurs.prune(
        folder,
        output=output,
        **{
            "experts": "75%",
            "pattern": "0%",
            "calibration": decoders.tokens(6, 24),
            "device": "cpu",
            **settings,
        },
    )


class Masked(TorchFunctionMode):
    """A router's products are so low for some experts that they are never chosen."""

    def __init__(self, masks: dict[int, Tensor]) -> None:
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear and args[1].data_ptr() in self.masks:
            return result.masked_fill(self.masks[args[1].data_ptr()], -1e9)
        return result


@contextmanager
def without(model: PreTrainedModel, report: secateurs.Report) -> Iterator[None]:
    """A dense model whose routers cannot choose the experts that were dropped."""
    masks, tensors = {}, model.state_dict(keep_vars=True)
    for block in report.choice:
        within = re.findall(r".*?\.\d+\.", block.name)[0]
        dropped = [i for i in range(len(block.scores)) if i not in block.kept]
        routers = [n for n in tensors if n.startswith(within) and n.endswith((*ROUTERS, "classifier.weight"))]
        [router] = [name for name in routers if "self_attn" not in name and "shared" not in name]
        mask = torch.zeros(len(tensors[router]), dtype=torch.bool)
        mask[dropped] = True
        masks[tensors[router].data_ptr()] = mask
        for name in (name for name in tensors if name.startswith(within) and name.endswith(CORRECTIONS)):
            tensors[name].data[..., dropped] = -1e4
    with Masked(masks):
        yield


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_what_is_left_is_the_dense_model_that_cannot_choose_the_others(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "model", **CHANGES.get(name, {}))
    report = drop(folder, tmp_path / "out")
    ids = decoders.tokens(2, 24, seed=1)
    dense, cut = load(name, folder), load(name, tmp_path / "out")
    with torch.no_grad():
        before = dense(input_ids=ids, use_cache=False).logits
        with without(dense, report):
            expected = dense(input_ids=ids, use_cache=False).logits
        found = cut(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(before, expected, atol=1e-3), "the experts that were dropped are of some use"
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert all(len(block.kept) == 3 * len(block.scores) // 4 for block in report.choice)
    if name in CHANGES:
        assert all(sum(number < 4 for number in block.kept) == 3 for block in report.choice)


@torch.no_grad()
def mixtral(mlp: Any, token: Tensor) -> dict[int, float]:
    shares = (mlp.gate.weight.double() @ token).softmax(0)
    chosen = shares.topk(2).indices.tolist()
    given = {}
    for expert in chosen:
        gate, up = (mlp.experts.gate_up_proj[expert].double() @ token).chunk(2)
        result = mlp.experts.down_proj[expert].double() @ (functional.silu(gate) * up)
        given[expert] = float(shares[expert] / shares[chosen].sum() * result.norm())
    return given


@torch.no_grad()
def llama4(mlp: Any, token: Tensor) -> dict[int, float]:
    logits = mlp.router.weight.double() @ token
    given = {}
    for expert in logits.topk(2).indices.tolist():
        gate, up = (logits[expert].sigmoid() * token @ mlp.experts.gate_up_proj[expert].double()).chunk(2)
        given[expert] = float(((functional.silu(gate) * up) @ mlp.experts.down_proj[expert].double()).norm())
    return given


@pytest.mark.parametrize(
    ("name", "part", "what_experts_add"),
    [("mixtral", "mlp", mixtral), ("llama4_text", "feed_forward", llama4)],
)
def test_scores_are_sums_over_single_tokens(
    name: str, part: str, what_experts_add: Callable[[Any, Tensor], dict[int, float]], tmp_path: Path
) -> None:
    report = drop(save(name, tmp_path / "model"), tmp_path / "out")
    dense = load(name, tmp_path / "model")
    assert report.choice
    for block in report.choice:
        seen: list[Tensor] = []
        mlp: Any = dense.get_submodule(block.name.removesuffix(".experts"))
        assert block.name.endswith(f"{part}.experts")
        handle = mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            dense(input_ids=decoders.tokens(6, 24), use_cache=False)
        handle.remove()
        added: list[list[float]] = [[] for _ in range(4)]
        for token in torch.cat(seen).flatten(0, 1).double():
            for expert, amount in what_experts_add(mlp, token).items():
                added[expert].append(amount)
        assert block.tokens == [len(each) for each in added]
        means = [sum(each) / max(1, len(each)) for each in added]
        assert block.scores == pytest.approx(means, rel=1e-5)
        assert block.kept == sorted(sorted(range(4), key=lambda i: -means[i])[:3])


@given(
    st.integers(1, 3).flatmap(
        lambda groups: st.tuples(
            st.just(groups),
            st.integers(1, 4),
            st.lists(st.integers(0, 5), min_size=4 * groups, max_size=4 * groups),
        )
    )
)
def test_the_best_of_each_group(case: tuple[int, int, list[int]]) -> None:
    groups, each, scores = case
    kept = best(torch.tensor(scores, dtype=torch.float64), groups * each, groups)
    assert kept == sorted(set(kept))
    for first in range(0, len(scores), 4):
        group = [number for number in kept if first <= number < first + 4]
        order = sorted(range(first, first + 4), key=lambda number: (-scores[number], number))
        assert group == sorted(order[:each])


def test_what_is_left_is_pruned_and_goes_on_through_every_verb(tmp_path: Path) -> None:
    folder, out = save("qwen3_moe", tmp_path / "model"), tmp_path / "out"
    report = drop(folder, out, pattern="50%", method="sparsegpt", max_shard_size=60_000)
    assert report.sparsity == 0.5
    experts = [name for name in tensors_of(folder) if ".1.mlp.experts." in name]
    gone = tensors_of(folder).keys() - tensors_of(out).keys()
    assert sorted(gone) == sorted(name for name in experts if ".experts.3." in name)
    written = json.loads((out / "config.json").read_text())
    assert written["num_experts" if "num_experts" in written else "num_local_experts"] == 3
    record = json.loads((out / "secateurs.json").read_text())
    assert record["settings"]["experts"] == 0.75
    assert secateurs.Report.read(out) == report
    assert "3 of 4 experts in one block kept" in (out / "README.md").read_text()
    zeros = secateurs.inspect(out)
    assert zeros.sparsity == pytest.approx(0.5, abs=0.01)
    secateurs.compress(out, tmp_path / "compressed")
    text = (tmp_path / "text.txt").as_posix()
    Path(text).write_text("the quick brown fox " * 40)
    dense, packed = (
        next(iter(secateurs.evaluate(each, text=[text], length=24, device="cpu"))).value
        for each in (out, tmp_path / "compressed")
    )
    assert packed == pytest.approx(dense, rel=1e-4)
    folders = (out, tmp_path / "compressed")
    continued = {"".join(generate(each, "the quick", tokens=8, device="cpu")) for each in folders}
    assert len(continued) == 1
    again = drop(folder, tmp_path / "again", calibration="self", samples=4, length=24, pattern="50%")
    assert [len(block.kept) for block in again.choice] == [3]


def test_a_wrapper_keeps_the_number_where_it_had_it(tmp_path: Path) -> None:
    folder = save("qwen3_vl_moe", tmp_path / "model")
    drop(folder, tmp_path / "out")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out"))
    different = {
        key for key in before["text_config"] if before["text_config"][key] != after["text_config"][key]
    }
    assert different <= {"num_experts", "num_local_experts"}
    assert different
    assert {**before, "text_config": 0} == {**after, "text_config": 0}


@pytest.mark.parametrize("after", ["choice", "write_block"])
def test_an_interrupted_run_goes_on_with_the_same_choice(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("mixtral", tmp_path / "model")
    settings: dict[str, Any] = {"pattern": "50%", "method": "wanda"}
    drop(folder, tmp_path / "whole", **settings)
    done = getattr(WorkFolder, after)

    def stop(work: WorkFolder, *args: Any) -> None:
        done(work, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, after, stop)
        with pytest.raises(KeyboardInterrupt):
            drop(folder, tmp_path / "out", **settings)
    choice = (tmp_path / "out.partial" / "progress" / "choice.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("secateurs.pruning.reap.Cut.choose", None)
        report = drop(folder, tmp_path / "out", **settings)
    assert json.loads(choice)["choice"] == [vars(block) for block in report.choice]
    whole, resumed = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "out")
    assert whole.pop("secateurs.json") != resumed.pop("secateurs.json")  # seconds
    assert whole == resumed


@pytest.mark.parametrize(
    ("name", "changes", "settings", "message"),
    [
        ("llama", {}, {}, "has no experts to drop"),
        ("doge", {}, {}, "has no experts to drop"),
        (
            "mixtral",
            {},
            {"experts": "25%"},
            "keeps 1 of 4 where each token goes to 2: keep 2 or more (50.0%)",
        ),
        ("deepseek_v3", GROUPED, {"experts": 0.25}, "keeps 2 of 8, in 2 groups, where"),
        ("deepseek_v4", {}, {}, "takes them from a table, 'model.layers.0.mlp.gate.tid2eid'"),
        ("jetmoe", {}, {}, "the router of 'model.layers.0' should have one matrix of a row for each"),
        ("mixtral", {}, {"experts": "0%"}, "above 0% and up to 100%, not '0%'"),
        ("mixtral", {}, {"experts": "12"}, "above 0% and up to 100%, not '12'"),
        ("mixtral", {}, {"experts": "most"}, "above 0% and up to 100%, not 'most'"),
        (
            "mixtral",
            {},
            {"calibration": None, "method": "magnitude"},
            "chosen by what they do on calibration",
        ),
        ("mixtral", {}, {"experts": "100%"}, "outside (0, 1)"),
    ],
)
def test_mistakes_are_found_before_the_work(
    name: str, changes: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save(name, tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        drop(folder, tmp_path / "out", **settings)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_nothing_but_experts_may_be_dropped(tmp_path: Path) -> None:
    folder, out = save("mixtral", tmp_path / "model"), tmp_path / "out"
    report = drop(folder, out)
    assert (report.layers, report.sparsity, report.error) == ([], 0, 0)
    assert "Zeros" not in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="nothing to plot"):
        secateurs.plot(out)
    before, after = tensors_of(folder), tensors_of(out)
    for block, choice in enumerate(report.choice):
        for new, old in enumerate(choice.kept):
            path = f"model.layers.{block}.block_sparse_moe.experts."
            for name in ("w1", "w2", "w3"):
                assert torch.equal(after[f"{path}{new}.{name}.weight"], before[f"{path}{old}.{name}.weight"])


def test_all_experts_are_as_if_nothing_was_said(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for output, settings in (("a", {}), ("b", {"experts": "100%"})):
            secateurs.prune(
                folder, output=tmp_path / output, method="wanda", calibration=decoders.tokens(), **settings
            )
    assert tensors_of(tmp_path / "a").keys() == tensors_of(folder).keys()
    first, second = bytes_of(tmp_path / "a"), bytes_of(tmp_path / "b")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert first["config.json"] == second["config.json"]
