"""What one beamline is and what one experiment asks for, read from TOML and checked on load.

`Beamline` describes the hardware: process variables, circles, limits, distances. `Preset` holds one
experiment's plan settings and, for the simulated beamline only, the truth that is simulated. Plans and
reconstruction see `Preset.plan`; nothing outside ``sim`` looks at `Preset.sim`.
"""

from bcmi_beamline.config._model import (
    AxisConfig,
    Beamline,
    CircleConfig,
    ConfigError,
    CrystalSettings,
    DiffractometerConfig,
    EigerConfig,
    FacetSettings,
    FilterConfig,
    FocusConfig,
    HiddenErrors,
    ModulatorSettings,
    MonochromatorConfig,
    NanogoniometerConfig,
    Nuisances,
    PlanSettings,
    Preset,
    ReflectionConfig,
    SampleStageConfig,
    SimulationSettings,
    SlitsConfig,
    SuspendConfig,
    list_presets,
    load_beamline,
    load_crystal,
    load_preset,
)

__all__ = [
    "AxisConfig",
    "Beamline",
    "CircleConfig",
    "ConfigError",
    "CrystalSettings",
    "DiffractometerConfig",
    "EigerConfig",
    "FacetSettings",
    "FilterConfig",
    "FocusConfig",
    "HiddenErrors",
    "ModulatorSettings",
    "MonochromatorConfig",
    "NanogoniometerConfig",
    "Nuisances",
    "PlanSettings",
    "Preset",
    "ReflectionConfig",
    "SampleStageConfig",
    "SimulationSettings",
    "SlitsConfig",
    "SuspendConfig",
    "list_presets",
    "load_beamline",
    "load_crystal",
    "load_preset",
]
