"""Sparsity-Accelerated Training: skip the heads and channels that matter least at the moment."""
