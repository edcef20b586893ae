"""What a session keeps and reports, without a beamline."""

import inspect
import json
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from bcmi_beamline.config import ConfigError, load_beamline
from bcmi_beamline.plans import dry_run
from bcmi_beamline.plans.bounds import parameter_bounds
from bcmi_beamline.session import RunProgress, StoredMetadata, bind_plans, list_plans, result_numbers


def test_metadata_survives_the_session(tmp_path):
    path = tmp_path / "metadata.json"
    first = StoredMetadata(path)
    first["scan_id"] = 41
    first["sample"] = "Pt on YSZ"
    del first["sample"]
    assert dict(StoredMetadata(path)) == {"scan_id": 41}


@pytest.mark.parametrize("text", ["{", "3", '"words"'])
def test_broken_metadata_is_one_clear_line(tmp_path, text):
    path = tmp_path / "metadata.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        StoredMetadata(path)
    assert "metadata.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_progress_counts_the_primary_stream_only():
    seen = []
    progress = RunProgress(lambda fraction, message: seen.append((fraction, message)))
    progress("start", {"scan_kind": "rocking", "num_points": 2})
    progress("descriptor", {"name": "baseline", "uid": "b"})
    progress("descriptor", {"name": "primary", "uid": "p"})
    progress("event", {"descriptor": "b", "data": {}})
    progress("event", {"descriptor": "p", "data": {"eiger_total": 1000}})
    progress("event", {"descriptor": "p", "data": {}})
    progress("stop", {"exit_status": "success"})
    assert [fraction for fraction, _ in seen] == [0.0, 0.5, 1.0, 1.0]
    assert "point 1 of 2, 1e+03 counts" in seen[1][1]
    assert "success" in seen[-1][1]


def test_bound_plans_lose_devices_and_keep_the_rest():
    plans = list_plans()
    assert {"align_modulator", "calibrate_modulator", "rocking_scan", "bcmi_experiment"} <= set(plans)
    bound = bind_plans(SimpleNamespace(beamline=load_beamline()))
    for name, plan in plans.items():
        names = list(inspect.signature(bound[name]).parameters)
        assert names == list(inspect.signature(plan).parameters)[1:]
        assert inspect.isgeneratorfunction(bound[name])


BOUNDED = [
    (name, parameter)
    for name, plan in list_plans().items()
    for parameter in inspect.signature(plan).parameters
    if parameter in parameter_bounds(load_beamline())
]


@pytest.mark.parametrize(("name", "parameter"), BOUNDED)
@pytest.mark.parametrize("end", [0, 1])
def test_what_the_queue_refuses_the_plan_refuses_too(name, parameter, end):
    beamline = load_beamline()
    low, high = parameter_bounds(beamline)[parameter]
    beyond = (low - 1, high + 1)[end]
    found = dry_run(list_plans()[name], beamline, **{parameter: beyond})
    assert found.problems, f"{name} takes {parameter}={beyond}"
    assert found.frames == 0


@dataclass
class Fit:
    """A plan's result as plans return it."""

    uid: str
    peak_deg: float
    error_deg: np.float64
    uids: tuple[str, ...]
    angles_deg: np.ndarray
    counts: tuple[float, ...]
    unknown: float = float("nan")


def test_a_result_becomes_its_numbers_without_the_curves():
    inner = Fit("a", 17.7, np.float64(0.01), ("b", "c"), np.arange(5.0), tuple(range(100)))
    found = result_numbers({"first": inner, "second": None})
    assert found == {"first": {"uid": "a", "peak_deg": 17.7, "error_deg": 0.01, "uids": ["b", "c"]}}
    assert json.loads(json.dumps(found)) == found
    assert result_numbers(None) is None
