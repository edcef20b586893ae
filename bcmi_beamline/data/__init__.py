"""Documents and files to scans and back: the catalogue, the document log, CXI, NeXus, Eiger and ID01 files.

Storage never stops a scan: documents go to a log on local disk first, then to the catalogue from a thread of
its own. Files that cannot be used raise `FileError`, one line that names file, dataset, fault and mend.
"""

from bcmi_beamline.data._hdf5 import FileError
from bcmi_beamline.data._load import export, load, load_sentinels
from bcmi_beamline.data._summary import summary
from bcmi_beamline.data._watch import watch
from bcmi_beamline.data.catalog import BackgroundTiledWriter, Catalog, CatalogError, open_catalog
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
from bcmi_beamline.data.disk import DiskWatch, NoRoomError
from bcmi_beamline.data.documents import DocumentLog, read_log, replay
from bcmi_beamline.data.eiger_files import read_eiger
from bcmi_beamline.data.id01 import read_id01, write_id01
from bcmi_beamline.data.nexus import write_nexus

__all__ = [
    "BackgroundTiledWriter",
    "Catalog",
    "CatalogError",
    "DiskWatch",
    "DocumentLog",
    "FileError",
    "NoRoomError",
    "export",
    "load",
    "load_sentinels",
    "open_catalog",
    "read_crystal",
    "read_cxi",
    "read_eiger",
    "read_id01",
    "read_log",
    "read_modulator",
    "read_ptychography",
    "read_reconstruction",
    "read_rocking",
    "replay",
    "sha256",
    "summary",
    "watch",
    "write_cxi",
    "write_id01",
    "write_modulator",
    "write_nexus",
    "write_ptychography",
    "write_reconstruction",
    "write_rocking",
]
