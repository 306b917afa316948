"""Local solvers: a weight and its input's statistics in, a sparse weight out. They know no models."""
