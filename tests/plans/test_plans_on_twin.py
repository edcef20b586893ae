"""Plans on the frames of the twin, message by message in this process: what they find, and when they refuse.

How well the alignment does over many seeds is in ``benchmarks/alignment.py``.
"""

import numpy as np
import pytest
from on_twin import TwinBench, tilted_preset

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.devices import pose_math
from bcmi_beamline.plans import (
    PoorFit,
    align_modulator,
    calibrate_pivot,
    find_bragg_peak,
    insert_modulator,
    rocking_scan,
)

SMALL = load_preset("small")
HORIZONTAL, VERTICAL = load_beamline(), load_beamline("sim-id01-vertical")
PEAK = 17.70 + SMALL.sim.hidden.bragg_offset_deg


def with_sim(preset, **changes):
    sim = {}
    for name, values in changes.items():
        sim[name] = getattr(preset.sim, name).model_copy(update=values)
    narrow = preset.plan.model_copy(update={"window": 128})
    return preset.model_copy(update={"plan": narrow, "sim": preset.sim.model_copy(update=sim)})


def bench_with_modulator_in(beamline, preset):
    bench = TwinBench(beamline, preset, {f"diffractometer_{beamline.rocking_circle}": PEAK})
    bench.run(insert_modulator(bench.devices, 1350.0))
    return bench


@pytest.mark.parametrize("what", ["featureless", "missing"])
def test_a_modulator_without_a_pattern_is_not_moved(what):
    changes = {"modulator": {"thickness_um": 1e-4}} if what == "featureless" else {}
    bench = bench_with_modulator_in(HORIZONTAL, with_sim(SMALL, **changes))
    if what == "missing":
        bench.at["nanogoniometer_x"] += 150.0
    before = {axis: bench.at[f"nanogoniometer_{axis}"] for axis in pose_math.AXES}
    with pytest.raises(PoorFit, match=r"pattern: .* shows no field within the search") as refusal:
        bench.run(align_modulator(bench.devices, window=128))
    assert "is the modulator out?" in str(refusal.value)
    assert {axis: bench.at[f"nanogoniometer_{axis}"] for axis in pose_math.AXES} == pytest.approx(before)
    assert bench.problems == []


def test_alignment_from_afar_in_the_vertical_geometry_then_a_rock_that_leaves_the_modulator_still():
    bench = bench_with_modulator_in(VERTICAL, tilted_preset(SMALL, 1.5, -1.5, seed=3))
    found = bench.run(align_modulator(bench.devices, points=13, positions=4, window=256))
    for tilt, truth in (("mchi", 1.5), ("mphi", -1.5)):
        miss, stated = getattr(found, f"{tilt}_deg") - truth, getattr(found, f"{tilt}_error_deg")
        assert abs(miss) < 0.3 and abs(miss) < 4 * stated
    assert found.pivot is not None and found.pivot.residual_um < 1.0
    assert bench.problems == []

    spots = []
    take = bench.do_trigger

    def watch(msg):
        take(msg)
        spots.append(bench.twin.truth_spot(bench.pose_of_twin()))

    bench.do_trigger = watch
    bench.run(rocking_scan(bench.devices, 0.25, 0.125, 0.1, peak_deg=PEAK, window=128))
    walk_nm = np.ptp(np.array(spots) * 1e9, axis=0)
    # carried along it would have swung by 0.5 deg of 1.36 mm, 11.8 um
    assert len(spots) == 5 and walk_nm.max() < 150.0
    assert bench.problems == []


def test_the_pivot_of_the_readings_is_found():
    preset = with_sim(SMALL, hidden={"mchi_deg": 0.0, "mphi_deg": 0.0, "pivot_um": (20.0, -30.0, 90.0)})
    bench = bench_with_modulator_in(HORIZONTAL, preset)
    found = bench.run(calibrate_pivot(bench.devices, window=128))
    true_z = HORIZONTAL.nanogoniometer.pivot_um[2] + 90.0
    assert found.pivot_um[2] == pytest.approx(true_z, abs=4 * found.pivot_error_um[2])
    assert found.pivot_error_um[2] < 10.0 and found.walk_um == pytest.approx(90 * 0.0698, abs=3.0)
    assert bench.at["nanogoniometer_pivot"] == pytest.approx(found.pivot_um)


def test_the_bragg_peak_of_the_vertical_geometry():
    bench = TwinBench(VERTICAL, with_sim(SMALL))
    found = bench.run(find_bragg_peak(bench.devices, window=128))
    assert found.circle == "eta" and found.peak_deg == pytest.approx(PEAK, abs=0.003)
