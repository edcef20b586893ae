"""`bcmi calibrate --live` and `bcmi reconstruct --follow` in processes of their own, beside a session."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.data import read_modulator, read_reconstruction, write_modulator
from bcmi_beamline.scans import Modulator
from bcmi_beamline.session import open_session
from bcmi_beamline.sim import Twin


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """At the Bragg peak, with the modulator in."""
    from bcmi_beamline.plans import find_bragg_peak, insert_modulator

    folder = tmp_path_factory.mktemp("live")
    with open_session(simulate="small", directory=folder, time_scale=0.001) as session:
        session.run(find_bragg_peak(session.devices, points=15, window=128))
        session.run(insert_modulator(session.devices))
        yield session


def run_beside(session, plan, waits_at, command, picture):
    """Run `plan`, and ``bcmi COMMAND`` beside it from its start.

    At point `waits_at` the plan waits for the `picture`, so that it is drawn while the scan runs.
    """
    started: list[subprocess.Popen] = []
    drawn: list[bool] = []

    def beside(name, document):
        if name == "start":
            words = [sys.executable, "-m", "bcmi_beamline.cli", *command(document)]
            words += ["--directory", str(session.directory), "-o", str(picture.with_suffix(".cxi"))]
            started.append(
                subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        elif name == "event" and document["seq_num"] == waits_at:
            patience = time.monotonic() + 90
            while not picture.exists() and started[0].poll() is None and time.monotonic() < patience:
                time.sleep(0.05)
            drawn.append(picture.exists())

    token = session.RE.subscribe(beside)
    result = session.run(plan)
    session.RE.unsubscribe(token)
    text, _ = started[0].communicate(timeout=120)
    assert started[0].returncode == 0, text
    assert drawn == [True], text
    return result


@pytest.mark.end_to_end
@pytest.mark.timeout(240)
def test_a_scan_is_calibrated_while_it_runs(session, tmp_path):
    from bcmi_beamline.plans import calibrate_modulator

    plan = calibrate_modulator(session.devices, (2.0, 1.6), 0.18, exposure_s=0.2, window=128, beam_um=1.0)
    seen = 85
    result = run_beside(
        session,
        plan,
        seen,
        lambda start: ["calibrate", start["uid"], "--live", "--iterations", "1"],
        tmp_path / "modulator.png",
    )
    found = read_modulator(tmp_path / "modulator.cxi")
    assert found.metadata["run_uid"] == result.uid
    assert len(found.positions) > seen
    assert found.r2[-1] < 0.3


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
def test_a_crystal_is_reconstructed_while_it_rocks(session, tmp_path):
    from bcmi_beamline.plans import rocking_scan

    modulator = tmp_path / "modulator.cxi"

    def command(start):
        known_modulator(modulator, start["modulator_position_um"])
        words = ["reconstruct", start["uid"], "--follow", "--modulator", str(modulator)]
        return [*words, "--iterations", "2", "--preview", "8"]

    plan = rocking_scan(session.devices, 0.15, 0.0125, exposure_s=0.2, window=128)
    run_beside(session, plan, 22, command, tmp_path / "crystal.png")
    found = read_reconstruction(tmp_path / "crystal.cxi")
    assert found.configuration["followed"] and found.configuration["frames"] == 25
    assert found.support.any()
