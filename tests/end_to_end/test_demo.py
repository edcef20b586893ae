"""The closed loop as a user runs it: motors, frames, catalogue, reconstruction, truth."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]  # hung, not slow


def _demo(out: Path, *more: str, **options) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "bcmi_beamline.cli",
        "demo",
        "--preset",
        "small",
        "--out",
        str(out),
        *more,
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EPICS_")}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def _children_of(folder: Path) -> list[int]:
    """Processes whose command line names `folder`: whatever the demonstration started for itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    process = _demo(out)
    stdout, stderr = process.communicate(timeout=840)
    assert process.returncode == 0, stderr[-3000:]
    return out, json.loads((out / "summary.json").read_text()), stdout


def test_the_crystal_is_right_with_what_the_calibration_found(demo):
    _, summary, _ = demo
    assert summary["bcmi"]["correlation"] > 0.9
    assert summary["bcmi"]["class"] == "correct"


def test_alignment_and_calibration_found_what_was_hidden(demo):
    from bcmi_beamline.config import load_preset

    _, summary, _ = demo
    hidden = load_preset("small").sim.hidden
    assert summary["alignment"]["mchi_deg"] == pytest.approx(hidden.mchi_deg, abs=0.3)
    assert summary["alignment"]["mphi_deg"] == pytest.approx(hidden.mphi_deg, abs=0.3)
    assert abs(summary["calibration"]["d1_um"] - summary["truth"]["d1_um"]) < 15
    assert summary["calibration"]["phase_step_rad"] == pytest.approx(2.47, abs=0.1)


def test_everything_promised_is_written(demo):
    out, _, stdout = demo
    assert "report.html" in stdout
    page = (out / "report.html").read_text()
    assert page.count("<figure>") >= 6
    assert {"modulator.cxi", "bcmi.cxi", "bcdi.cxi", "truth.cxi"} <= {p.name for p in out.iterdir()}
    with h5py.File(out / "bcmi.cxi") as file:
        assert file["entry_1/image_1/data"].ndim == 3
    assert len(list((out / "figures").glob("*.png"))) >= 6


def test_bcdi_is_reported_beside_it(demo):
    _, summary, _ = demo
    assert 0 <= summary["bcdi"]["correlation"] <= 1
    assert summary["bcdi"]["class"] in {"correct", "conjugated", "incorrect"}


def test_nothing_is_left_running(demo):
    out, _, _ = demo
    assert _children_of(out.parent) == []


def test_ctrl_c_stops_everything(tmp_path):
    process = _demo(tmp_path / "out", start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("session/frames/*.h5")):
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < deadline, "no frame within a minute"
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    deadline = time.monotonic() + 10
    while _children_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _children_of(tmp_path) == []
