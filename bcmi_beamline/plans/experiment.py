"""The whole experiment: peak, alignment, calibration, rocking with the modulator and without it."""

from dataclasses import dataclass
from typing import Any

from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import PlanSettings, load_preset
from bcmi_beamline.devices import Devices
from bcmi_beamline.plans.alignment import AlignmentResult, align_modulator
from bcmi_beamline.plans.bragg import BraggPeak, find_bragg_peak
from bcmi_beamline.plans.calibration import CalibrationResult, calibrate_modulator
from bcmi_beamline.plans.modulator import insert_modulator, retract_modulator
from bcmi_beamline.plans.rocking import RockingResult, rocking_scan


@dataclass(frozen=True)
class ExperimentResult:
    """What each act found, and its runs."""

    bragg: BraggPeak
    alignment: AlignmentResult
    calibration: CalibrationResult
    rocking_in: RockingResult
    rocking_out: RockingResult

    @property
    def uids(self) -> dict[str, tuple[str, ...]]:
        """Run uids by act, in the order they were taken."""
        return {
            "bragg": (self.bragg.uid,),
            "alignment": self.alignment.uids,
            "calibration": (self.calibration.uid,),
            "rocking_in": (self.rocking_in.uid,),
            "rocking_out": (self.rocking_out.uid,),
        }


def bcmi_experiment(
    devices: Devices,
    settings: PlanSettings | dict | str = "small",
    centre_deg: float | None = None,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[ExperimentResult]:
    """Find the Bragg peak, align and calibrate the modulator, rock with it, take it out, rock without it.

    Every run carries ``experiment_act`` in its start document. A failed act ends the experiment with its own
    error; the runs before it are complete.

    Parameters
    ----------
    devices : Devices
        The beamline.
    settings : PlanSettings, dict or str
        What to do: settings, the same as a dict, or the name of a preset or TOML file.
    centre_deg : float, optional
        Reading of the rocking circle to search the peak around; the nominal one where absent.
    metadata : dict, optional
        More keys for every start document.

    Returns
    -------
    ExperimentResult

    Raises
    ------
    ConfigError
        When there is no such preset.
    PoorFit
        When the peak is not found or the modulator cannot be aligned.
    """
    plan = _settings(settings)

    def act(name: str) -> dict[str, Any]:
        return {**(metadata or {}), "experiment_act": name}

    yield from bps.checkpoint()
    yield from retract_modulator(devices)
    bragg = yield from find_bragg_peak(
        devices,
        half_range_deg=plan.find_half_range_deg,
        points=plan.find_points,
        exposure_s=plan.find_exposure_s,
        centre_deg=centre_deg,
        window=plan.window,
        metadata=act("bragg"),
    )
    yield from bps.checkpoint()
    yield from insert_modulator(devices, plan.modulator_z_um)
    alignment = yield from align_modulator(
        devices,
        half_range_deg=plan.align_half_range_deg,
        points=plan.align_points,
        positions=plan.align_positions,
        exposure_s=plan.align_exposure_s,
        window=plan.window,
        metadata=act("alignment"),
    )
    yield from bps.checkpoint()
    calibration = yield from calibrate_modulator(
        devices,
        extent_um=plan.spiral_extent_um,
        step_um=plan.spiral_step_um,
        exposure_s=plan.spiral_exposure_s,
        window=plan.window,
        metadata=act("calibration"),
    )
    yield from bps.checkpoint()
    rocking = {
        "half_range_deg": plan.rocking_half_range_deg,
        "step_deg": plan.rocking_step_deg,
        "exposure_s": plan.rocking_exposure_s,
        "peak_deg": bragg.peak_deg,
        "window": plan.window,
    }
    rocking_in = yield from rocking_scan(
        devices,
        modulator="in",
        calibration=calibration.reference,
        metadata=act("rocking_in"),
        **rocking,
    )
    yield from bps.checkpoint()
    rocking_out = yield from rocking_scan(devices, modulator="out", metadata=act("rocking_out"), **rocking)
    return ExperimentResult(bragg, alignment, calibration, rocking_in, rocking_out)


def _settings(settings: PlanSettings | dict | str) -> PlanSettings:
    if isinstance(settings, str):
        return load_preset(settings).plan
    if isinstance(settings, dict):
        return PlanSettings.model_validate(settings)
    return settings
