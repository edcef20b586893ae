"""Ctrl-C while a scan is followed from the command line: what was drawn last is kept."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from test_modulation_engine import ANGLES, correlate, make_geometry, make_modulator, simulate

from bcmi_beamline import cli, data


@pytest.fixture
def interrupted(monkeypatch, capsys, tmp_path):
    """Follow frames that come in parts until Ctrl-C; returns (status, last line, where it was written)."""
    output = tmp_path / "crystal.cxi"

    def run(modulator, scans, *, wait_for_picture):
        def arriving(*_):
            yield from scans
            for _ in range(600 if wait_for_picture else 0):
                if output.with_suffix(".png").exists():
                    break
                time.sleep(0.05)
                yield scans[-1]
            raise KeyboardInterrupt

        data.write_modulator(tmp_path / "modulator.cxi", modulator)
        command = ["bcmi", "reconstruct", "0123456789", "--follow", "--preview", "9", "-o", str(output)]
        monkeypatch.setattr(sys, "argv", [*command, "--modulator", str(tmp_path / "modulator.cxi")])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        monkeypatch.setattr(data, "watch", arriving)
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err.strip().splitlines()[-1], output

    return run


def parts(scan, *sizes):
    cut = [slice(0, n) for n in sizes]
    return [replace(scan, frames=scan.frames[c], angles_deg=scan.angles_deg[c]) for c in cut]


def test_an_interruption_keeps_the_crystal_drawn_last(interrupted):
    scan = simulate(make_geometry(), ANGLES)
    modulator = make_modulator(scan.geometry)
    status, line, output = interrupted(modulator, parts(scan, 20, 30), wait_for_picture=True)
    assert status == 130
    assert line.startswith("bcmi: interrupted: ") and line.endswith("holds the crystal as drawn last")
    found = data.read_reconstruction(output)
    assert 9 <= found.configuration["frames"] <= 30
    assert correlate(found) > 0.8


def test_an_interruption_before_the_first_picture_writes_nothing(interrupted):
    scan = simulate(make_geometry(), np.array([-0.1, -0.0875]))
    status, line, output = interrupted(make_modulator(scan.geometry), [scan], wait_for_picture=False)
    assert (status, line) == (130, "bcmi: interrupted: no crystal was drawn yet")
    assert not output.exists()
