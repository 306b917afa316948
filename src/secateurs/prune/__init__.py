"""Pruning: local solvers, and what they need to know of a layer's inputs."""
