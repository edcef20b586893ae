"""The documents of every plan follow the event model's schemas, taken on an ideal beamline."""

import importlib

import event_model
import pytest
from bluesky import Msg, RunEngine
from ophyd.status import Status

from bcmi_beamline.config import load_beamline, load_preset
from bcmi_beamline.plans import dry_run
from bcmi_beamline.session import list_plans

rehearsal = importlib.import_module("bcmi_beamline.plans.dry_run")  # the function has the module's name

FEW = load_preset("small").plan.model_copy(
    update={
        "align_points": 9,
        "align_positions": 1,
        "find_points": 9,
        "spiral_extent_um": (2.0, 2.0),
        "spiral_step_um": 0.3,
        "rocking_half_range_deg": 0.03,
    }
)
SHORT = {
    "align_modulator": {"points": 7, "walk": False, "pivot": False},
    "bcmi_campaign": {"crystals": [{"name": "a", "x_um": 0.0, "y_um": 0.0}], "settings": FEW},
    "bcmi_experiment": {"settings": FEW},
    "calibrate_modulator": {"extent_um": (2.0, 2.0), "step_um": 0.3},
    "rocking_scan": {"half_range_deg": 0.02},
}


def done():
    status = Status()
    status.set_finished()
    return status


class Playing(rehearsal._StandIn):
    """A stand-in that a RunEngine can use: the rehearsal answers for it."""

    bench = None

    def _tell(self, command, *args, **kwargs):
        return self.bench(Msg(command, self, *args, **kwargs))

    def set(self, value, **_):
        self._tell("set", value, group="g")
        self._tell("wait", group="g")
        return done()

    def prepare(self, plan):
        self._tell("prepare", plan)
        return done()

    def trigger(self):
        self._tell("trigger", group="g")
        self._tell("wait", group="g")
        return done()

    def stage(self):
        self._tell("stage")
        return [self]

    def unstage(self):
        self._tell("unstage")
        return [self]

    def stop(self, success=False):
        pass

    def read(self):
        return self._tell("read")

    def describe(self):
        kinds = {int: "integer", float: "number", str: "string"}
        return {
            key: {"source": "rehearsal", "shape": [], "dtype": kinds.get(type(reading["value"]), "number")}
            for key, reading in self.read().items()
        }

    def read_configuration(self):
        return {}

    def describe_configuration(self):
        return {}


@pytest.mark.parametrize("name", sorted(list_plans()))
def test_documents_follow_the_event_model(name, monkeypatch):
    monkeypatch.setattr(rehearsal, "_StandIn", Playing)
    beamline = load_beamline()
    Playing.bench = rehearsal.Rehearsal(beamline, None)
    devices, seen = rehearsal.stand_in_devices(beamline), []

    def validate(kind, doc):
        event_model.schema_validators[event_model.DocumentNames[kind]].validate(doc)
        seen.append(kind)

    RE = RunEngine({}, context_managers=[], call_returns_result=True)
    RE.subscribe(validate)
    result = RE(list_plans()[name](devices, **SHORT.get(name, {})))
    assert result.exit_status == "success"
    runs = dry_run(list_plans()[name], beamline, **SHORT.get(name, {})).runs
    assert seen.count("start") == seen.count("stop") == runs
    assert (seen.count("event") > 0) == (runs > 0)
