"""The Eiger's process variables: those that ophyd's ``EigerDetectorCam`` connects, and newer ones.

Names, enumerations and types are those of the areaDetector base records and of ADEiger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from caproto.server import PVGroup, pvproperty
from caproto.server.server import PvpropertyChar, PvpropertyDouble, PvpropertyEnum, PvpropertyInteger

from bcmi_beamline.config import Beamline

STRING_LENGTH = 1024
"""Strings are character waveforms: a DBR string would cut a path at 40 characters."""

_NO_YES = ("No", "Yes")
_DISABLE_ENABLE = ("Disable", "Enable")

TRIGGER_MODES = ("Internal Series", "Internal Enable", "External Series", "External Enable", "Continuous")

CHOICES: dict[str, tuple[str, ...]] = {
    "Acquire": ("Done", "Acquire"),
    "Armed": ("Unarmed", "Armed"),
    "ArrayCallbacks": _DISABLE_ENABLE,
    "AutoIncrement": _NO_YES,
    "AutoSave": _NO_YES,
    "Capture": ("Done", "Capture"),
    "ColorMode": ("Mono", "Bayer", "RGB1", "RGB2", "RGB3", "YUV444", "YUV422", "YUV421"),
    "CompressionAlgo": ("LZ4", "BS LZ4"),
    "CountrateCorrApplied": _DISABLE_ENABLE,
    "DataSource": ("None", "FileWriter", "Stream"),
    "DataType": ("Int8", "UInt8", "Int16", "UInt16", "Int32", "UInt32", "Float32", "Float64"),
    "DeleteDriverFile": _NO_YES,
    "DetectorState_RBV": (
        "Idle", "Acquire", "Readout", "Correct", "Saving", "Aborting", "Error", "Waiting", "Initializing",
        "Disconnected", "Aborted",
    ),
    "FWAutoRemove": _DISABLE_ENABLE,
    "FWCompression": _DISABLE_ENABLE,
    "FWEnable": _DISABLE_ENABLE,
    "FilePathExists_RBV": _NO_YES,
    "FileWriteMode": ("Single", "Capture", "Stream"),
    "FlatfieldApplied": _DISABLE_ENABLE,
    "FrameType": ("Normal", "Background", "FlatField", "DblCorrelation"),
    "ImageMode": ("Single", "Multiple", "Continuous"),
    "ManualTrigger": _DISABLE_ENABLE,
    "MonitorEnable": _DISABLE_ENABLE,
    "PixelMaskApplied": _DISABLE_ENABLE,
    "ROIMode": ("Disable", "4M"),
    "ReadFile": ("Done", "Read"),
    "ReverseX": _NO_YES,
    "ReverseY": _NO_YES,
    "SaveFiles": _NO_YES,
    "ShutterControl": ("Close", "Open"),
    "ShutterMode": ("None", "EPICS PV", "Detector output"),
    "ShutterStatus_RBV": ("Closed", "Open"),
    "StreamDecompress": _DISABLE_ENABLE,
    "StreamEnable": _DISABLE_ENABLE,
    "StreamHdrDetail": ("All", "Basic", "None"),
    "TriggerMode": TRIGGER_MODES,
    "WriteFile": ("Done", "Write"),
    "WriteStatus": ("Write OK", "Write error"),
}  # fmt: skip

NEWER = {
    "AutoSummation": True, "AutoSummation_RBV": False, "BitDepthImage_RBV": False,
    "CountrateCorrApplied": True, "Error_RBV": False, "PixelMaskApplied": True, "State_RBV": False,
}  # fmt: skip
"""Process variables of the driver that ophyd's class lacks; True: has a readback."""


def defaults(beamline: Beamline) -> dict[str, int | float | str]:
    """Values that are not 0, the first choice or an empty string; enumerations by their string."""
    eiger = beamline.eiger
    wavelength_angstrom = beamline.geometry().wavelength * 1e10
    return {
        "AcquirePeriod": 1.0,
        "AcquireTime": 1.0,
        "ArrayCallbacks": "Enable",
        "ArrayCounter": 0,
        "ArraySizeX_RBV": eiger.columns,
        "ArraySizeY_RBV": eiger.rows,
        "ArraySizeZ_RBV": 0,
        "ArraySize_RBV": eiger.rows * eiger.columns * eiger.bit_depth // 8,
        "AutoSummation": 1,
        "BeamX": float(eiger.beam_column),
        "BeamY": float(eiger.beam_row),
        "BinX": 1,
        "BinY": 1,
        "BitDepthImage_RBV": eiger.bit_depth,
        "CompressionAlgo": "BS LZ4",
        "CountCutoff_RBV": 0,
        "CountrateCorrApplied": "Enable",
        "DataSource": "FileWriter",
        "DataType": f"UInt{eiger.bit_depth}",
        "Description_RBV": "Eiger2 2M (simulated)",
        "DetDist": beamline.detector_distance_m,
        "FWCompression": "Enable",
        "FWEnable": "Enable",
        "FWNImagesPerFile": eiger.images_per_file,
        "FWNamePattern": "series_$id",
        "FWState_RBV": "ready",
        "FlatfieldApplied": "Enable",
        "ImageMode": "Multiple",
        "Manufacturer_RBV": "DECTRIS",
        "MaxSizeX_RBV": eiger.columns,
        "MaxSizeY_RBV": eiger.rows,
        "Model_RBV": "Eiger2 2M (simulated)",
        "NumCapture": 1,
        "NumCaptured_RBV": 0,
        "NumExposures": 1,
        "NumExposuresCounter_RBV": 0,
        "NumImages": 1,
        "NumImagesCounter_RBV": 0,
        "NumTriggers": 1,
        "PhotonEnergy": beamline.energy_ev,
        "PixelMaskApplied": "Enable",
        "PortName_RBV": "EIG",
        "SaveFiles": "Yes",
        "SensorMaterial_RBV": "Si",
        "SensorThickness_RBV": 450e-6,
        "SequenceId": 0,
        "SizeX": eiger.columns,
        "SizeY": eiger.rows,
        "State_RBV": "idle",
        "StatusMessage_RBV": "",
        "Error_RBV": "",
        "ThresholdEnergy": beamline.energy_ev / 2,
        "Trigger": 0,
        "TriggerExposure": 0.0,
        "Wavelength": wavelength_angstrom,
        "XPixelSize_RBV": eiger.pixel_size_um * 1e-6,
        "YPixelSize_RBV": eiger.pixel_size_um * 1e-6,
    }


def _connected_by_ophyd() -> Iterator[tuple[str, bool, bool]]:
    """(suffix, has a readback, is a string) of each signal of ophyd's class."""
    from ophyd import Component, DynamicDeviceComponent
    from ophyd.areadetector.base import EpicsSignalWithRBV
    from ophyd.areadetector.cam import EigerDetectorCam
    from ophyd.areadetector.paths import EpicsPathSignal
    from ophyd.signal import EpicsSignalBase

    for component in EigerDetectorCam._sig_attrs.values():
        if isinstance(component, DynamicDeviceComponent):
            signals = [(cls, suffix, keywords) for cls, suffix, keywords in component.defn.values()]
        elif isinstance(component, Component) and issubclass(component.cls, EpicsSignalBase):
            signals = [(component.cls, component.suffix, component.kwargs)]
        else:
            continue
        for cls, suffix, keywords in signals:
            assert suffix is not None
            yield suffix, issubclass(cls, (EpicsSignalWithRBV, EpicsPathSignal)), "string" in keywords


def _property(name: str, value: Any) -> pvproperty:
    options: dict[str, Any] = {"name": name, "value": value}
    if name.endswith("_RBV") or name == "Armed":
        options["read_only"] = True
    choices = CHOICES.get(name) or CHOICES.get(name.removesuffix("_RBV"))
    if choices:
        options |= {"dtype": PvpropertyEnum, "enum_strings": choices, "value": value or choices[0]}
    elif isinstance(value, str):
        options |= {"dtype": PvpropertyChar, "max_length": STRING_LENGTH, "string_encoding": "utf-8"}
    elif isinstance(value, int):
        options["dtype"] = PvpropertyInteger
    else:
        options |= {"dtype": PvpropertyDouble, "precision": 6}
    return pvproperty(**options)


def cam_records(beamline: Beamline) -> type[PVGroup]:
    """A group class with every process variable of ``cam1:``."""
    known = defaults(beamline)
    names: dict[str, Any] = {}
    newer = ((name, has_readback, isinstance(known.get(name), str)) for name, has_readback in NEWER.items())
    for suffix, has_readback, is_string in (*_connected_by_ophyd(), *newer):
        value = known.get(suffix, known.get(suffix.removesuffix("_RBV"), "" if is_string else 0.0))
        names[suffix] = value
        if has_readback:
            names[f"{suffix}_RBV"] = value
    body = {f"pv_{i}": _property(name, value) for i, (name, value) in enumerate(names.items())}
    return type("CamRecords", (PVGroup,), body)
