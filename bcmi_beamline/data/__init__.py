"""Documents and files to scans and back: Tiled, the document log, CXI."""

from bcmi_beamline.data._hdf5 import FileError
from bcmi_beamline.data.cxi import (
    read_crystal,
    read_cxi,
    read_modulator,
    read_ptychography,
    read_reconstruction,
    read_rocking,
    sha256,
    write_cxi,
    write_modulator,
    write_ptychography,
    write_reconstruction,
    write_rocking,
)

__all__ = [
    "FileError",
    "read_crystal",
    "read_cxi",
    "read_modulator",
    "read_ptychography",
    "read_reconstruction",
    "read_rocking",
    "sha256",
    "write_cxi",
    "write_modulator",
    "write_ptychography",
    "write_reconstruction",
    "write_rocking",
]
