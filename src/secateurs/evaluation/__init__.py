"""What a model is worth: perplexity on text, accuracy on zero-shot tasks."""

from secateurs.evaluation.measure import Measurement, evaluate, load_model
from secateurs.evaluation.perplexity import perplexity
from secateurs.evaluation.tasks import evaluate_tasks

__all__ = ["Measurement", "evaluate", "evaluate_tasks", "load_model", "perplexity"]
