"""Generation, driven by the entries `prefill` and `decode` of a Program, or by their ONNX files."""

from __future__ import annotations

from laconic.generate.decoding import Decoder, ProgramDecoder
from laconic.generate.loop import generate

__all__ = ["Decoder", "ProgramDecoder", "generate"]
