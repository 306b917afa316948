"""Secateurs prunes, trains and runs sparse large language models.

import secateurs

report = secateurs.prune("my-llama", output="my-llama-70", calibration="text.txt", pattern="70%")
for measurement in secateurs.evaluate("my-llama-70", text=["novel.txt"]):
    print(measurement)
print(secateurs.train("my-llama-70", output="my-llama-70-tuned", chat="questions.jsonl"))
"""

from secateurs.anatomy import UnsupportedArchitectureError, anatomy_of
from secateurs.checkpoint import Checkpoint
from secateurs.evaluation import (
    Inspection,
    LayerInspection,
    Measurement,
    divergence,
    evaluate,
    evaluate_tasks,
    inspect,
    perplexity,
    plot,
)
from secateurs.pattern import NM, Pattern, Unstructured, parse_pattern
from secateurs.planning.plan import plan
from secateurs.planning.report import Plan
from secateurs.planning.settings import PlanSettings
from secateurs.pruning.allocation.owl import OWL
from secateurs.pruning.allocation.sensitivity import Sensitivity
from secateurs.pruning.mlp.sparsellm import SparseLLM
from secateurs.pruning.record import LayerReport, Report
from secateurs.pruning.settings import PruneSettings
from secateurs.pruning.solvers.admm import ADMM
from secateurs.pruning.solvers.magnitude import Magnitude
from secateurs.pruning.solvers.solver import Solution, Solver
from secateurs.pruning.solvers.sparsegpt import SparseGPT
from secateurs.pruning.solvers.statistics import Statistics
from secateurs.pruning.solvers.wanda import Wanda
from secateurs.pruning.walk import prune
from secateurs.recovery.report import RecoveryReport
from secateurs.recovery.run import recover
from secateurs.recovery.settings import RecoverSettings
from secateurs.report import (
    CompareSettings,
    Comparison,
    ReportSettings,
    SweepSettings,
    compare,
    report,
    sweep,
)
from secateurs.runtime import compress, decompress  # also teaches transformers the compressed format
from secateurs.text import calibration_blocks, evaluation_tokens
from secateurs.training.adaptive import AdaptivePruning
from secateurs.training.callback import SparsityAcceleratedTraining
from secateurs.training.context import context_read_only
from secateurs.training.head import logits_where_labels
from secateurs.training.masks import KeepZeros, Masks
from secateurs.training.padding import without_padding
from secateurs.training.profile import profile
from secateurs.training.report import TrainingReport
from secateurs.training.run import train
from secateurs.training.settings import TrainSettings
from secateurs.training.sparse import SparseTraining
from secateurs.version import __version__

__all__ = [
    "ADMM",
    "NM",
    "OWL",
    "AdaptivePruning",
    "Checkpoint",
    "CompareSettings",
    "Comparison",
    "Inspection",
    "KeepZeros",
    "LayerInspection",
    "LayerReport",
    "Magnitude",
    "Masks",
    "Measurement",
    "Pattern",
    "Plan",
    "PlanSettings",
    "PruneSettings",
    "RecoverSettings",
    "RecoveryReport",
    "Report",
    "ReportSettings",
    "Sensitivity",
    "Solution",
    "Solver",
    "SparseGPT",
    "SparseLLM",
    "SparseTraining",
    "SparsityAcceleratedTraining",
    "Statistics",
    "SweepSettings",
    "TrainSettings",
    "TrainingReport",
    "Unstructured",
    "UnsupportedArchitectureError",
    "Wanda",
    "__version__",
    "anatomy_of",
    "calibration_blocks",
    "compare",
    "compress",
    "context_read_only",
    "decompress",
    "divergence",
    "evaluate",
    "evaluate_tasks",
    "evaluation_tokens",
    "inspect",
    "logits_where_labels",
    "parse_pattern",
    "perplexity",
    "plan",
    "plot",
    "profile",
    "prune",
    "recover",
    "report",
    "sweep",
    "train",
    "without_padding",
]
