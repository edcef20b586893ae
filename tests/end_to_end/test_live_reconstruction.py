"""`bcmi reconstruct --follow` in a process of its own, beside a session that is still rocking."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.data import read_reconstruction, write_modulator
from bcmi_beamline.scans import Modulator
from bcmi_beamline.session import open_session
from bcmi_beamline.sim import Twin

POINTS, SEEN_BY_THEN = 41, 36
"""Points of the scan, and that at which it waits for the first picture of the crystal."""


def known_modulator(path, place_um):
    """A stand-in for a calibration: the map as it is, with the beam axis at its middle."""
    twin = Twin(load_beamline(), load_preset("small"))
    distance = twin.truth_distance()
    pixel = twin.geometry.with_modulator(distance).object_pixel(128)
    place = place_um["x"] * 1e-6, place_um["y"] * 1e-6
    probe = np.zeros((1, 8, 8), np.complex64)
    modulator = Modulator(twin.truth_modulator(pixel, (256, 256)), pixel, distance, 1e-6, place, probe)
    write_modulator(path, modulator)


@pytest.mark.end_to_end
@pytest.mark.timeout(240)
def test_a_crystal_is_reconstructed_while_it_rocks(tmp_path):
    from bcmi_beamline.plans import find_bragg_peak, insert_modulator, rocking_scan

    modulator, crystal = tmp_path / "modulator.cxi", tmp_path / "crystal.cxi"
    picture = crystal.with_suffix(".png")
    started: list[subprocess.Popen] = []
    drawn_at: list[int] = []

    def follow_beside(name, document):
        if name == "start":
            known_modulator(modulator, document["modulator_position_um"])
            command = [sys.executable, "-m", "bcmi_beamline.cli", "reconstruct", document["uid"], "--follow"]
            command += ["--modulator", str(modulator), "--directory", str(tmp_path), "-o", str(crystal)]
            command += ["--iterations", "2", "--preview", "8"]
            started.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        elif name == "event" and document["seq_num"] == SEEN_BY_THEN:
            patience = time.monotonic() + 90
            while not picture.exists() and started[0].poll() is None and time.monotonic() < patience:
                time.sleep(0.1)
            if picture.exists():
                drawn_at.append(document["seq_num"])

    with open_session(simulate="small", directory=tmp_path) as session:
        session.run(find_bragg_peak(session.devices, points=25, window=128))
        session.run(insert_modulator(session.devices))
        token = session.RE.subscribe(follow_beside)
        session.run(rocking_scan(session.devices, 0.25, 0.0125, exposure_s=0.2, window=128))
        session.RE.unsubscribe(token)
        session.flush()
        text, _ = started[0].communicate(timeout=120)
    assert started[0].returncode == 0, text
    assert drawn_at == [SEEN_BY_THEN], text
    found = read_reconstruction(crystal)
    assert found.configuration["followed"] and found.configuration["frames"] == POINTS
    assert found.support.any()
