"""The queue as a user has it: served by the command line, fed through the API, on the simulated beamline."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.data import load, open_catalog
from bcmi_beamline.queue import QueueClient, QueueError
from bcmi_beamline.reconstruction import modulation
from bcmi_beamline.reconstruction.metrics import compare
from bcmi_beamline.reconstruction.ptychography import calibrate
from bcmi_beamline.truth import true_object

pytestmark = pytest.mark.end_to_end

STARTUP = Path(__file__).parents[2] / "profile_collection" / "startup"
START_S = 150


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of a queue that is being served."""
    folder = tmp_path_factory.mktemp("queue")
    command = [sys.executable, "-m", "bcmi_beamline.cli", "queue", "serve", "--sim", "small"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EPICS_")}
    log = folder / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--directory", str(folder), "--time-scale", "0.002"],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + START_S
        while "session open" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield folder
        started = children(process.pid)
        for _ in range(2):  # an impatient second Ctrl-C changes nothing
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait(60) == 0, log.read_text()
        assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
        assert not (folder / "queue" / "service.json").exists()
    finally:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def queue(served):
    with QueueClient(served) as client:
        client.clear()
        yield client


def run(queue, plan, **arguments):
    """Queue one plan, run it, and return how it ended."""
    queue.submit(plan, arguments)
    queue.start()
    return queue.wait(timeout_s=120)["result"]


def children(pid):
    """Processes that a process has started, oldest first."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return sorted(int(word) for word in listed.stdout.split())


def worker_pid(folder):
    """The queue's worker: the youngest child of the manager's watchdog."""
    return children(child_with(folder, b"_manager"))[-1]


def child_with(folder, word):
    """The process of the service whose command line has `word` in it."""
    service = json.loads((folder / "queue" / "service.json").read_text())["pid"]
    (found,) = (p for p in children(service) if word in Path(f"/proc/{p}/cmdline").read_bytes())
    return found


def shutter_is_open(folder):
    """Asked of the beamline itself, past everything that was under test."""
    ports = json.loads((folder / "queue" / "service.json").read_text())["channel_access"]
    code = "from caproto.sync.client import read; print(read('ID01:shutter:open', repeater=False).data[0])"
    asked = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | ports, capture_output=True, text=True
    )
    assert asked.stdout.strip() in ("b'Open'", "b'Closed'"), asked.stderr
    return "Open" in asked.stdout


def start_long_scan(queue, folder):
    """A scan that would take minutes; back when its first points are logged."""
    before = set((folder / "documents").glob("*"))
    queue.submit("rocking_scan", {"half_range_deg": 0.5, "exposure_s": 10.0})
    queue.start()
    deadline = time.monotonic() + 60
    while not any('["event' in path.read_text() for path in set((folder / "documents").glob("*")) - before):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_committed_lists_are_those_of_the_startup_files(queue):
    committed = yaml.safe_load((STARTUP / "existing_plans_and_devices.yaml").read_text())
    for kind in ("plans", "devices"):
        served = getattr(queue._api, f"{kind}_existing")()[f"{kind}_existing"]
        assert committed[f"existing_{kind}"] == served, "make queue-lists writes them anew"


@pytest.mark.parametrize(
    ("plan", "arguments", "says"),
    [
        ("rocking_scan", {"half_range_deg": "wide"}, "half_range_deg"),
        ("rocking_scan", {"exposure_s": -1.0}, "exposure_s"),
        ("rocking_scan", {"exposures_s": 1.0}, "exposures_s"),
        ("rocking_scam", {}, "rocking_scam"),
        ("insert_modulator", {"z_um": 100.0}, "z_um"),
    ],
)
def test_what_cannot_be_done_is_not_queued(queue, plan, arguments, says):
    with pytest.raises(QueueError, match=says) as error:
        queue.submit(plan, arguments)
    assert "\n" not in str(error.value)
    assert queue.items() == ({}, [])


def test_a_result_is_there_for_the_next_plan_and_for_people(queue, served):
    assert run(queue, "find_bragg_peak", half_range_deg=0.06, points=25)["exit_status"] == "completed"
    found = queue.results()["find_bragg_peak"]
    assert found["peak_deg"] == pytest.approx(17.721, abs=0.005)
    ended = run(queue, "rocking_scan", half_range_deg=0.01, exposure_s=0.1)
    assert ended["exit_status"] == "completed"
    with open_catalog(served / "catalog", readable=[served / "frames"]) as catalog:
        start = catalog.run(ended["run_uids"][0]).metadata["start"]
    assert start["results"]["find_bragg_peak"] == found


def test_a_plan_that_fails_says_why_and_the_queue_stops(queue):
    queue.submit("rocking_scan", {"half_range_deg": 9.0, "step_deg": 0.1})
    queue.submit("find_bragg_peak")
    queue.start()
    queue.wait(timeout_s=60)
    result = queue.history()[-1]["result"]
    assert result["exit_status"] == "failed"
    assert "phi" in result["msg"]
    running, waiting = queue.items()
    assert not running
    assert [item["name"] for item in waiting] == ["rocking_scan", "find_bragg_peak"]


def test_an_aborted_plan_leaves_a_closed_run_and_the_next_plan_runs(queue, served):
    start_long_scan(queue, served)
    queue.abort()
    result = queue.history()[-1]["result"]
    assert result["exit_status"] == "aborted", result["msg"] + result["traceback"]
    assert not shutter_is_open(served)
    queue.clear()
    assert run(queue, "retract_modulator")["exit_status"] == "completed"


def test_a_killed_worker_is_replaced_and_the_queue_kept(queue, served):
    start_long_scan(queue, served)
    os.kill(worker_pid(served), signal.SIGKILL)
    queue.recover()
    assert not shutter_is_open(served)
    assert queue.status()["manager_state"] == "idle"
    queue.clear()
    assert run(queue, "find_bragg_peak", half_range_deg=0.06, points=25)["exit_status"] == "completed"


@pytest.mark.timeout(900)
def test_the_whole_experiment_through_the_queue_images_the_crystal(queue, served):
    queue.submit("bcmi_experiment", {"settings": "small"})
    queue.start()
    ended = queue.wait(timeout_s=600)["result"]
    assert ended["exit_status"] == "completed", ended["msg"]
    found = queue.results()["bcmi_experiment"]
    with open_catalog(served / "catalog", readable=[served / "frames"]) as catalog:
        spiral = load(found["calibration"]["uid"], catalog)
        rocking = load(found["rocking_in"]["uid"], catalog)
    crystal = modulation.reconstruct(rocking, calibrate(spiral, iterations=30, seed=0), trials=1, seed=0)
    against = compare(crystal, true_object(load_beamline(), load_preset("small")))
    assert against.verdict == "correct"
    assert against.correlation > 0.97


def test_a_lost_beamline_ends_the_plan_with_a_message_and_stops_the_queue(queue, served):
    start_long_scan(queue, served)
    queue.submit("find_bragg_peak")
    os.kill(child_with(served, b"sim.ioc"), signal.SIGKILL)
    queue.wait(timeout_s=120)
    result = queue.history()[-1]["result"]
    assert result["exit_status"] == "failed"
    assert "ID01:" in result["msg"]
    assert queue.items()[1][-1]["name"] == "find_bragg_peak"
