"""A plan file is read, dry-run and judged; what fails the dry run never reaches the simulated beamline."""

from pathlib import Path

import pytest
from event_model import compose_run

from bcmi_beamline.config import load_beamline
from bcmi_beamline.rehearsal import DocumentCheck, plans_of_file, rehearse

NIGHT = Path(__file__).parents[1] / "examples" / "night.py"


def write(tmp_path, text):
    path = tmp_path / "plans.py"
    path.write_text(text)
    return path


def test_the_plans_of_a_file_are_its_own_public_ones(tmp_path):
    path = write(
        tmp_path,
        "from bcmi_beamline.plans import rocking_scan\n"
        "def tonight(devices): yield\n"
        "def _part(devices): yield\n"
        "def helper(x): return x\n"
        "def other(motor): yield\n",
    )
    assert list(plans_of_file(path)) == ["tonight"]
    assert list(plans_of_file(NIGHT)) == ["rock_with_and_without"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", "defines no plan"),
        ("import nothing_of_that_name\n", "cannot be imported: ModuleNotFoundError"),
        ("def broken(:\n", "cannot be imported: SyntaxError"),
    ],
)
def test_a_file_without_plans_is_one_clear_line(tmp_path, text, says):
    with pytest.raises(ValueError, match=says) as error:
        plans_of_file(write(tmp_path, text))
    assert "plans.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_plan_beyond_the_limits_fails_before_anything_is_started(tmp_path):
    path = write(
        tmp_path,
        "from bluesky import plan_stubs as bps\n"
        "def too_close(devices): yield from bps.mv(devices.nanogoniometer.z, 100.0)\n",
    )
    (report,) = rehearse(plans_of_file(path), load_beamline(), directory=tmp_path)
    assert not report.passed
    assert any("nanogoniometer_z: 100 um lies outside" in problem for problem in report.problems)
    assert report.runs == 0
    assert not (tmp_path / "documents").exists()


def test_documents_are_held_against_their_schemas():
    check = DocumentCheck()
    run = compose_run()
    check("start", run.start_doc)
    stop = run.compose_stop(exit_status="fail", reason="the beam was lost")
    check("stop", stop)
    check("stop", {key: value for key, value in stop.items() if key != "time"})
    assert check.counts == {"start": 1, "stop": 2}
    assert "ended with fail: the beam was lost" in check.problems[0]
    assert any("'time' is a required property" in problem for problem in check.problems)
