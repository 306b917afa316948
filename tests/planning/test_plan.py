"""What a plan says of a run, held against what the run does."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import secateurs
from secateurs.cli import main
from secateurs.planning.machine import CARDS, Machine, measured
from secateurs.planning.work import Amounts
from secateurs.pruning.allocation.fitting import measure_forms
from secateurs.runtime.convert import compressed_bytes
from secateurs.settings import options

SAMPLES, LENGTH = 6, 48
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
POSITIONS = {"max_position_embeddings": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    here = tmp_path_factory.mktemp("models")
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, **POSITIONS, intermediate_size=160))
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16}
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **POSITIONS, **experts, num_key_value_heads=2))
    for name, model in (("llama", llama), ("moe", moe)):
        model.save_pretrained(here / name)
    return {"llama": here / "llama", "moe": here / "moe"}


@pytest.fixture
def config_alone(models: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copy(models["llama"] / "config.json", tmp_path)
    return tmp_path


class Count(TorchDispatchMode):
    """FLOPs of products and of factorisations that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.flops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            first = args[1] if name.startswith(("add", "badd")) else args[0]
            self.flops["products"] += 2 * result.numel() * first.shape[-1]
        elif name.startswith("_scaled_dot_product"):
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            self.flops["products"] += (5 if backward else 2) * query.numel() * key.shape[-2]
        elif name == "linalg_cholesky_ex":
            self.flops["factors"] += len(args[0]) ** 3 / 3
        elif name == "cholesky_inverse":
            self.flops["factors"] += len(args[0]) ** 3 * 2 / 3
        elif name == "linalg_solve_triangular":
            self.flops["factors"] += args[1].numel() * len(args[0])
        return result


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", {"method": "wanda"}),
        ("llama", {"method": "wanda", "sequential": "sublayer"}),
        ("llama", {"method": "sparsegpt:block=32", "sequential": "linear"}),
        ("llama", {"method": "admm"}),
        ("llama", {"method": "admm", "target": "block"}),
        ("llama", {"method": "sparsellm", "refine": 2}),
        ("llama", {"method": "sparsellm:solver=sparsegpt,iterations=2", "target": "layer"}),
        ("llama", {"method": "sparsellm", "effort": "best", "refine": 0}),
        ("moe", {"method": "admm"}),
        ("moe", {"method": "sparsellm", "refine": 0}),
        ("llama", {"method": "sparsegpt", "values": "int4"}),
        ("llama", {"method": "sparsellm", "values": "int4", "refine": 0}),
        ("llama", {"method": "wanda", "embedding": "int8"}),
        ("llama", {"method": "sparsegpt", "allocation": "owl"}),
        ("llama", {"method": "wanda", "allocation": "sensitivity"}),
        ("moe", {"method": "sparsegpt", "experts": "50%"}),
    ],
    ids=str,
)
def test_operations_are_those_of_the_run(models, tmp_path, model, settings):
    ids = torch.randint(100, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    with Count() as counted:
        secateurs.prune(
            models[model], output=tmp_path / "out", calibration=ids, device="cpu", batch_size=2, **settings
        )
    for kind, flops in operations(models[model], **settings).items():
        assert flops == pytest.approx(counted.flops[kind], rel=0.1, abs=2e6), kind


def operations(model, **settings):
    """As `Count` counts them."""
    said = secateurs.plan(
        model, device="a100", samples=SAMPLES, length=LENGTH, batch_size=2, **settings
    ).flops
    products = sum(said[kind] for kind in ("products", "attention", "sums", "float32"))
    return {"products": products, "factors": said["factors"]}


def test_operations_are_those_of_what_a_budget_measures(models, tmp_path, monkeypatch):
    ids, counted = torch.randint(100, (SAMPLES, LENGTH)), Count()

    def measure(*arguments):
        with counted:
            return measure_forms(*arguments)

    monkeypatch.setattr("secateurs.pruning.walk.measure_forms", measure)
    told = {"method": "sparsegpt", "batch_size": 2, "bytes_per_weight": 0.6}
    secateurs.prune(models["llama"], output=tmp_path / "out", calibration=ids, device="cpu", **told)
    all_in_all = operations(models["llama"], method="sparsegpt", bytes_per_weight=0.6)
    of_the_walk = operations(models["llama"], method="sparsegpt", values="int4")
    for kind, flops in all_in_all.items():
        assert flops - of_the_walk[kind] == pytest.approx(counted.flops[kind], rel=0.1), kind


def test_time_is_linear_in_depth_and_samples_and_memory_does_not_grow_with_depth(config_alone):
    def planned(blocks: int, samples: int) -> secateurs.Plan:
        config = json.loads((config_alone / "config.json").read_text())
        (config_alone / "config.json").write_text(json.dumps(config | {"num_hidden_layers": blocks}))
        return secateurs.plan(config_alone, device="h100", method="sparsegpt", samples=samples)

    one, two, three = (planned(blocks, 64) for blocks in (4, 8, 12))
    assert three.seconds["run"] - two.seconds["run"] == pytest.approx(two.seconds["run"] - one.seconds["run"])
    assert one.device_bytes == two.device_bytes == three.device_bytes
    some, more, most = (planned(4, samples).seconds["run"] for samples in (64, 128, 192))
    assert most - more == pytest.approx(more - some)


def test_ranks_share_the_tokens_and_the_solvers(config_alone):
    one, two = (secateurs.plan(config_alone, device="h100", samples=64, ranks=ranks) for ranks in (1, 2))
    assert two.tokens == one.tokens
    assert two.seconds["run"] == pytest.approx(one.seconds["run"] / 2, rel=0.1)
    assert one.seconds["solve"] / 2 <= two.seconds["solve"] < one.seconds["solve"]


def test_the_plan_counts_the_weights_that_the_run_prunes(models):
    said = secateurs.plan(models["llama"], device="l40s")
    model = LlamaForCausalLM.from_pretrained(models["llama"])
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert said.pruned == sum(linear.weight.numel() for linear in linears)
    assert said.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert said.disk_bytes == 4 * said.parameters


def test_what_does_not_fit_or_takes_long_is_said(tmp_path):
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    )
    config.save_pretrained(tmp_path)
    said = secateurs.plan(tmp_path, device="rtx4090", method="sparsellm")
    assert not said.fits
    assert len(said.warnings) == 2
    assert "GB are needed" in said.warnings[0]
    assert "this takes" in said.warnings[1]
    assert secateurs.plan(tmp_path, device="h200", method="wanda").warnings == []


def test_the_host_has_to_hold_the_activations_that_it_keeps(config_alone):
    said = secateurs.plan(config_alone, device="cpu", method="wanda")
    assert said.fits
    kept = replace(said, is_gpu=True, machine="a card", device_bytes=1, host_bytes=2 * said.host_memory)
    assert not kept.fits
    assert "the host has" in kept.warnings[0]
    assert replace(kept, host_memory=None).fits


def test_all_options_of_prune_are_options_of_plan():
    known = {option.name: option.type for option in options(secateurs.PlanSettings)}
    for option in options(secateurs.PruneSettings):
        assert known[option.name] == option.type


def test_a_command_of_prune_is_one_of_plan(config_alone, monkeypatch, capsys):
    of_prune = ["--calibration", "no-such-text.txt=0.5", "self:temperature=0.9", "--pattern", "60%"]
    of_prune += ["--values", "int4:group=32", "--embedding", "int8", "--allocation", "owl:level=layer"]
    of_prune += ["--effort", "fast", "--repair", "0.4", "--seed", "3", "--bos", "yes", "--field", "words"]
    of_prune += ["--length", "32", "--recover", "4096", "--output", "there", "--max-shard-size", "1GB"]
    monkeypatch.setattr("sys.argv", ["secateurs", "plan", str(config_alone), *of_prune, "--device", "h100"])
    main()
    said = capsys.readouterr().out
    assert all(f"time: {phase}" in said for phase in ("text", "survey", "solve", "recover"))


def test_a_file_of_settings_for_prune_is_one_for_plan(config_alone, monkeypatch, capsys):
    (config_alone / "run.yaml").write_text(
        "calibration: {text.txt: 0.5, self: 0.5}\nbudget: 200KB\noutput: there\nlength: 32\n"
    )
    arguments = ["secateurs", "plan", str(config_alone), "--config", str(config_alone / "run.yaml")]
    monkeypatch.setattr("sys.argv", [*arguments, "--device", "h100"])
    main()
    assert "time: survey" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["llama", "moe"])
@pytest.mark.parametrize(
    "settings", [{"pattern": "70%"}, {"pattern": "2:4", "values": "int3", "embedding": "int8"}]
)
def test_compress_makes_no_more_of_it_than_is_said(models, tmp_path, model, settings):
    settings = {"method": "magnitude", "device": "cpu"} | settings
    secateurs.prune(models[model], output=tmp_path / "out", **settings)
    said = secateurs.plan(models[model], **settings).compressed_bytes
    assert said == pytest.approx(compressed_bytes(tmp_path / "out"), rel=0.05)


def test_what_is_done_beside_the_walk_takes_time(config_alone):
    told = {"device": "h100", "method": "wanda", "length": 32}
    plain = secateurs.plan(config_alone, **told)
    own = secateurs.plan(config_alone, calibration="self", **told)
    trained = secateurs.plan(config_alone, recover=100_000, **told)
    assert plain.seconds["text"] == plain.seconds["survey"] == plain.seconds["recover"] == 0
    assert own.seconds["text"] > 0
    half = secateurs.plan(config_alone, calibration={"self": 0.5, "text.txt": 0.5}, samples=256, **told)
    assert half.seconds["text"] == pytest.approx(own.seconds["text"])
    assert trained.device_bytes >= 16 * trained.parameters
    assert trained.disk_bytes > 3 * 12 * trained.parameters


def test_magnitude_needs_no_text(config_alone):
    said = secateurs.plan(config_alone, device="a100", method="magnitude")
    assert said.tokens == 0
    assert said.flops["products"] == said.seconds["run"] == 0


def test_this_machine_is_tested():
    tested = measured("cpu", torch.float32)
    assert all(rate > 0 for rate in tested.rates.values())
    made = Machine("half as fast", False, 1, {kind: rate / 2 for kind, rate in tested.rates.items()})
    work = Amounts({("run", "products"): 1e12})
    assert made.seconds(work)["run"] == pytest.approx(2 * tested.seconds(work)["run"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"device": "h1000"}, "h1000"),
        ({"ranks": 0}, "ranks"),
        ({"ranks": 9, "samples": 8}, "one for each"),
        ({"length": 100_000}, "64 positions"),
        ({"length": 0}, "length"),
        ({"method": "thanos"}, "unknown method"),
        ({"pattern": "170%"}, "170%"),
        ({"samples": 0}, "samples"),
        ({"experts": "50%"}, "no experts to drop"),
        ({"method": "magnitude", "allocation": "sensitivity"}, "measured on calibration text"),
        ({"budget": "1MB", "values": "int4"}, "leave values out"),
        ({"budget": "1KB"}, "below the least"),
        ({"budget": "1GB"}, "holds the model as it is"),
        ({"bytes_per_weight": 0.001}, "below the least"),
        ({"recover": -1}, "number of tokens"),
        ({"pattern": "3:7"}, "model.layers.0.self_attn.q_proj has 64 inputs"),
    ],
)
def test_mistakes_are_one_line(config_alone, settings, says):
    with pytest.raises(ValueError, match=says) as caught:
        secateurs.plan(config_alone, **{"device": "h100", **settings})
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        secateurs.plan(tmp_path, device="h100")


def test_every_card_plans(config_alone):
    seconds = {name: secateurs.plan(config_alone, device=name).total_seconds for name in CARDS}
    assert seconds["h200"] < seconds["a100"]
