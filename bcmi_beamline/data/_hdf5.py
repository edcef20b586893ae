"""HDF5 that others wrote, read with suspicion: every complaint is one line with file, dataset and mend."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from scipy import constants

from bcmi_beamline.data._unflagged import Unflagged


class FileError(ValueError):
    """A file that cannot be used; the message is one line: file, dataset, what is wrong, the mend."""


def file_error(path: str | Path, where: str, wrong: str, mend: str) -> FileError:
    """Build a `FileError` whose message is one line."""
    return FileError(f"{path}: {where}: {wrong}; {mend}".replace("\n", " "))


UNITS: dict[str, dict[str, float]] = {
    "length": {
        **dict.fromkeys(("m", "meter", "metre", "meters", "metres"), 1.0),
        **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e-3),
        **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"), 1e-6),
        **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-9),
        **dict.fromkeys(("angstrom", "angstroms", "A", "Å", "Å"), 1e-10),
        "pm": 1e-12,
    },
    "angle": {
        **dict.fromkeys(("deg", "degree", "degrees", "°"), 1.0),
        **dict.fromkeys(("rad", "radian", "radians"), 180 / np.pi),
        "mrad": 0.18 / np.pi,
    },
    "energy": {
        **dict.fromkeys(("J", "joule", "joules"), 1.0),
        "eV": constants.e,
        "keV": 1e3 * constants.e,
        "ev": constants.e,
        "kev": 1e3 * constants.e,
    },
}
"""Factor to m, deg and J of each spelling of a unit."""

_MAX_LINKS = 16
_BOMB_BYTES = 2**28
_BOMB_RATIO = 300
"""LZ4 shrinks nothing by more than 255; what declares more than that holds no measurement."""


def physical_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def open_hdf5(path: Path) -> h5py.File:
    """Open for reading, whether finished, still written, or left behind by a writer that died.

    Raises
    ------
    OSError
        As HDF5 says.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "open for write" not in str(error) and "to lock file" not in str(error):
            raise
        return h5py.File(Unflagged(path), "r")


def _open(path: Path) -> h5py.File:
    try:
        return open_hdf5(path)
    except FileNotFoundError:
        raise file_error(path, "file", "does not exist", "check the path") from None
    except IsADirectoryError:
        raise file_error(path, "file", "is a folder", "name a file in it") from None
    except PermissionError:
        raise file_error(path, "file", "may not be read", "ask its owner for permission") from None
    except (OSError, RuntimeError, ValueError) as error:
        text = str(error)
        if "truncated" in text:
            raise file_error(path, "file", "is truncated", "copy or write it again") from None
        if "signature not found" in text:
            raise file_error(path, "file", "is not HDF5", "name a CXI file") from None
        raise file_error(path, "file", f"cannot be opened ({text})", "copy or write it again") from None


class Reader:
    """One HDF5 file open for reading; follows links only within its own folder.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    FileError
        From every method, for whatever the file holds that cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folders = {self.path.absolute().parent, self.path.resolve().parent}
        self._files: dict[Path, h5py.File] = {self.path.resolve(): _open(self.path)}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def fail(self, where: str, wrong: str, mend: str) -> FileError:
        """Build the error that names this file."""
        return file_error(self.path, where, wrong, mend)

    @contextlib.contextmanager
    def guard(self, where: str) -> Iterator[None]:
        """Turn what HDF5 or a container raises into a `FileError` about `where`."""
        try:
            yield
        except FileError:
            raise
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, MemoryError) as error:
            text = str(error).strip("'\"") or type(error).__name__
            raise self.fail(where, text, "write the file again or repair it") from None

    # -- links ------------------------------------------------------------------------------------
    def _neighbour(self, name: str, where: str) -> h5py.File:
        """Open a file that this one points to, if it lies in the same folder or below."""
        for folder in self._folders:
            target = (folder / name).resolve()
            if not any(target.is_relative_to(home.resolve()) for home in self._folders):
                break
            if target not in self._files and target.exists():
                self._files[target] = _open(target)
            if target in self._files:
                return self._files[target]
        else:
            raise self.fail(where, f"points to {name}, which is not there", "copy that file along")
        raise self.fail(where, f"points to {name}, outside the file's folder", "copy the data into the file")

    def _walk(self, file: h5py.File, name: str, where: str, links: int) -> h5py.Group | h5py.Dataset | None:
        if links > _MAX_LINKS:
            raise self.fail(where, "is a circle of links", "write the data itself")
        node: Any = file["/"]
        parts = [part for part in name.split("/") if part not in ("", ".")]
        for depth, part in enumerate(parts):
            if not isinstance(node, h5py.Group):
                return None
            link = node.get(part, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                other = self._neighbour(link.filename, where)
                node = self._walk(other, link.path, where, links + 1)
            elif isinstance(link, h5py.SoftLink):
                start = "" if link.path.startswith("/") else "/".join(parts[:depth]) + "/"
                node = self._walk(node.file, start + link.path, where, links + 1)
            else:
                node = node.get(part)
            if node is None:
                return None
        return node

    def find(self, *names: str) -> h5py.Dataset | h5py.Group | None:
        """Return the first of `names` that exists, else None."""
        for name in names:
            with self.guard(name):
                node = self._walk(self._files[self.path.resolve()], name, name, 0)
            if node is not None:
                return node
        return None

    def has(self, name: str) -> bool:
        """Whether the file holds `name`."""
        return self.find(name) is not None

    def links(self, name: str) -> bool:
        """Whether the file has a link `name`, wherever it leads."""
        group, _, last = name.rpartition("/")
        node = self.find(group)
        return isinstance(node, h5py.Group) and node.get(last, getlink=True) is not None

    def dataset(self, *names: str, whole: bool = True) -> h5py.Dataset:
        """Return the first of `names` that exists: numbers, stored in this folder, no decompression bomb.

        They fit into memory where they are to be read `whole`.
        """
        node, name = self.find(*names), names[0]
        if node is None:
            raise self.fail(name, "is missing", "add it or name another file")
        if not isinstance(node, h5py.Dataset):
            raise self.fail(name, "is a group, not a dataset", "write the numbers there")
        if node.shape is None:
            raise self.fail(name, "is empty", "write the numbers there")
        with self.guard(name):
            for external in node.external or []:
                self._raw_neighbour(external[0], name)
            sources = [node]
            if node.is_virtual:
                sources = [self._source(node, source, name) for source in node.virtual_sources()]
            size = node.size * node.dtype.itemsize
            stored = sum(source.id.get_storage_size() for source in sources)
            unknown = _unknown_filters(node)
        if unknown:
            raise self.fail(
                name, f"is compressed with the unknown HDF5 filter {unknown}", "install its plugin"
            )
        mend = "crop or split it, or repair its shape"
        if whole and size > physical_memory():
            raise self.fail(name, f"declares {size / 1e9:.3g} GB, more than this machine's memory", mend)
        if size > _BOMB_BYTES and size > _BOMB_RATIO * stored:
            wrong = f"declares {size / 1e9:.3g} GB but stores {stored / 1e6:.3g} MB"
            raise self.fail(name, wrong, mend)
        return node

    def _source(self, node: h5py.Dataset, source: Any, name: str) -> h5py.Dataset:
        """A dataset that a virtual one shows part of."""
        file = node.file if source.file_name == "." else self._neighbour(source.file_name, name)
        found = self._walk(file, source.dset_name, name, 1)
        if not isinstance(found, h5py.Dataset) or found.is_virtual:
            raise self.fail(name, f"shows {source.dset_name}, which holds no numbers", "restore that file")
        return found

    def _raw_neighbour(self, name: str, where: str) -> None:
        target = (self.path.resolve().parent / name).resolve()
        if not any(target.is_relative_to(home.resolve()) for home in self._folders):
            raise self.fail(
                where, f"keeps its numbers in {name}, outside the file's folder", "copy them into the file"
            )

    # -- values -----------------------------------------------------------------------------------
    def array(
        self,
        *names: str,
        shape: tuple[int | None, ...] | None = None,
        kinds: str = "iuf",
        dimension: str | None = None,
        unit: str = "m",
    ) -> np.ndarray:
        """Return a small dataset, checked: kind of number, shape, finite; in m, deg or J.

        Parameters
        ----------
        *names : str
            The first that exists is read.
        shape : tuple, optional
            None stands for any length.
        kinds : str
            Accepted ``dtype.kind``.
        dimension : {"length", "angle", "energy"}, optional
            Kind of quantity; the ``units`` attribute is obeyed.
        unit : str
            Unit where the file states none.
        """
        dataset, name = self.dataset(*names), names[0]
        if dataset.dtype.kind not in kinds:
            raise self.fail(name, f"holds {dataset.dtype}, not numbers of the right kind", "write numbers")
        if shape is not None and not _fits(dataset.shape, shape):
            want = "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"
            raise self.fail(name, f"has shape {dataset.shape}, not {want}", "write it in that shape")
        with self.guard(name):
            values = np.asarray(dataset[()])
        if values.dtype.kind in "fc" and not np.isfinite(values).all():
            bad = int((~np.isfinite(values)).sum())
            raise self.fail(name, f"{bad} of {values.size} values are not finite", "repair them")
        if dimension is None:
            return values
        return np.asarray(values, float) * self._factor(dataset, name, dimension, unit)

    def _factor(self, dataset: h5py.Dataset, name: str, dimension: str, unit: str) -> float:
        with self.guard(name):
            stated = dataset.attrs.get("units", unit)
        if isinstance(stated, np.ndarray) and stated.size == 1:
            stated = stated.item()
        text = stated.decode(errors="replace") if isinstance(stated, bytes) else str(stated)
        known = UNITS[dimension]
        factor = known.get(text.strip(), known.get(text.strip().lower()))
        if factor is None:
            raise self.fail(name, f"units {text!r} is no {dimension}", f"use one of {', '.join(known)}")
        return factor

    def number(
        self,
        *names: str,
        dimension: str | None = None,
        unit: str = "m",
        low: float = -np.inf,
        high: float = np.inf,
    ) -> float:
        """Return one number between `low` and `high` (both in m, deg or J)."""
        values = self.array(*names, dimension=dimension, unit=unit)
        if values.size != 1:
            raise self.fail(names[0], f"has shape {values.shape}, not one number", "write one number")
        value = float(values.reshape(-1)[0])
        if not low <= value <= high:
            raise self.fail(
                names[0], f"{value:.4g} is not between {low:.4g} and {high:.4g}", "check it and its units"
            )
        return value

    def text(self, name: str) -> str:
        """Return a string dataset."""
        dataset = self.dataset(name)
        if h5py.check_string_dtype(dataset.dtype) is None or dataset.size != 1:
            raise self.fail(name, f"holds {dataset.dtype}, not one string", "write a string")
        with self.guard(name):
            return str(dataset.asstr()[()])

    def json(self, name: str) -> Any:
        """Return what a JSON string dataset holds, {} where it is absent."""
        if not self.has(name):
            return {}
        try:
            return json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise self.fail(name, f"is not JSON ({error})", "write it again") from None


def _unknown_filters(dataset: h5py.Dataset) -> str:
    """Numbers of the compression filters that this machine lacks."""
    settings = dataset.id.get_create_plist()
    codes = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    return ", ".join(str(code) for code in codes if not h5py.h5z.filter_avail(code))


def _fits(shape: tuple[int, ...], want: tuple[int | None, ...]) -> bool:
    return len(shape) == len(want) and all(w is None or n == w for n, w in zip(shape, want, strict=True))


def to_json(values: Any) -> str:
    """JSON text of `values`, numpy scalars and arrays and paths included."""
    return json.dumps(values, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` that takes its place when the block ends, and vanishes when it fails."""
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise file_error(path, "file", "its folder does not exist", "make the folder first")
    if path.is_dir():
        raise file_error(path, "file", "is a folder", "name a file in it")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise file_error(
            path, "file", f"cannot be written ({error})", "check space and permissions"
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def bitshuffle_lz4() -> dict[str, Any]:
    """Options of `h5py.Group.create_dataset` for counts: bitshuffle and LZ4, as the Eiger writes."""
    return dict(hdf5plugin.Bitshuffle(cname="lz4"))
