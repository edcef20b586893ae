"""A crystal that grows while its rocking curve is taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_modulation_engine import ANGLES, correlate, make_geometry, make_modulator, simulate

from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.modulation.follow import Follower


@pytest.fixture(scope="module")
def scan():
    return simulate(make_geometry(), ANGLES)


def cut(scan, frames):
    return replace(scan, frames=scan.frames[frames], angles_deg=scan.angles_deg[frames])


def growing(scan, *sizes):
    """The scan with its first frames, as a run shows it that is still being written."""
    return (cut(scan, slice(0, n)) for n in sizes)


def test_frames_are_solved_as_they_come_and_the_crystal_is_that_of_the_finished_scan(scan):
    modulator = make_modulator(scan.geometry, with_probe=True)
    lines, seen = [], []
    found = modulation.follow(
        growing(scan, *range(2, 42, 3), 41),
        modulator,
        drift="none",
        preview=15,
        progress=lambda fraction, line: lines.append((fraction, line)),
        show=seen.append,
    )
    offline = modulation.reconstruct(scan, modulator, iterations=6, start="probe", drift="none")
    assert correlate(found) == pytest.approx(correlate(offline), abs=0.01)
    assert correlate(found) > 0.97
    assert len(seen) >= 2 and seen[-1] is found
    assert correlate(seen[0]) > 0.8
    assert seen[0].configuration["frames"] < 41 == found.configuration["frames"]
    assert "41 frames" in "".join(line for _, line in lines)


def test_the_chain_waits_for_the_peak_and_then_grows_both_ways(scan):
    follower = Follower(make_modulator(scan.geometry, with_probe=True))
    light = scan.frames[:, ~scan.mask].sum(axis=1)
    brightest = int(np.argmax(light))
    behind = []
    for n in range(2, 42):
        follower.add(cut(scan, slice(0, n)))
        if follower.begun < 0:
            assert n <= brightest + 4
        else:
            faint = light[n - 1] < 0.05 * light.max()
            assert n - 1 in follower.solved or faint  # a frame is solved when it comes
            behind.append(min(follower.solved))
    assert abs(follower.begun - brightest) < 4
    assert behind == sorted(behind, reverse=True) and behind[-1] < behind[0]
    assert light[: behind[-1]].max() < 0.05 * light.max()  # nothing bright is left behind


def test_missing_and_late_angles_do_no_harm(scan):
    """A run that was stopped and resumed: what is missing comes last, and one angle never."""
    order = np.r_[np.arange(0, 24), np.arange(30, 41), np.arange(24, 29)]
    late = cut(scan, order)
    modulator = make_modulator(scan.geometry, with_probe=True)
    found = modulation.follow(growing(late, 20, 24, 35, 40), modulator, drift="none")
    assert correlate(found) > 0.96


def test_a_finished_run_is_one_look(scan):
    found = modulation.follow([scan], make_modulator(scan.geometry), drift="none")
    assert correlate(found) > 0.97
    with pytest.raises(ValueError, match="before its first frame"):
        modulation.follow([], make_modulator(scan.geometry))
