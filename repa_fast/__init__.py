"""Fast training of diffusion transformers with representation alignment."""

__version__ = "0.1.0"
