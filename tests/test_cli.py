"""The command line: what it prints, and that bad input is one line and status 2."""

import json
import sys

import h5py
import numpy as np
import pytest

from bcmi_beamline import cli


@pytest.fixture
def bcmi(monkeypatch, capsys):
    """Run ``bcmi`` with arguments in this process; returns (status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bcmi", *map(str, arguments)])
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        monkeypatch.delenv("BCMI_TRACEBACK", raising=False)
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "ioc",
        "dry-run",
        "run",
        "simulate",
        "calibrate",
        "reconstruct",
        "compare",
        "export",
        "report",
        "monitor",
        "replay",
        "serve",
    ],
)
def test_every_command_explains_itself(bcmi, command):
    status, out, _ = bcmi(command, "--help")
    assert status == 0
    assert "Usage" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["calibrate", "absent.cxi", "-o", "m.cxi"], "absent.cxi"),
        (["reconstruct", "absent.cxi", "-o", "r.cxi"], "absent.cxi"),
        (["reconstruct", "a.cxi", "--method", "bcmi", "-o", "r.cxi"], "--modulator"),
        (
            ["reconstruct", "a.cxi", "--modulator", "m.cxi", "--generations", "3", "-o", "r.cxi"],
            "belongs to bcdi",
        ),
        (["reconstruct", "a.cxi", "--method", "bcmi-paper", "-o", "r.cxi"], "--modulator"),
        (
            ["reconstruct", "a", "--modulator", "m", "--method", "bcmi-paper", "--coherence", "-o", "r"],
            "bcmi",
        ),
        (["reconstruct", "a", "--modulator", "m", "--follow", "--coherence", "-o", "r"], "finished scan"),
        (["reconstruct", "a", "--likelihood", "poisson", "-o", "r"], "are for bcmi"),
        (
            ["reconstruct", "a", "--modulator", "m", "--follow", "--refine-distance", "-o", "r"],
            "finished scan",
        ),
        (["compare", "absent.cxi", "truth.cxi"], "absent.cxi"),
        (["calibrate", "d41d8cd9", "-o", "m.cxi", "--directory", "nowhere"], "no catalogue"),
        (["export", "d41d8cd9", "-o", "m.cxi", "--directory", "nowhere"], "no catalogue"),
        (["simulate", "rocking", "--preset", "huge", "-o", "r.cxi"], "choose from"),
        (["dry-run", "dance"], "choose from"),
        (["dry-run", "rocking_scan", "speed=3"], "speed"),
        (["dry-run", "rocking_scan", "exposure_s=fast"], "exposure_s=fast"),
        (["dry-run", "rocking_scan", "exposure_s=-1"], "exposure_s"),
    ],
)
def test_bad_input_is_one_line_and_status_2(bcmi, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    status, _, err = bcmi(*arguments)
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # no half-written file


def test_dry_run_tells_the_paper_s_scan(bcmi):
    status, out, _ = bcmi("dry-run", "rocking_scan", "exposure_s=1.0", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["frames"] == 201
    assert told["exposure_s"] == pytest.approx(201)
    assert told["problems"] == []


def test_dry_run_draws_the_path(bcmi, tmp_path):
    status, _, err = bcmi("dry-run", "calibrate_modulator", "--picture", tmp_path / "path.png")
    assert status == 0, err
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")


def test_a_truncated_file_is_named(bcmi, tmp_path):
    whole = tmp_path / "whole.cxi"
    with h5py.File(whole, "w") as file:
        file["entry_1/data_1/data"] = np.ones((4, 16, 16), np.uint32)
    (tmp_path / "half.cxi").write_bytes(whole.read_bytes()[:900])
    status, _, err = bcmi("calibrate", tmp_path / "half.cxi", "-o", tmp_path / "m.cxi")
    assert status == 2
    assert "half.cxi" in err
    assert len(err.strip().splitlines()) == 1


def test_a_reconstruction_draws_the_crystal_as_trials_end(bcmi, tmp_path):
    from bcmi_beamline.data import write_rocking
    from bcmi_beamline.geometry import Geometry
    from bcmi_beamline.scans import RockingScan

    rng = np.random.default_rng(3)
    block = np.zeros((16, 32, 32))
    block[:5, :7, :6] = 1 + rng.random((5, 7, 6))
    frames = rng.poisson(np.abs(np.fft.fftshift(np.fft.fftn(block))) ** 2).astype(np.float32)
    angles, mask = (np.arange(16) - 8) * 0.02, np.zeros((32, 32), bool)
    write_rocking(tmp_path / "r.cxi", RockingScan(frames, angles, mask, Geometry(pixel_size=0.9e-3)))
    options = ["--trials", 1, "--iterations", 20, "--generations", 2, "--coherence", "--live"]
    status, _, err = bcmi("reconstruct", tmp_path / "r.cxi", "-o", tmp_path / "c.cxi", *options)
    assert status == 0, err
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with h5py.File(tmp_path / "c.cxi") as file:
        assert file["entry_1/image_1/data"].shape
    again = ["--trials", 1, "--iterations", 10, "--support", tmp_path / "c.cxi"]
    status, _, err = bcmi("reconstruct", tmp_path / "r.cxi", "-o", tmp_path / "d.cxi", *again)
    assert status == 0, err
