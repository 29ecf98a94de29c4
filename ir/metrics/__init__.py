"""How good a model's results are, and how far two models' results are apart."""
