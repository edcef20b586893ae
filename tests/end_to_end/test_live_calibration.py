"""`bcmi calibrate --live` in a process of its own, beside a session that is still scanning."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from bcmi_beamline.data import read_modulator
from bcmi_beamline.session import open_session

SEEN_BY_THEN = 110
"""Points at which the scan waits for the calibration's first picture."""


@pytest.mark.end_to_end
@pytest.mark.timeout(240)
def test_a_scan_is_calibrated_while_it_runs(tmp_path):
    from bcmi_beamline.plans import calibrate_modulator, find_bragg_peak, insert_modulator

    modulator, picture = tmp_path / "modulator.cxi", tmp_path / "modulator.png"
    started: list[subprocess.Popen] = []
    drawn_at: list[int] = []

    def calibrate_beside(name, document):
        if name == "start":
            command = [sys.executable, "-m", "bcmi_beamline.cli", "calibrate", document["uid"], "--live"]
            command += ["--iterations", "1", "--directory", str(tmp_path), "-o", str(modulator)]
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
        token = session.RE.subscribe(calibrate_beside)
        result = session.run(
            calibrate_modulator(session.devices, (2.2, 1.8), 0.18, exposure_s=0.2, window=128, beam_um=1.0)
        )
        session.RE.unsubscribe(token)
        session.flush()
        text, _ = started[0].communicate(timeout=120)
    assert started[0].returncode == 0, text
    assert drawn_at == [SEEN_BY_THEN], text
    found = read_modulator(modulator)
    assert found.metadata["run_uid"] == result.uid
    assert len(found.positions) > SEEN_BY_THEN
    assert found.r2[-1] < 0.3
