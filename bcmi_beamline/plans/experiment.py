"""The whole experiment: peak, alignment, calibration, rocking with the modulator and without it."""

from dataclasses import dataclass
from typing import Any, Literal

from bluesky import plan_stubs as bps
from bluesky.utils import MsgGenerator

from bcmi_beamline.config import PlanSettings, load_preset
from bcmi_beamline.devices import Devices
from bcmi_beamline.plans.alignment import AlignmentResult, align_modulator
from bcmi_beamline.plans.bragg import BraggPeak, find_bragg_peak
from bcmi_beamline.plans.calibration import CalibrationResult, calibrate_modulator
from bcmi_beamline.plans.fits import PoorFit
from bcmi_beamline.plans.modulator import insert_modulator, retract_modulator
from bcmi_beamline.plans.preprocessors import check_target
from bcmi_beamline.plans.rocking import RockingResult, rocking_scan

Act = Literal["bragg", "alignment", "calibration", "rocking_in", "rocking_out"]
ACTS: tuple[Act, ...] = ("bragg", "alignment", "calibration", "rocking_in", "rocking_out")


@dataclass(frozen=True)
class ExperimentResult:
    """What each act found, and its runs; None for an act that was not asked for."""

    bragg: BraggPeak
    alignment: AlignmentResult
    calibration: CalibrationResult
    rocking_in: RockingResult
    rocking_out: RockingResult

    @property
    def uids(self) -> dict[str, tuple[str, ...]]:
        """Run uids by act, in the order they were taken."""
        found: dict[str, tuple[str, ...]] = {}
        for act in ACTS:
            result: Any = getattr(self, act)
            if result is not None:
                found[act] = result.uids if act == "alignment" else (result.uid,)
        return found

    def __repr__(self) -> str:
        return "\n".join(str(getattr(self, act)) for act in ACTS if getattr(self, act) is not None)


@dataclass(frozen=True)
class CampaignResult:
    """Experiments by the name of the crystal."""

    results: dict[str, ExperimentResult]
    failures: dict[str, str]
    """Why a crystal could not be measured."""

    def __repr__(self) -> str:
        lines = [f"{name}:\n{result}" for name, result in self.results.items()]
        return "\n".join(lines + [f"{name}: {why}" for name, why in self.failures.items()])


def bcmi_experiment(
    devices: Devices,
    settings: PlanSettings | dict | str = "small",
    centre_deg: float | None = None,
    first_act: Act = "bragg",
    calibration: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[ExperimentResult]:
    """Find the Bragg peak, align and calibrate the modulator, rock with it, take it out, rock without it.

    Every run carries ``experiment_act`` in its start document, and there is a checkpoint after each act. A
    failed act ends the experiment with its own error; the runs before it are complete, and `first_act` takes
    it up again.

    Parameters
    ----------
    devices : Devices
        The beamline.
    settings : PlanSettings, dict or str
        What to do: settings, the same as a dict, or the name of a preset or TOML file.
    centre_deg : float, optional
        Reading of the rocking circle to search the peak around; the nominal one where absent.
    first_act : {"bragg", "alignment", "calibration", "rocking_in", "rocking_out"}
        Where to begin; the circle is at the peak then, and the modulator aligned from "calibration" on.
    calibration : dict, optional
        What "rocking_in" relies on when it is the first act (`CalibrationResult.reference`).
    metadata : dict, optional
        More keys for every start document.

    Returns
    -------
    ExperimentResult
        None for the acts before the first.

    Raises
    ------
    ConfigError
        When there is no such preset.
    ValueError
        When "rocking_in" comes first without a calibration.
    PoorFit
        When the peak is not found or the modulator cannot be aligned.
    """
    plan = _settings(settings)
    if first_act not in ACTS or (first_act == "rocking_in" and calibration is None):
        raise ValueError(
            f"experiment: first_act {first_act!r} is one of {', '.join(ACTS)}; rocking_in needs a calibration"
        )
    acts = ACTS[ACTS.index(first_act) :]
    found: dict[str, Any] = dict.fromkeys(ACTS)

    def act(name: str) -> dict[str, Any]:
        return {**(metadata or {}), "experiment_act": name}

    yield from bps.checkpoint()
    if "bragg" in acts:
        yield from retract_modulator(devices)
        found["bragg"] = yield from find_bragg_peak(
            devices,
            half_range_deg=plan.find_half_range_deg,
            points=plan.find_points,
            exposure_s=plan.find_exposure_s,
            centre_deg=centre_deg,
            window=plan.window,
            metadata=act("bragg"),
        )
        yield from bps.checkpoint()
    if "alignment" in acts:
        yield from insert_modulator(devices, plan.modulator_z_um)
        found["alignment"] = yield from align_modulator(
            devices,
            half_range_deg=plan.align_half_range_deg,
            points=plan.align_points,
            positions=plan.align_positions,
            exposure_s=plan.align_exposure_s,
            window=plan.window,
            metadata=act("alignment"),
        )
        yield from bps.checkpoint()
    if "calibration" in acts:
        found["calibration"] = yield from calibrate_modulator(
            devices,
            extent_um=plan.spiral_extent_um,
            step_um=plan.spiral_step_um,
            exposure_s=plan.spiral_exposure_s,
            window=plan.window,
            metadata=act("calibration"),
        )
        calibration = found["calibration"].reference
        yield from bps.checkpoint()
    rocking = {
        "half_range_deg": plan.rocking_half_range_deg,
        "step_deg": plan.rocking_step_deg,
        "exposure_s": plan.rocking_exposure_s,
        "peak_deg": found["bragg"].peak_deg if found["bragg"] else None,
        "window": plan.window,
    }
    if "rocking_in" in acts:
        found["rocking_in"] = yield from rocking_scan(
            devices, modulator="in", calibration=calibration, metadata=act("rocking_in"), **rocking
        )
        yield from bps.checkpoint()
    found["rocking_out"] = yield from rocking_scan(
        devices, modulator="out", metadata=act("rocking_out"), **rocking
    )
    yield from bps.checkpoint()
    return ExperimentResult(**found)


def bcmi_campaign(
    devices: Devices,
    crystals: list[dict[str, Any]] | None = None,
    settings: PlanSettings | dict | str = "small",
    metadata: dict[str, Any] | None = None,
) -> MsgGenerator[CampaignResult]:
    """All acts for one crystal after another; one that cannot be measured does not stop the others.

    The modulator is out while the sample stage goes to the next crystal.

    Parameters
    ----------
    devices : Devices
        The beamline.
    crystals : list of dict
        ``name``, goes into the start documents as ``sample``; where the stage puts it into the beam,
        ``x_um``, ``y_um``, ``z_um`` (as it stands where absent); ``centre_deg``, where to search
        its peak (optional).
    settings : PlanSettings, dict or str
        What to do with each, as for `bcmi_experiment`.
    metadata : dict, optional
        More keys for every start document.

    Returns
    -------
    CampaignResult

    Raises
    ------
    ValueError
        Before anything moves: no crystals, two of one name, a key that is none, a place beyond the limits.
    """
    plan = _settings(settings)
    places = [_place(devices, crystal) for crystal in crystals or []]
    names = [str(crystal["name"]) for crystal in crystals or []]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"crystals: give each a name of its own, not {names}")
    results: dict[str, ExperimentResult] = {}
    failures: dict[str, str] = {}
    for crystal, name, place in zip(crystals or [], names, places, strict=True):
        yield from bps.checkpoint()
        yield from retract_modulator(devices)
        stage = devices.sample_stage
        if place:
            yield from bps.mv(
                *(item for axis, value in place.items() for item in (getattr(stage, axis), value))
            )
        try:
            results[name] = yield from bcmi_experiment(
                devices,
                plan,
                centre_deg=crystal.get("centre_deg"),
                metadata={**(metadata or {}), "sample": name},
            )
        except PoorFit as error:
            failures[name] = str(error)
    yield from retract_modulator(devices)
    return CampaignResult(results, failures)


def _place(devices: Devices, crystal: dict[str, Any]) -> dict[str, float]:
    """Where the sample stage puts a crystal into the beam; refuses what is not understood."""
    known = {"name", "x_um", "y_um", "z_um", "centre_deg"}
    if "name" not in crystal or not set(crystal) <= known:
        raise ValueError(
            f"crystals: {crystal} needs a name and may have {', '.join(sorted(known - {'name'}))}"
        )
    place = {axis: float(crystal[f"{axis}_um"]) for axis in "xyz" if f"{axis}_um" in crystal}
    for axis, value in place.items():
        limits = getattr(devices.beamline.sample_stage, axis)
        check_target(f"{crystal['name']}: sample_stage {axis}", value, limits.low, limits.high)
    return place


def _settings(settings: PlanSettings | dict | str) -> PlanSettings:
    if isinstance(settings, str):
        return load_preset(settings).plan
    if isinstance(settings, dict):
        return PlanSettings.model_validate(settings)
    return settings
