"""Token sequences to prune and recover on: from texts, or written by the model itself."""
