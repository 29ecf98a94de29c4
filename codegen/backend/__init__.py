"""The torch.compile backend: see `backend.py` for the way of a graph through it."""
