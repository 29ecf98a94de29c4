"""The graph IR: one Program, how it is captured, written down, rewritten, verified and run."""
