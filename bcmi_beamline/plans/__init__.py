"""Bluesky plans: alignment, calibration, rocking and the whole experiment."""
