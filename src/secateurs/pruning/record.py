"""What a run did, in Python and as `secateurs.json` in the output folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateurs.calibration.sequences import in_words
from secateurs.checkpoint import RECORD, read_json
from secateurs.pruning.allocation.forms import Choice
from secateurs.values import Values


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer."""

    name: str
    pattern: str
    sparsity: float
    """Share of weights that are zero."""
    weights: int
    error: float
    """Squared error of the layer's output on the calibration tokens, relative to the output's energy: that of
    the dense layer, or of what the layer was fitted to, around its mean if it has a bias. Measured before
    any refinement."""
    seconds: float
    objective: list[float]
    """For an iterative solver, the relative error after each iteration."""
    rounding: float | None = None
    """Where what was left was rounded: the error of that alone, in the same terms."""


@dataclass(frozen=True)
class Iterate:
    """An MLP as SparseLLM's iterations leave it."""

    objective: float | None
    """The weighted sum of the terms once p, z and s have moved, to which this iterate's gate and up are then
    fitted and pruned. They move with the gate and up of the iterate before, and the down of the one before
    that; the second iterate's with the dense down. None for the first: nothing has moved yet."""
    terms: dict[str, float]
    """Squared residuals of "gate", "up", "hidden" and "output", relative to the energy of their targets."""
    held_out: float
    """Relative squared error of the pruned MLP's output, on tokens that no weights were fitted to."""


@dataclass(frozen=True)
class MLPReport:
    """The iterations on one MLP."""

    name: str
    """Of its block, or of the matrix that an expert or one of several MLPs ends in."""
    iterates: list[Iterate]
    """The first is pruned from the dense weights, before any iteration."""
    kept: int
    """The iterate whose weights are saved."""


@dataclass(frozen=True)
class Refinement:
    """The descent on one block's remaining weights, judged by a few of the sequences."""

    name: str
    """Of the block."""
    before: float
    """Squared error of the block's result, relative to the energy of what the block is asked to add."""
    after: float | None
    """Where it is no lower, or None for not finite, the weights stay as they were before."""
    tokens: int | None = None
    """Of each sequence that the descent was shown: the first ones. Older records do not say: all."""


@dataclass(frozen=True)
class ExpertsReport:
    """What the experts of one block saw of the calibration text."""

    name: str
    """Of the module that holds them."""
    tokens: list[int]
    """That were routed to each."""


@dataclass(frozen=True)
class ChoiceReport:
    """Which of a block's experts were kept, before anything else was done."""

    name: str
    """Of the module that holds them."""
    kept: list[int]
    """Their numbers in the model as it was, rising: the first of them is number 0 now."""
    scores: list[float]
    """Of all: the mean, over the tokens routed to one, of the router's weight times the norm of what it
    gives."""
    tokens: list[int]
    """That were routed to each."""


@dataclass(frozen=True)
class TableReport:
    """The embedding or the head, or both if they are tied, once rounded."""

    parameters: list[str]
    """Of the model."""
    error: float
    """Squared error of what it gives on the calibration text, or of its weights if it is but read by row,
    relative to the energy."""
    by_head: bool
    """Whether what the head is given on the calibration text counted."""


@dataclass(frozen=True)
class BlockReport:
    """What became of one block."""

    layers: list[LayerReport] = field(default_factory=list)
    mlps: list[MLPReport] = field(default_factory=list)
    """One for each MLP with iterations."""
    refinements: list[Refinement] = field(default_factory=list)
    """One, or none."""
    experts: list[ExpertsReport] = field(default_factory=list)
    """One for each module of experts that were pruned on text."""


@dataclass(frozen=True)
class Report:
    """What a run did."""

    output: Path
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    phases: dict[str, float]
    """Seconds to load, run (forward passes and second moments), solve, refine and write. If the run was
    interrupted, also those that went into getting to where it went on, which `seconds` leaves out."""
    layers: list[LayerReport] = field(repr=False)
    mlps: list[MLPReport] = field(repr=False)
    """One for each MLP that SparseLLM iterated on."""
    refinements: list[Refinement] = field(repr=False)
    """One for each block that was refined."""
    experts: list[ExpertsReport] = field(repr=False, default_factory=list)
    """One for each module of experts that were pruned on text."""
    choice: list[ChoiceReport] = field(repr=False, default_factory=list)
    """Of experts, one for each block, if only a share of them was kept."""
    tables: list[TableReport] = field(repr=False, default_factory=list)
    """Of the embedding and the head, if they were rounded."""
    dense: dict[str, str] = field(repr=False, default_factory=dict)
    """What holds matrices and is left as it is, with blocks in one (`model.layers.*`...) -> why."""
    alone: list[str] = field(repr=False, default_factory=list)
    """Matrices of no attention or MLP that was understood: SparseLLM prunes them by its solver alone."""

    forms: Choice | None = field(repr=False, default=None)
    """What each matrix was to become, where a budget asked."""

    @classmethod
    def read(cls, folder: Path) -> "Report":
        """The report of a pruned model's folder; ValueError if it has none."""
        content = read_json(folder / RECORD)
        if "layers" not in content:
            raise ValueError(f"'{folder / RECORD}' is not the record of a pruning run")
        layers = [LayerReport(**layer) for layer in content["layers"]]
        mlps = [
            MLPReport(mlp["name"], [Iterate(**iterate) for iterate in mlp["iterates"]], mlp["kept"])
            for mlp in content["mlps"]
        ]
        refinements = [Refinement(**refinement) for refinement in content.get("refinements", [])]
        experts = [ExpertsReport(**entry) for entry in content.get("experts", [])]
        choice = [ChoiceReport(**entry) for entry in content.get("choice", [])]
        tables = [TableReport(**entry) for entry in content.get("tables", [])]
        forms = Choice.from_json(content["forms"]) if "forms" in content else None
        parts = {"dense": content.get("dense", {}), "alone": content.get("alone", [])}
        shared = {key: content[key] for key in ("settings", "versions", "seconds", "phases")}
        return cls(
            output=folder,
            layers=layers,
            mlps=mlps,
            refinements=refinements,
            experts=experts,
            choice=choice,
            tables=tables,
            forms=forms,
            **parts,
            **shared,
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What a model card says of the run."""
        settings = self.settings
        method, calibration = settings["method"], settings["calibration"]
        inner = method.get("solver")
        facts = []
        if self.choice:
            facts.append(("Experts", f"{self.kept_experts} kept, by router-weighted activation (REAP)"))
        if self.layers:
            facts += [
                ("Method", f"{method['name']} ({inner['name']} inside)" if inner else method["name"]),
                *([("Chosen for each matrix", str(self.forms))] if self.forms else []),
                *([("Pattern", settings["pattern"])] if "pattern" in settings else []),
                *([("Values", str(self.values))] if self.values else []),
                ("Zeros", f"{self.sparsity:.2%} of the weights of {len(self.layers)} linear layers"),
                ("Mean relative error of the layers' outputs", f"{self.error:.4f}"),
            ]
            if self.is_rounded:
                facts.append(("Of rounding alone", f"{self.rounding:.4f}"))
        if self.forms:
            facts.append(("Budget", self.fitted))
        if self.tables:
            facts.append((f"Also {self.tabled}", str(Values(**settings["embedding"]))))
        if self.dense and self.layers:
            names = ", ".join(sorted({name.removesuffix(".weight") for name in self.dense}))
            facts.append(("Left dense", names))
        if self.alone and self.layers and method["name"] == "sparsellm":
            facts.append(("Pruned by the local solver alone", ", ".join(self.alone)))
        if calibration is not None:
            text = in_words(calibration)
            facts.append(("Calibration", " ".join(Path(part).name for part in text.split(" "))))
        return [*facts, ("secateurs", self.versions["secateurs"])]

    @property
    def title(self) -> str:
        """What became of the model, in a few words."""
        parts = [f"with {self.kept_experts}"] if self.choice else []
        if self.layers and self._is_pruned:
            parts.append(f"pruned to {self.sparsity:.0%} zeros")
        if self.values:
            parts.append(f"rounded to {self.values.bits} bits")
        elif self.is_rounded:
            parts.append("rounded to a budget")
        if self.tables:
            parts.append(f"{self.tabled} to {self.settings['embedding']['bits']} bits")
        return ", ".join(parts)

    @property
    def tags(self) -> list[str]:
        """What a model card finds it by."""
        pruned = ["pruned", "sparse"] if self._is_pruned or self.choice else []
        return [*pruned, *(["quantized"] if self.is_rounded or self.tables else [])]

    @property
    def _is_pruned(self) -> bool:
        """Whether there were to be zeros."""
        if self.forms is not None:
            return any(form.zeros for form in self.forms.forms.values())
        return bool(self.settings["pattern"] != "0%")

    @property
    def fitted(self) -> str:
        """How much of a budget is used."""
        assert self.forms is not None
        whose = "it takes" if "budget" in self.settings else "the blocks' matrices take"
        used, total = (f"{size / 10**6:.3f} MB" for size in (self.forms.bytes, self.forms.total))
        return f"compressed, {whose} at most {used} of {total}"

    @property
    def is_rounded(self) -> bool:
        """Whether what was left of some matrices was rounded."""
        return any(layer.rounding is not None for layer in self.layers)

    @property
    def values(self) -> Values | None:
        """What all weights were rounded to, if they were."""
        return Values(**self.settings["values"]) if "values" in self.settings else None

    @property
    def tabled(self) -> str:
        """Which of the embedding and the head were rounded, by their names in the model."""
        names = [name.removesuffix(".weight") for table in self.tables for name in table.parameters]
        return " and ".join(names)

    @property
    def kept_experts(self) -> str:
        """What was kept of each block's experts: "12 of 16 experts in each of 24 blocks"."""
        first, blocks = self.choice[0], len(self.choice)
        each = f"each of {blocks} blocks" if blocks > 1 else "one block"
        return f"{len(first.kept)} of {len(first.scores)} experts in {each}"

    @property
    def sparsity(self) -> float:
        """Share of zeros in all pruned layers together; 0 if there are none."""
        return sum(x.sparsity * x.weights for x in self.layers) / max(1, sum(x.weights for x in self.layers))

    @property
    def error(self) -> float:
        """Mean relative error of the pruned layers; 0 if there are none."""
        return sum(layer.error for layer in self.layers) / max(1, len(self.layers))

    @property
    def rounding(self) -> float:
        """Mean relative error that rounding added to them."""
        return sum(layer.rounding or 0 for layer in self.layers) / max(1, len(self.layers))
