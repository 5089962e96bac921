"""Frozen vision encoders behind one protocol, found by name."""

from .registry import Encoder, EncoderSpec, load, spec, specs, weight_files

__all__ = ["Encoder", "EncoderSpec", "load", "spec", "specs", "weight_files"]
