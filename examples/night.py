"""A night's plan file: every public generator function that takes the devices first is a plan.

Try it before the night, without hardware: ``bcmi rehearse examples/night.py``
"""

from bcmi_beamline.plans import find_bragg_peak, insert_modulator, retract_modulator, rocking_scan


def rock_with_and_without(devices, exposure_s: float = 0.2, half_range_deg: float = 0.05):
    """Find the peak, then rock over its middle with the modulator in and with it out."""
    yield from retract_modulator(devices)
    peak = yield from find_bragg_peak(devices, half_range_deg=0.1, points=21, exposure_s=0.1)
    scan = {"half_range_deg": half_range_deg, "exposure_s": exposure_s, "peak_deg": peak.peak_deg}
    yield from insert_modulator(devices, 1350.0)
    yield from rocking_scan(devices, modulator="in", **scan)
    yield from retract_modulator(devices)
    yield from rocking_scan(devices, modulator="out", **scan)
