"""What is gathered in a calibration run: sums over the rows of values."""
