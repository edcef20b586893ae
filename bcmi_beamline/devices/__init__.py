"""Ophyd devices: hardware facts and safe states."""
