"""How many zeros each layer gets."""
