"""What a model is worth: perplexity on text, accuracy on zero-shot tasks. And what became of its weights."""

from secateurs.evaluation.divergence import divergence
from secateurs.evaluation.inspect import inspect
from secateurs.evaluation.inspection import Inspection, LayerInspection
from secateurs.evaluation.measure import Measurement, evaluate
from secateurs.evaluation.perplexity import perplexity
from secateurs.evaluation.plot import plot
from secateurs.evaluation.tasks import evaluate_tasks
from secateurs.runtime.load import load_model

__all__ = [
    "Inspection",
    "LayerInspection",
    "Measurement",
    "divergence",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "load_model",
    "perplexity",
    "plot",
]
