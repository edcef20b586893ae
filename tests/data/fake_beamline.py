"""An Eiger, motors and a monitor that exist only here: the Eiger's files and documents, nothing else."""

import time
import uuid
from collections import deque

import bluesky.plan_stubs as bps
import bluesky.preprocessors as bpp
import h5py
import hdf5plugin
import numpy as np
from bluesky import RunEngine

INVALID = 2**32 - 1


class FakeEiger:
    """Writes ``<stem>_master.h5`` and ``<stem>_data_00000N.h5``; `frames` is (J, rows, columns) uint32."""

    parent = None
    name = "eiger"

    def __init__(self, folder, frames, images_per_file=4, pixel_mask=None):
        self.frames, self.images_per_file, self.pixel_mask = frames, images_per_file, pixel_mask
        self.stem = folder / f"bcmi_{uuid.uuid4().hex[:8]}_1"
        self._documents, self._resource, self._taken = deque(), "", 0
        self._file = self._data = None

    def stage(self):
        if self.pixel_mask is not None:
            with h5py.File(f"{self.stem}_master.h5", "w") as master:
                master["/entry/instrument/detector/detectorSpecific/pixel_mask"] = self.pixel_mask
        return [self]

    def unstage(self):
        if self._file is not None:
            self._file.close()
        return [self]

    def trigger(self):
        from ophyd.status import Status

        number, row = divmod(self._taken, self.images_per_file)
        path = f"{self.stem}_data_{number + 1:06d}.h5"
        shape = self.frames.shape[1:]
        if row == 0:
            self.unstage()
            self._file = h5py.File(path, "w", libver="latest")
            self._data = self._file.create_dataset(
                "/entry/data/data",
                (0, *shape),
                "u4",
                maxshape=(None, *shape),
                chunks=(1, *shape),
                **hdf5plugin.Bitshuffle(cname="lz4"),
            )
            self._file.swmr_mode = True
        self._data.resize(row + 1, axis=0)
        self._data[row] = self.frames[self._taken]
        self._data.flush()
        if row == 0:
            self._resource = str(uuid.uuid4())
            self._documents.append(
                (
                    "stream_resource",
                    {
                        "uid": self._resource,
                        "data_key": "eiger_image",
                        "mimetype": "application/x-hdf5",
                        "uri": f"file://localhost{path}",
                        "parameters": {
                            "dataset": "/entry/data/data",
                            "swmr": True,
                            "chunk_shape": (1, *shape),
                        },
                    },
                )
            )
        self._documents.append(
            (
                "stream_datum",
                {
                    "uid": f"{self._resource}/{row}",
                    "stream_resource": self._resource,
                    "descriptor": "",
                    "indices": {"start": row, "stop": row + 1},
                    "seq_nums": {"start": 0, "stop": 0},
                },
            )
        )
        self._taken += 1
        status = Status()
        status.set_finished()
        return status

    def collect_asset_docs(self, index=None):
        while self._documents:
            yield self._documents.popleft()

    def get_index(self):
        return self._taken

    def read(self):
        return {"eiger_frame": {"value": self._taken - 1, "timestamp": time.time()}}

    def describe(self):
        return {
            "eiger_image": {
                "source": "fake",
                "shape": list(self.frames.shape[1:]),
                "dtype": "array",
                "dtype_numpy": "<u4",
                "external": "STREAM:",
            },
            "eiger_frame": {"source": "fake", "shape": [], "dtype": "integer", "dtype_numpy": "<i8"},
        }

    def read_configuration(self):
        return {}

    def describe_configuration(self):
        return {}


class Reading:
    """Scalars that take the next of given values at each read."""

    parent = None

    def __init__(self, name, **values):
        self.name, self._values, self._point = name, values, 0

    def read(self):
        point, self._point = self._point, self._point + 1
        return {key: {"value": float(v[point]), "timestamp": time.time()} for key, v in self._values.items()}

    def describe(self):
        return {
            key: {"source": "fake", "shape": [], "dtype": "number", "dtype_numpy": "<f8"}
            for key in self._values
        }

    def read_configuration(self):
        return {}

    def describe_configuration(self):
        return {}


def take(eiger, values, callbacks, points=None, repeat=(), fail_at=None, **start):
    """Run a scan; `values` maps event keys to a value per point; a point in `repeat` is exposed twice."""
    reading = Reading("readings", **values)
    points = len(next(iter(values.values()))) if points is None else points

    @bpp.stage_decorator([eiger])
    @bpp.run_decorator(md=start)
    def scan():
        for point in range(points):
            if point == fail_at:
                raise RuntimeError("the beam is gone")
            yield from bps.trigger(eiger, wait=True)
            if point in repeat:
                yield from bps.trigger(eiger, wait=True)
            yield from bps.create("primary")
            yield from bps.read(eiger)
            yield from bps.read(reading)
            yield from bps.save()

    RE = RunEngine({}, context_managers=[])
    for callback in callbacks:
        RE.subscribe(callback)
    try:
        (uid,) = RE(scan())
    except RuntimeError as error:
        if fail_at is None:
            raise
        return error
    return uid


def poisson(shape, mean=3.0, seed=0):
    """Frames of independent counts, uint32."""
    return np.random.default_rng(seed).poisson(mean, shape).astype(np.uint32)
