"""Code generation: from a Program to what runs elsewhere."""
