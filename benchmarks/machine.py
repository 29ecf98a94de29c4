"""What a result file says of where it was made."""

from laconic.machine import machine

__all__ = ["machine"]
