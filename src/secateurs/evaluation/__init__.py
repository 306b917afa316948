"""What a model is worth: perplexity on text, accuracy on zero-shot tasks."""

from secateurs.evaluation.measure import Measurement, evaluate
from secateurs.evaluation.perplexity import perplexity
from secateurs.evaluation.tasks import evaluate_tasks
from secateurs.runtime.load import load_model

__all__ = ["Measurement", "evaluate", "evaluate_tasks", "load_model", "perplexity"]
