"""Between which values the parameters of every plan must lie on one beamline, by the parameter's name.

The queue refuses what lies outside when a plan is submitted; the plans check again as they run, against the
limits that the motors then have.
"""

from bcmi_beamline.config import Beamline

EXPOSURE_S = (1e-3, 3600.0)
"""What the detector can do and somebody may mean."""

SMALLEST_WINDOW = 16


def window_bounds(beamline: Beamline) -> tuple[int, int]:
    """Smallest and largest edge, px, of a square around the beam that lies on the detector."""
    eiger = beamline.eiger
    below, right = eiger.rows - eiger.beam_row, eiger.columns - eiger.beam_column
    return SMALLEST_WINDOW, 2 * min(eiger.beam_row, eiger.beam_column, below, right)


def parameter_bounds(beamline: Beamline) -> dict[str, tuple[float, float]]:
    """(lowest, highest) allowed value of plan parameters by name, in the unit of the name."""
    nano = beamline.nanogoniometer
    rock = getattr(beamline.diffractometer, beamline.rocking_circle)
    return {
        "exposure_s": EXPOSURE_S,
        "window": window_bounds(beamline),
        "z_um": (max(nano.z.low, nano.stand_off_um - nano.distance_at_z0_um), nano.z.high),
        "centre_deg": (rock.low, rock.high),
        "peak_deg": (rock.low, rock.high),
    }
