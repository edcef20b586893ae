"""Bragg coherent modulation imaging: acquisition, alignment and reconstruction."""

__version__ = "0.1.0"
