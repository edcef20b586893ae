"""Plans run in this process on the digital twin: physics and decisions without Channel Access."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from bluesky.utils import Msg, MsgGenerator

from bcmi_beamline.config import Beamline, Preset
from bcmi_beamline.devices._frames import FrameStatistics, Window
from bcmi_beamline.plans.dry_run import Rehearsal, stand_in_devices
from bcmi_beamline.sim import Twin


class TwinBench(Rehearsal):
    """Answers the messages of plans with frames of the twin; motors arrive where they are sent."""

    def __init__(self, beamline: Beamline, preset: Preset, start: Mapping[str, float] | None = None) -> None:
        super().__init__(beamline, start)
        self.twin = Twin(beamline, preset)
        self.devices = stand_in_devices(beamline)
        self.starts: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._statistics: FrameStatistics | None = None
        self._numbers: dict[str, float] = {}

    # -- messages ---------------------------------------------------------------------------------
    def do_prepare(self, msg: Msg) -> None:
        """The window that the next frames are looked at through."""
        super().do_prepare(msg)
        eiger = self.beamline.eiger
        self._window = Window(self.eiger.window, eiger.beam_row, eiger.beam_column).slices
        cutoff = self.twin.detector.count_cutoff(self.eiger.exposure_s)
        good = ~eiger.gap_mask()[self._window]
        self._statistics = FrameStatistics(good, cutoff, 2**eiger.bit_depth - 1, self.eiger.high_q_px)

    def do_trigger(self, msg: Msg) -> None:
        """A frame of the twin."""
        super().do_trigger(msg)
        assert self._statistics is not None
        self.image = self.twin.frame(self.pose_of_twin(), self.eiger.exposure_s, self.time)[self._window]
        self._numbers = self._statistics(self.image)

    def frame(self) -> dict[str, float]:
        """Statistics of the last frame."""
        return {f"eiger_{key}": value for key, value in self._numbers.items()} | {
            "eiger_frame": self.frames - 1
        }

    def do_open_run(self, msg: Msg) -> str:
        """Keep what the start document says."""
        self.starts.append(dict(msg.kwargs))
        self.runs += 1
        return str(uuid.uuid4())

    # -- where things are -------------------------------------------------------------------------
    def pose_of_twin(self) -> dict[str, float]:
        """Readings by the twin's names."""
        prefixes = ("nanogoniometer_", "diffractometer_")
        pose = {
            name.removeprefix(prefix): value
            for name, value in self.at.items()
            for prefix in prefixes
            if name.startswith(prefix)
        }
        pose |= {f"sample_{a}": self.at[f"sample_stage_{a}"] for a in "xyz"}
        return {k: v for k, v in pose.items() if k in self.twin.nominal_pose()} | {
            "shutter": self.at["shutter"]
        }

    def run(self, plan: MsgGenerator[Any]) -> Any:
        """Drive `plan` to its end; errors go into the plan, as the RunEngine does it."""
        try:
            message = next(plan)
            while True:
                try:
                    answer = self(message)
                except Exception as error:
                    message = plan.throw(error)
                else:
                    message = plan.send(answer)
        except StopIteration as end:
            return end.value


def tilted_preset(preset: Preset, mchi_deg: float, mphi_deg: float, seed: int) -> Preset:
    """`preset` with a modulator that is perpendicular at these readings.

    Its pattern, squareness to the stage (0.1 deg), pivot (50 um) and all noise differ from seed to seed.
    """
    sim = preset.sim
    rng = np.random.default_rng([seed, 77])
    about_x, about_y = (float(v) for v in rng.normal(0, 0.1, 2))
    hidden = sim.hidden.model_copy(
        update={
            "mchi_deg": mchi_deg + about_x,
            "mphi_deg": mphi_deg + about_y,
            "squareness_deg": (about_x, about_y),
            "pivot_um": tuple(float(v) for v in rng.normal(0, 50, 3)),
        }
    )
    modulator = sim.modulator.model_copy(update={"seed": 1000 + seed})
    nuisances = sim.nuisances.model_copy(update={"seed": 2000 + seed})
    return preset.model_copy(
        update={
            "sim": sim.model_copy(update={"hidden": hidden, "modulator": modulator, "nuisances": nuisances})
        }
    )
