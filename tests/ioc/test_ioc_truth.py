"""What the simulation knows and an experiment has to find out never leaves through Channel Access."""

from __future__ import annotations

import re

import epics
import numpy as np
import pytest

from bcmi_beamline.sim.ioc.beamline import SimulatedBeamlineIOC
from bcmi_beamline.sim.ioc.camera import Camera

pytestmark = pytest.mark.ioc

FIELDS = (
    "VAL",
    "RBV",
    "DVAL",
    "DRBV",
    "OFF",
    "HLM",
    "LLM",
    "DHLM",
    "DLLM",
    "VELO",
    "VMAX",
    "MRES",
    "TWV",
)


@pytest.fixture(scope="module")
def names(simulated_beamline, tmp_path_factory) -> list[str]:
    """Every process variable, and the fields of motor records that hold numbers."""
    beamline = simulated_beamline.beamline
    camera = Camera(beamline, simulated_beamline.preset)  # not launched: names only
    ioc = SimulatedBeamlineIOC(beamline, camera, tmp_path_factory.mktemp("names"), 1.0)
    motors = [motor.pv for motor in ioc.motors.values()]
    return [*ioc.pvdb, *(f"{motor}.{field}" for motor in motors for field in FIELDS)]


def truths(beamline, preset) -> list[float]:
    """Numbers that only the simulation knows, alone and added to what the operator knows."""
    hidden, eiger = preset.sim.hidden, beamline.eiger
    pivot = np.array(beamline.nanogoniometer.pivot_um) + hidden.pivot_um
    distance = preset.plan.modulator_z_um + hidden.distance_um
    return [
        hidden.bragg_offset_deg, beamline.reflection.rocking_nominal_deg + hidden.bragg_offset_deg,
        hidden.mchi_deg, hidden.mphi_deg, distance, distance * 1e-3, distance * 1e-6, *pivot[1:],
        eiger.beam_row + hidden.beam_offset_px[0], eiger.beam_column + hidden.beam_offset_px[1],
        preset.sim.crystal.strain, preset.sim.modulator.coverage, preset.sim.peak_counts_per_s,
    ]  # fmt: skip


def test_no_process_variable_holds_a_truth(names, simulated_beamline):
    """Looked at where nobody has searched for the reflection yet: a test before may have left phi in it."""
    beamline = simulated_beamline.beamline
    circle = beamline.prefix + getattr(beamline.diffractometer, beamline.rocking_circle).pv
    assert epics.caput(circle, beamline.reflection.rocking_nominal_deg - 0.05, wait=True, timeout=60.0)
    pvs = [epics.PV(name, form="native", auto_monitor=False) for name in names]
    values = {pv.pvname: pv.get(timeout=20.0) for pv in pvs}
    assert [name for name, value in values.items() if value is None] == []
    # Whole numbers count and choose: a counter passes a pivot of 30 um some time, and tells nothing by it.
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    assert len(numbers) > 300
    secrets = truths(simulated_beamline.beamline, simulated_beamline.preset)
    told = [name for name, value in numbers.items() if np.isclose(value, secrets, 1e-6, 0).any()]
    assert told == []


def test_no_process_variable_is_named_after_a_truth(names):
    suspect = re.compile("truth|true|hidden|drift|strain|crystal|probe|support|seed|pivot", re.IGNORECASE)
    assert [name for name in names if suspect.search(name)] == []
