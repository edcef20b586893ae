"""Bluesky plans: align the modulator, find the peak, calibrate, rock, and the experiment that does it all.

Plans take `Devices` first, only yield messages, check their arguments before anything moves and return what
they found. Trajectories and fits are pure functions.
"""

from bcmi_beamline.plans.alignment import (
    AlignmentResult,
    Pattern,
    PivotCalibration,
    TiltCurve,
    ZWalk,
    align_modulator,
    calibrate_pivot,
    centre_pattern,
    z_walk,
)
from bcmi_beamline.plans.bragg import BraggPeak, CrystalPosition, centre_crystal, find_bragg_peak
from bcmi_beamline.plans.calibration import CalibrationResult, calibrate_modulator
from bcmi_beamline.plans.dose import Dose, dose
from bcmi_beamline.plans.dry_run import DryRun, dry_run
from bcmi_beamline.plans.experiment import CampaignResult, ExperimentResult, bcmi_campaign, bcmi_experiment
from bcmi_beamline.plans.fits import (
    EdgeFit,
    LineFit,
    PeakFit,
    PoorFit,
    SharpnessFit,
    SlabFit,
    find_peak,
    fit_edge,
    fit_line,
    fit_sharpness,
    fit_slab,
)
from bcmi_beamline.plans.modulator import ModulatorError, insert_modulator, retract_modulator
from bcmi_beamline.plans.preprocessors import make_safe, safe_state_wrapper, scan_metadata
from bcmi_beamline.plans.rocking import RockingResult, StaleCalibration, rocking_scan
from bcmi_beamline.plans.trajectories import PathReport, report_path, rocking_angles, spiral

__all__ = [
    "AlignmentResult",
    "BraggPeak",
    "CalibrationResult",
    "CampaignResult",
    "CrystalPosition",
    "Dose",
    "DryRun",
    "EdgeFit",
    "ExperimentResult",
    "LineFit",
    "ModulatorError",
    "PathReport",
    "Pattern",
    "PeakFit",
    "PivotCalibration",
    "PoorFit",
    "RockingResult",
    "SharpnessFit",
    "SlabFit",
    "StaleCalibration",
    "TiltCurve",
    "ZWalk",
    "align_modulator",
    "bcmi_campaign",
    "bcmi_experiment",
    "calibrate_modulator",
    "calibrate_pivot",
    "centre_crystal",
    "centre_pattern",
    "dose",
    "dry_run",
    "find_bragg_peak",
    "find_peak",
    "fit_edge",
    "fit_line",
    "fit_sharpness",
    "fit_slab",
    "insert_modulator",
    "make_safe",
    "report_path",
    "retract_modulator",
    "rocking_angles",
    "rocking_scan",
    "safe_state_wrapper",
    "scan_metadata",
    "spiral",
    "z_walk",
]
