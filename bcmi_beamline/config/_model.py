"""The shape of the configuration files; every error names its file and key."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bcmi_beamline.geometry import Arm, Geometry

Positive = Annotated[float, Field(gt=0)]
Vector3 = tuple[float, float, float]
_Config = TypeVar("_Config", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line that says where and why."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AxisConfig(_Model):
    """One motor record: where it is, how far and how fast it may go."""

    pv: str
    unit: Literal["um", "mm", "deg", "keV"]
    low: float
    high: float
    velocity: Positive
    """Units per second."""
    tolerance: Positive
    """A move that ends further than this from its target has failed; same unit."""

    @model_validator(mode="after")
    def _ordered(self):
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class CircleConfig(AxisConfig):
    """A circle of the diffractometer: the laboratory axis it turns about and its sense."""

    axis: Literal["x", "y", "z"]
    sense: Literal[1, -1] = 1
    """+1: a positive angle turns right-handed about `axis`."""


class DiffractometerConfig(_Model):
    """Huber circles, outer to inner: mu, eta, phi carry the sample; nu, delta the detector.

    eta also carries the nanogoniometer.
    """

    mu: CircleConfig
    eta: CircleConfig
    phi: CircleConfig
    nu: CircleConfig
    delta: CircleConfig
    modulator_cone_deg: Positive = 2.0
    """With the modulator in, mu, eta, phi, nu and delta stay within this of the Bragg setting."""


class NanogoniometerConfig(_Model):
    """Modulator stage: three translations riding on two tilts, on the eta circle.

    Its frame at zero tilt is the detector frame (x', y', z') of the configured Bragg geometry. A point at
    stage coordinates p stands at ``R (p + t - c) + c`` with t the translations, c the pivot and
    ``R = R_y(mphi) R_x(mchi)``.
    """

    x: AxisConfig
    y: AxisConfig
    z: AxisConfig
    mchi: AxisConfig
    mphi: AxisConfig
    distance_at_z0_um: float = 0.0
    """Crystal to modulator when z reads 0 (as surveyed; calibration refines it)."""
    stand_off_um: Positive = 800.0
    """The modulator never comes closer to the crystal than this."""
    pivot_um: Vector3 = (0.0, 0.0, 0.0)
    """Surveyed point about which the tilts turn; origin on the beam axis at `distance_at_z0_um`."""
    positions: dict[Literal["in", "out", "park"], dict[Literal["x", "y", "z", "mchi", "mphi"], float]]

    @model_validator(mode="after")
    def _safe(self):
        if self.z.low + self.distance_at_z0_um < self.stand_off_um:
            raise ValueError("z.low would bring the modulator inside stand_off_um")
        for name, place in self.positions.items():
            for axis, value in place.items():
                limits = getattr(self, axis)
                if not limits.low <= value <= limits.high:
                    raise ValueError(
                        f"positions.{name}.{axis} = {value} lies outside [{limits.low}, {limits.high}]"
                    )
        return self


class SampleStageConfig(_Model):
    """Piezo stage that puts the crystal in the beam; laboratory x, y, z."""

    x: AxisConfig
    y: AxisConfig
    z: AxisConfig
    modulator_reach_um: Positive = 10.0
    """With the modulator in, no axis goes further than this from where it was as the modulator came in."""


class SuspendConfig(_Model):
    """Below these the plans wait for the beam to come back."""

    ring_current_ma: Positive | None = None
    monitor_flux: Positive | None = None
    """Photons per second."""
    settle_s: float = Field(default=10.0, ge=0)
    """How long the beam has to be back before a plan goes on."""


class SlitsConfig(_Model):
    """Slits before the focusing optics: the coherent part of the beam (the paper: 140 x 300 um)."""

    horizontal: AxisConfig
    """Gap along laboratory x."""
    vertical: AxisConfig
    """Gap along laboratory y."""
    horizontal_centre: AxisConfig
    vertical_centre: AxisConfig
    nominal_um: tuple[Positive, Positive] = (140.0, 300.0)
    """Gaps (horizontal, vertical) at which the beam at the crystal is as the experiment wants it."""


class MonochromatorConfig(_Model):
    """The energy of the beam, as one axis in keV."""

    energy: AxisConfig


class FocusConfig(_Model):
    """Compound refractive lenses: their place along the beam moves the focus."""

    z: AxisConfig
    nominal_mm: float = 0.0
    """Reading at which the focus lies on the crystal."""
    focal_length_m: Positive = 1.0
    """At the configured energy."""
    beam_um: tuple[Positive, Positive] = (1.5, 1.5)
    """Width (FWHM; horizontal, vertical) of the beam on the crystal, for the dose."""


class FilterConfig(_Model):
    """One absorber that can be put into the incident beam; its record is an enum Out, In (0, 1)."""

    pv: str
    material: str
    thickness_um: Positive


class EigerConfig(_Model):
    """The Eiger-2M and where the diffracted beam lands on it at the Bragg setting."""

    prefix: str
    rows: int = 2164
    columns: int = 1030
    pixel_size_um: Positive = 75.0
    beam_row: int = 1300
    beam_column: int = 640
    """Pixel of the k_out direction: the zero frequency of every crop."""
    masked_rows: list[tuple[int, int]] = []
    masked_columns: list[tuple[int, int]] = []
    """Inclusive ranges that never count (module gaps and edges)."""
    images_per_file: int = Field(default=100, gt=0)
    bit_depth: Literal[8, 16, 32] = 32

    def gap_mask(self) -> np.ndarray:
        """Pixels that never count, bool (rows, columns)."""
        mask = np.zeros((self.rows, self.columns), bool)
        for first, last in self.masked_rows:
            mask[first : last + 1] = True
        for first, last in self.masked_columns:
            mask[:, first : last + 1] = True
        return mask


class ReflectionConfig(_Model):
    """Which planes diffract and where their peak is expected."""

    material: str = "Pt"
    hkl: tuple[int, int, int] = (1, 1, 1)
    lattice_parameter_nm: Positive = 0.39236
    rocking_nominal_deg: float
    """Reading of the rocking circle at which the peak is expected."""

    @property
    def plane_spacing(self) -> float:
        """Spacing of the planes, m (cubic)."""
        return self.lattice_parameter_nm * 1e-9 / float(np.linalg.norm(self.hkl))


class Beamline(_Model):
    """One beamline: everything that differs between two of them."""

    name: str
    prefix: str
    """Put before every process variable."""
    energy_ev: Positive
    detector_distance_m: Positive
    arm: Arm
    arm_sign: Literal[1, -1] = 1
    rocking_circle: Literal["phi", "eta", "mu"]
    shutter_pv: str
    monitor_pv: str
    """Incident flux, photons per second."""
    ring_current_pv: str
    reflection: ReflectionConfig
    diffractometer: DiffractometerConfig
    nanogoniometer: NanogoniometerConfig
    sample_stage: SampleStageConfig
    eiger: EigerConfig
    slits: SlitsConfig | None = None
    monochromator: MonochromatorConfig | None = None
    focus: FocusConfig | None = None
    suspend: SuspendConfig | None = None
    nominal_flux: Positive = 1e10
    """Photons per second on the crystal with every filter out, for the dose that a rehearsal tells."""
    filters: dict[str, FilterConfig] = {}
    """By name; together they make the attenuation of the incident beam."""
    temperatures: dict[str, str] = {}
    """Read-only temperatures (deg C) by name, recorded with every scan."""

    @model_validator(mode="after")
    def _rocks(self):
        want = "y" if self.arm == "horizontal" else "x"
        circle: CircleConfig = getattr(self.diffractometer, self.rocking_circle)
        if circle.axis != want:
            raise ValueError(
                f"rocking_circle {self.rocking_circle} turns about {circle.axis}; "
                f"{self.arm} scattering rocks about {want}"
            )
        return self

    def geometry(self, modulator_distance: float = 0.0) -> Geometry:
        """Bragg geometry with the modulator `modulator_distance` metres behind the crystal (0: out)."""
        return Geometry(
            energy_ev=self.energy_ev,
            plane_spacing=self.reflection.plane_spacing,
            detector_distance=self.detector_distance_m,
            pixel_size=self.eiger.pixel_size_um * 1e-6,
            modulator_distance=modulator_distance,
            arm=self.arm,
            arm_sign=self.arm_sign,
        )


class PlanSettings(_Model):
    """What the operator asks for: the experiment as it would be typed at the beamline."""

    modulator_z_um: Positive
    window: int = Field(gt=15)
    """Detector pixels along an edge of the square that is analysed."""
    align_half_range_deg: Positive = 5.0
    align_points: int = Field(default=15, ge=7)
    align_positions: int = Field(default=3, ge=1)
    align_exposure_s: Positive = 0.5
    find_half_range_deg: Positive = 0.15
    find_points: int = Field(default=31, ge=5)
    find_exposure_s: Positive = 0.1
    spiral_extent_um: tuple[Positive, Positive] = (6.0, 6.0)
    spiral_step_um: Positive = 0.12
    spiral_exposure_s: Positive = 0.2
    rocking_half_range_deg: Positive = 0.5
    rocking_step_deg: Positive = 0.005
    rocking_exposure_s: Positive = 1.0
    calibration_iterations: int = Field(default=60, gt=0)
    bcmi_trials: int = Field(default=3, gt=0)
    bcdi_trials: int = Field(default=10, gt=0)

    @property
    def rocking_points(self) -> int:
        """Frames of one rocking scan (the paper: 201)."""
        return 2 * round(self.rocking_half_range_deg / self.rocking_step_deg) + 1


class FacetSettings(_Model):
    """A family of facets that cubic symmetry makes equal."""

    hkl: tuple[int, int, int]
    """Outward normal of one of them in the cubic axes of the crystal."""
    distance: Positive = 1.0
    """From the centre, relative to the other facets; `CrystalSettings.size_nm` sets the scale."""

    @model_validator(mode="after")
    def _has_direction(self):
        if not any(self.hkl):
            raise ValueError("no facet has hkl = 0 0 0")
        return self


class CrystalSettings(_Model):
    """The simulated crystal: grown from these numbers, or read from `array`."""

    size_nm: tuple[Positive, Positive, Positive] = (520.0, 740.0, 850.0)
    """Edge to edge along x', y', z' of the detector frame."""
    strain: Positive = 0.0005
    """The 1-99 percentile of du/dx along Q reaches from minus to plus this."""
    edge_nm: Positive = 8.0
    """Softness of the facets, so that the sampling grid leaves no steps."""
    facets: list[FacetSettings] = []
    """The shape; where empty {111} and, 1.15 times as far, {100}."""
    unevenness: float = Field(default=0.15, ge=0, lt=1)
    """Growth makes no two facets equal: their distances spread at random by this part."""
    azimuth_deg: float | None = None
    """Of the crystal about Q; where absent drawn from the seed."""
    random: float = Field(default=1.0, ge=0)
    bending: float = Field(default=1.0, ge=0)
    relaxation: float = Field(default=1.0, ge=0)
    """Weights of the band-limited random field, of bending and of the surface in the displacement."""
    dislocation: bool = False
    """Adds an edge dislocation along y' on top of the scaled strain."""
    seed: int = 1
    array: Path | None = None
    """Complex object on a grid of the detector frame, axes (z', y', x'), rows to -y', instead of all this:
    .npy, .npz (`object`, `voxel_size` in m), or HDF5 laid out like a result."""
    voxel_nm: tuple[Positive, Positive, Positive] | None = None
    """Voxel (z', y', x') of `array` where its file does not say."""

    @model_validator(mode="after")
    def _has_displacement(self):
        if self.array is None and self.random + self.bending + self.relaxation == 0:
            raise ValueError("one of random, bending and relaxation must be above 0 to make a strain")
        return self


class ModulatorSettings(_Model):
    """The simulated modulator."""

    material: str = "W"
    density: Positive = 19.25
    thickness_um: Positive = 1.5
    coverage: float = Field(default=0.4, gt=0, lt=1)
    feature_nm: Positive = 220.0
    extent_um: Positive = 40.0
    """Edge of the square patterned field; the bare membrane and its frame lie around it."""
    fiducial_um: float = Field(default=4.0, ge=0)
    """Edge of the bare window with a letter F at +x, +y of the field, to find one's way by; 0: none."""
    membrane_um: Positive = 500.0
    seed: int = 2


class HiddenErrors(_Model):
    """What the operator does not know and the plans have to find."""

    bragg_offset_deg: float = 0.0
    mchi_deg: float = 0.0
    """Reading of Mchi at which the membrane is perpendicular to the diffracted beam."""
    mphi_deg: float = 0.0
    squareness_deg: tuple[float, float] = (0.0, 0.0)
    """Tilt of the membrane about x and y against the stage axes."""
    pivot_um: Vector3 = (0.0, 0.0, 0.0)
    """True pivot minus surveyed pivot."""
    distance_um: float = 0.0
    """True distance minus what z says."""
    beam_offset_px: tuple[float, float] = (0.0, 0.0)
    """(row, column) by which the diffracted beam misses beam_row and beam_column."""


class Nuisances(_Model):
    """How the simulated beamline misbehaves, each a knob; all off by default."""

    # the crystal
    drift_nm_per_sqrt_s: float = Field(default=0.0, ge=0)
    """Random walk of the crystal, per laboratory axis."""
    drift_nm_per_s: Vector3 = (0.0, 0.0, 0.0)
    creep_nm: Vector3 = (0.0, 0.0, 0.0)
    """Motion that dies away as ``1 - exp(-t / creep_time_s)``."""
    creep_time_s: Positive = 600.0
    jump_nm: float = Field(default=0.0, ge=0)
    """Length of sudden jumps in random directions."""
    jump_every_s: Positive = 300.0
    """Mean time between two jumps; they come at random."""

    # the modulator
    position_error_nm: float = Field(default=0.0, ge=0)
    """True minus read position of the stage, the same whenever it comes back."""
    modulator_drift_nm_per_sqrt_s: float = Field(default=0.0, ge=0)
    modulator_drift_nm_per_s: tuple[float, float] = (0.0, 0.0)

    # angles
    angle_jitter_deg: float = Field(default=0.0, ge=0)
    """Random error of the rocking circle, new in every exposure."""
    encoder_error_deg: float = Field(default=0.0, ge=0)
    """Amplitude of the periodic error of the rocking circle's encoder."""
    encoder_period_deg: Positive = 0.036

    # the beam
    flux_noise: float = Field(default=0.0, ge=0)
    ring_lifetime_h: Positive | None = None
    """1/e decay of the ring current; absent: constant."""
    top_up_every_s: Positive = 3600.0
    beam_dumps: list[tuple[float, Positive]] = []
    """(start, duration) in seconds of beamline time: no current, then a full ring."""
    coherence_modes: int = Field(default=1, ge=1)
    """Along x; 1: fully coherent."""
    coherence_modes_vertical: int = Field(default=1, ge=1)
    coherence_length_um: tuple[Positive, Positive] = (1.5, 6.0)
    """Coherence length (rms, x and y) at the crystal, in a direction of more than one mode."""

    # temperatures
    temperature_swing_k: float = Field(default=0.0, ge=0)
    """Amplitude of every temperature's slow oscillation."""
    temperature_period_s: Positive = 5400.0
    modulator_nm_per_k: tuple[float, float] = (0.0, 0.0)
    """Modulator (x, y) per kelvin of the temperature named nanogoniometer."""
    crystal_nm_per_k: Vector3 = (0.0, 0.0, 0.0)
    """Crystal (laboratory x, y, z) per kelvin of the temperature named hutch."""

    # the detector
    background_per_pixel_s: float = Field(default=0.0, ge=0)
    hot_pixels: int = Field(default=12, ge=0)
    dead_pixels: int = Field(default=30, ge=0)
    seed: int = 3


class SimulationSettings(_Model):
    """The truth behind the simulated beamline."""

    crystal: CrystalSettings
    modulator: ModulatorSettings = ModulatorSettings()
    hidden: HiddenErrors = HiddenErrors()
    nuisances: Nuisances = Nuisances()
    beam_fwhm_um: Positive = 1.5
    """Of the intensity at the focus, nominal slits."""
    slit_beam_um: tuple[Positive, Positive] = (900.0, 700.0)
    """FWHM (horizontal, vertical) of the beam that arrives at the slits."""
    polarisation: float = Field(default=1.0, ge=-1, le=1)
    """Degree of linear polarisation; +1 horizontal, -1 vertical."""
    peak_counts_per_s: Positive = 2e6
    """Photons per second in the whole pattern at the peak of the rocking curve, modulator out, scattered in
    the horizontal plane at full ring current; the vertical plane gains what polarisation costs here."""
    voxel_nm: Positive = 10.0
    """Grid of the simulated crystal."""
    time_scale: Positive = 1.0
    """Seconds of wall clock per second of exposure and motion."""


class Preset(_Model):
    """One experiment: what is asked for and, for the simulated beamline, what is there."""

    name: str
    description: str
    plan: PlanSettings
    sim: SimulationSettings


def _read(source: str | Path, folder: str, model: type[_Config]) -> _Config:
    """Load TOML from a path, or by name from the files that come with the package."""
    path = Path(source)
    if path.suffix != ".toml":
        shipped = resources.files("bcmi_beamline") / "config" / folder
        path = Path(str(shipped / f"{source}.toml"))
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in Path(str(shipped)).glob("*.toml")))
            kind = folder[:-1] or "beamline"
            raise ConfigError(f"no {kind} named {source!r}: choose from {known}, or give a .toml file")
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    _find_array(values, path.parent)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(whole file)"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ConfigError(f"{path}: {key}: {first['msg']}{more}") from None


def _find_array(values: dict, folder: Path) -> None:
    """Make the file name of a crystal's array absolute; it is relative to the file that names it."""
    sim = values.get("sim")
    crystal = sim.get("crystal") if isinstance(sim, dict) else values
    if isinstance(crystal, dict) and isinstance(crystal.get("array"), str):
        crystal["array"] = str((folder / crystal["array"]).absolute())


def load_beamline(source: str | Path = "sim-id01") -> Beamline:
    """Read and check a beamline from a TOML file, or one that comes with the package by name.

    Raises
    ------
    ConfigError
        In one line: the file, the key and what is wrong with it.
    """
    return _read(source, "", Beamline)


def load_preset(source: str | Path = "small") -> Preset:
    """Read and check an experiment preset from a TOML file, or one that comes with the package by name.

    Raises
    ------
    ConfigError
        In one line: the file, the key and what is wrong with it.
    """
    return _read(source, "presets", Preset)


def load_crystal(source: str | Path) -> CrystalSettings:
    """Read an own crystal: a TOML file with the keys of `CrystalSettings`, or the file of an array.

    Raises
    ------
    ConfigError
        In one line: the file, the key and what is wrong with it.
    """
    path = Path(source)
    if path.suffix == ".toml":
        return _read(path, "", CrystalSettings)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file: name a .toml, .npy, .npz, .h5 or .cxi file of a crystal")
    return CrystalSettings(array=path.absolute())


def list_presets() -> list[str]:
    """Names of the presets that come with the package."""
    folder = Path(str(resources.files("bcmi_beamline") / "config" / "presets"))
    return sorted(p.stem for p in folder.glob("*.toml"))
