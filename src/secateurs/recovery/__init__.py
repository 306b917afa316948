"""The last phase: what pruning left of a model, trained towards the dense model's predictions."""
