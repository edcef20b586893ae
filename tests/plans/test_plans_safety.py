"""What is left behind is made safe in the right order: light off first, then motion, then the detector."""

from bluesky.simulators import RunEngineSimulator

from bcmi_beamline.config import load_beamline
from bcmi_beamline.plans import dry_run, make_safe, rocking_scan
from bcmi_beamline.plans.dry_run import stand_in_devices


def test_the_shutter_closes_before_anything_is_stopped():
    devices = stand_in_devices(load_beamline())
    messages = RunEngineSimulator().simulate_plan(make_safe(devices))
    first = next(message for message in messages if message.command in ("set", "stop"))
    assert (first.obj, first.args[0]) == (devices.shutter, 0)
    stopped = [message.obj.name for message in messages if message.command == "stop"]
    assert stopped[-1] == "eiger"
    assert {f"nanogoniometer_{axis}" for axis in ("x", "y", "z", "mchi", "mphi")} <= set(stopped)
    assert "diffractometer_phi" in stopped
    assert not any(message.command == "set" and message.obj is not devices.shutter for message in messages)


def test_a_dry_run_prints_its_numbers_and_not_its_path():
    fine = repr(dry_run(rocking_scan, load_beamline(), exposure_s=0.5))
    assert "rocking_scan" in fine and "201 frames" in fine and "nothing speaks against it" in fine
    assert len(fine.splitlines()) < 12
    refused = repr(dry_run(rocking_scan, load_beamline(), exposure_s=-1.0))
    assert "problem: exposure_s: -1.0 s" in refused
