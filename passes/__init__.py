"""Passes: each finds what a Program says twice and says it once; the manager runs, verifies and measures them."""
