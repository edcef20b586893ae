"""The simulated beamline as a process: it starts, says why when it cannot, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import hdf5plugin  # noqa: F401
import pytest

pytestmark = pytest.mark.ioc

TIMEOUT_S = 60.0

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("EPICS_")}


def run(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with ports of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=CLEAN, capture_output=True, text=True, timeout=TIMEOUT_S, **options,
    )  # fmt: skip


def ioc(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line of the IOC."""
    return run("import sys; from bcmi_beamline.sim.ioc.__main__ import main; sys.exit(main())", *arguments)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int) -> bool:
    """Whether a process ends within the time allowed."""
    deadline = time.monotonic() + TIMEOUT_S
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


START = """
import sys, os, time
from bcmi_beamline.sim.launch import SimulatedBeamline
"""

ARM = """
from caproto.sync.client import write, read
def put(name, value): write("ID01:eiger:cam1:" + name, value, notify=True, timeout=20, repeater=False)
put("ManualTrigger", 1); put("NumTriggers", 5); put("AcquireTime", 0.1)
write("ID01:eiger:cam1:Acquire", 1, notify=False, repeater=False)
while read("ID01:eiger:cam1:Armed", repeater=False).data[0] != b"Armed": time.sleep(0.01)
put("Trigger", 1)
"""


def test_it_is_gone_after_the_block_and_its_files_are_closed(tmp_path):
    code = START + "with SimulatedBeamline('small', data_dir=sys.argv[1]) as running:\n"
    code += "".join(f"    {line}\n" for line in (*ARM.strip().splitlines(), "print(running.pid)"))
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not is_running(int(done.stdout))
    with h5py.File(tmp_path / "series_1_data_000001.h5") as file:  # a file left open would be refused
        assert file["entry/data/data"].shape == (1, 2164, 1030)
    with h5py.File(tmp_path / "series_1_master.h5") as file:
        assert list(file["entry/data"]) == ["data_000001"]


def test_it_is_gone_after_an_exception(tmp_path):
    code = START + "with SimulatedBeamline('small', data_dir=sys.argv[1]) as running:\n"
    code += "    print(running.pid, flush=True)\n    raise KeyboardInterrupt\n"
    done = run(code, str(tmp_path))
    assert "KeyboardInterrupt" in done.stderr
    assert not is_running(int(done.stdout))


def test_an_ioc_that_dies_leaves_its_clients_alone_and_its_files_closed(tmp_path):
    code = START + "with SimulatedBeamline('small', data_dir=sys.argv[1]) as running:\n"
    dies = (
        "children = open(f'/proc/{running.pid}/task/{running.pid}/children').read()",
        "write('ID01:Sim:IOC:Die', 1, notify=False, repeater=False)",
        "running._process.wait(20)",
        "try: read('ID01:ring:current', timeout=0.5, repeater=False)",
        "except TimeoutError: print(running.pid, children)",
    )
    code += "".join(f"    {line}\n" for line in (*ARM.strip().splitlines(), *dies))
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    pid, camera = map(int, done.stdout.split())
    assert not is_running(pid)
    assert gone(camera)
    with h5py.File(tmp_path / "series_1_data_000001.h5") as file:  # a file left open would be refused
        assert file["entry/data/data"].shape == (1, 2164, 1030)


@pytest.fixture
def launcher(tmp_path):
    """A process that has started the simulated beamline and waits; with the beamline's pid."""
    code = START + "running = SimulatedBeamline('small', data_dir=sys.argv[1]).start()\n"
    # short naps: one long sleep is not woken by a signal that comes just before it begins
    code += "print(running.pid, flush=True)\nwhile True: time.sleep(0.1)\n"
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(
        command, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    yield process, int(line)
    process.kill()
    process.communicate()


def test_neither_it_nor_its_camera_outlives_a_parent_that_was_killed(launcher):
    process, pid = launcher
    (camera,) = children(pid)  # the process that makes the frames, and no other
    process.kill()
    assert gone(pid) and gone(camera)


def test_control_c_in_the_terminal_leaves_it_to_its_parent(launcher):
    process, pid = launcher
    assert os.getpgid(pid) != os.getpgid(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert gone(process.pid)
    assert gone(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_cleanly_when_told(tmp_path, number):
    command = [sys.executable, "-m", "bcmi_beamline.sim.ioc", "--data-dir", str(tmp_path)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = CLEAN | {"EPICS_CA_SERVER_PORT": str(free.getsockname()[1])}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving")
        process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert errors == ""


# -- what can go wrong ----------------------------------------------------------------------------
def test_a_start_that_fails_ends_with_the_last_words_of_the_log(tmp_path):
    code = START + (
        "from pathlib import Path\n"
        "data = Path(sys.argv[1]) / 'data'\n"
        "beamline = SimulatedBeamline('small', data_dir=data, time_scale=-1.0)\n"
        "try: beamline.start()\n"
        "except RuntimeError as error: print(type(error).__name__, error, beamline.pid)\n"
    )
    done = run(code, str(tmp_path))
    assert "LaunchError" in done.stdout, done.stderr
    assert "--time-scale must be positive" in done.stdout
    assert "ioc.log" in done.stdout
    assert done.stdout.rstrip().endswith("None")


def test_ports_must_be_claimed_before_channel_access_has_read_its_environment():
    code = (
        "import epics; epics.ca.initialize_libca()\n"
        "from bcmi_beamline.sim.launch import claim_ports\n"
        "try: claim_ports()\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = run(code)
    assert done.stdout.strip() == (
        "call claim_ports() before ophyd or epics is imported: libca has started"
    ), done.stderr


def test_claiming_twice_changes_nothing():
    code = (
        "import os\nfrom bcmi_beamline.sim.launch import claim_ports\n"
        "first = claim_ports(), dict(os.environ)\n"
        "assert (claim_ports(), dict(os.environ)) == first\n"
        "assert os.environ['EPICS_CA_SERVER_PORT'] != os.environ['EPICS_CA_REPEATER_PORT']\n"
        "assert os.environ['EPICS_CA_ADDR_LIST'] == '127.0.0.1'\n"
    )
    assert run(code).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--preset", "nonsense"], "no preset named 'nonsense'"),
        (["--beamline", "nowhere.toml"], "nowhere.toml: cannot be read"),
        (["--time-scale", "0"], "--time-scale must be positive, not 0.0"),
        (["--data-dir", "/dev/null/frames"], "/dev/null/frames"),
        (["--preset", "small", "--time-scale", "nan"], "--time-scale must be positive, not nan"),
    ],
)
def test_bad_input_gets_one_line_and_status_two(arguments, complaint):
    done = ioc(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert complaint in done.stderr


def test_an_experiment_that_cannot_be_simulated_gets_one_line_too(tmp_path):
    from bcmi_beamline.config import load_preset

    preset = load_preset("small")
    crystal = preset.sim.crystal.model_copy(update={"array": tmp_path / "crystal.npy"})
    preset = preset.model_copy(update={"sim": preset.sim.model_copy(update={"crystal": crystal})})
    (tmp_path / "preset.json").write_text(preset.model_dump_json())
    done = ioc("--preset", str(tmp_path / "preset.json"), "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "crystal.npy" in done.stderr


def test_it_lists_its_process_variables_under_the_prefix_asked_for(tmp_path):
    done = ioc("--list-pvs", "--prefix", "TEST:", "--data-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert all(name.startswith("TEST:") for name in names)
    assert {"TEST:nano:x", "TEST:huber:phi", "TEST:eiger:cam1:Acquire", "TEST:shutter:open"} <= set(names)
