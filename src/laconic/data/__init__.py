"""Data by name, for calibration and evaluation."""
