"""Where a batch of frames is computed: fused loops on processors, or whole arrays on an accelerator.

Both do the same arithmetic; they differ in rounding. A device keeps arrays of its own kind: `put` brings an
array there and `get` brings it back; everything between obeys numpy's operators.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bcmi_beamline.reconstruction.fourier import WORKERS, fft2, ifft2, transform_lines
from bcmi_beamline.reconstruction.ptychography import _kernels as kernels
from bcmi_beamline.reconstruction.ptychography._detector import Detector

Array = Any
"""An array of the device."""

SMALL = 2**15
"""Pixels below which threads wait for each other longer than they work, most of all on a busy machine."""


@dataclass
class Sums:
    """What batches of frames ask for, added up; arrays of the device."""

    image: Array
    """(H, W) complex: ``conj(probe) residual``."""
    light: Array
    """(H, W) real: ``|probe|**2``."""
    probe: Array
    """(k, m, h, w) complex: ``conj(image) residual`` for every part of the probe."""
    power: Array
    """(h, w) real: ``|image|**2``."""
    background: Array
    """(N, N) real: what the background must be multiplied with; empty where there is none."""


@dataclass
class Asked:
    """What single frames of a batch ask for."""

    score: np.ndarray
    """(b, 5): see `kernels.modulus_residual`."""
    normal: np.ndarray | None
    """(b, 5): see `kernels.position_gradient`."""
    overlaps: np.ndarray | None
    """(b, k, 2): see `kernels.overlaps`."""


@dataclass
class Batch:
    """Frames that share one shifted probe."""

    index: np.ndarray
    corners: np.ndarray
    """(b, 2) whole pixels."""
    weights: np.ndarray
    """(b, 2 + k), float32: of the probe, its two derivatives, and its k - 1 variations."""
    locate: bool
    """Whether positions and variations are wanted."""


class Device(Protocol):
    """What the engine needs of a place to compute."""

    name: str

    def put(self, a: np.ndarray) -> Array:
        """Copy to the device."""
        ...

    def get(self, a: Array) -> np.ndarray:
        """Copy from the device."""
        ...

    def zeros(self, a: Array) -> Array:
        """Return zeros like `a`."""
        ...

    def fft2(self, a: Array) -> Array:
        """Unitary forward transform over the last two axes."""
        ...

    def ifft2(self, a: Array) -> Array:
        """Unitary inverse transform over the last two axes."""
        ...

    def frames(
        self,
        detector: Detector,
        batch: Batch,
        parts: Array,
        image: Array,
        background: Array,
        sums: Sums,
        poisson: bool,
    ) -> Asked:
        """Compare a batch with its frames and add what it asks for to `sums`.

        `parts` (k, m, h, w) are the probe and its variations, shifted to the common remainder of the batch,
        where they have light: outside they are 0. What they are asked for is added to ``sums.probe`` still
        shifted.
        """
        ...

    def step(self, image: Array, sums: Sums, step: float, keep: float, floor: float) -> None:
        """``image += step sums.image / (keep sums.light + floor)``; empties both sums."""
        ...


def make_device(name: str) -> Device:
    """Choose where to compute.

    Parameters
    ----------
    name : str
        ``numpy`` (all processors), ``torch`` (its accelerator where it has one), ``torch:cpu``,
        ``torch:cuda``, ``cupy``.

    Raises
    ------
    ValueError
        When there is no such device or its library or hardware is missing.
    """
    kind, _, where = name.partition(":")
    if kind == "numpy" and not where:
        return Processors()
    if kind in ("torch", "cupy") and not (kind == "cupy" and where):
        try:
            return _torch(where) if kind == "torch" else _cupy()
        except ImportError:
            raise ValueError(
                f"device {name!r} needs {kind}, which is not installed: pip install {kind}"
            ) from None
    raise ValueError(f"there is no device {name!r}: choose numpy, torch, torch:cpu, torch:cuda or cupy")


class Processors:
    """Fused loops in threads."""

    name = "numpy"

    def __init__(self, threads: int = WORKERS) -> None:
        self._count = threads
        self._pool = ThreadPoolExecutor(threads)
        self._scratch: dict[str, np.ndarray] = {}

    def put(self, a: np.ndarray) -> np.ndarray:
        return a.copy()

    def get(self, a: np.ndarray) -> np.ndarray:
        return a.copy()

    def zeros(self, a: np.ndarray) -> np.ndarray:
        return np.zeros_like(a)

    def fft2(self, a: np.ndarray) -> np.ndarray:
        return fft2(a, workers=self._count)

    def ifft2(self, a: np.ndarray) -> np.ndarray:
        return ifft2(a, workers=self._count)

    def frames(self, detector, batch, parts, image, background, sums, poisson) -> Asked:
        b, k, modes, h, w = len(batch.index), *parts.shape
        fine = [detector.finer * n for n in detector.window]
        base = self._space("base", (k + 2, *parts.shape[1:]))
        base[0], base[3:] = parts[0], parts[1:]
        for m in range(modes):
            for axis in (0, 1):
                kernels.difference(base[0, m], axis, base[1 + axis, m])
        probes = self._space("probes", (b, *parts.shape[1:]))
        residuals = self._space("residuals", probes.shape)
        asked = Asked(np.empty((b, 5)), None, None)
        if batch.locate:
            asked.normal, asked.overlaps = np.empty((b, 5)), np.empty((b, k - 1, 2))
        ratios = np.empty((b, *background.shape), np.float32)

        def compare(low: int, high: int) -> None:
            counts, (top, left) = np.empty(detector.window, np.float32), detector.corner
            waves = self._space(f"waves{low}", (modes, *fine))
            lines = waves[:, :h]
            for j in range(low, high):
                one = slice(j, j + 1)
                which, pixels = batch.index[j], detector.sets(batch.index[j])
                kernels.exit_waves(
                    base, batch.weights[one], image, batch.corners[one], probes[one], residuals[one]
                )
                waves[:, h:], lines[..., w:], lines[..., :w] = 0, 0, residuals[j]
                transform_lines(lines, -1)  # those that are dark need not be transformed
                transform_lines(waves, -2)
                kernels.read_frame(detector.frames[which], top, left, counts)
                kernels.modulus_residual(
                    waves, counts, detector.used[pixels], detector.free[pixels],
                    background, detector.spread, poisson, ratios[j], asked.score[j],
                )  # fmt: skip
                transform_lines(waves, -2, forward=False)
                residuals[j] = transform_lines(lines, -1, forward=False)[..., :w]
                if asked.normal is not None and asked.overlaps is not None:
                    at = (probes[one], image, batch.corners[one])
                    kernels.position_gradient(residuals[one], *at, asked.normal[one])
                    kernels.overlaps(residuals[one], base[3:], image, at[2], asked.overlaps[one])

        work = b * modes * fine[0] * fine[1]
        self._share(compare, b, work)
        gradient = self._space("gradient", base.shape)
        gradient[:] = 0
        at, weights = batch.corners, batch.weights

        def gather_object(low: int, high: int) -> None:
            kernels.object_gradient(residuals, probes, at, sums.image, sums.light, low, high)

        def gather_probe(low: int, high: int) -> None:
            kernels.probe_gradient(residuals, image, at, weights, gradient, sums.power, low, high)

        self._share(gather_object, len(image), work)
        self._share(gather_probe, base.shape[-2], work)
        # the adjoint of a difference is minus the difference
        along = self._space("along", base.shape[-2:])
        for m in range(modes):
            for axis in (0, 1):
                kernels.difference(gradient[1 + axis, m], axis, along)
                gradient[0, m] -= along
        sums.probe[0] += gradient[0]
        sums.probe[1:] += gradient[3:]
        if background.size:
            sums.background += ratios.sum(axis=0)
        return asked

    def step(self, image, sums, step, keep, floor) -> None:
        def rows(low: int, high: int) -> None:
            kernels.object_step(image, sums.image, sums.light, step, keep, floor, low, high)

        self._share(rows, len(image), image.size)

    def _space(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Memory that is kept from batch to batch: fresh pages cost more than the arithmetic on them."""
        size = int(np.prod(shape))
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = np.empty(size, np.complex64)
        return self._scratch[name][:size].reshape(shape)

    def _share(self, work: Callable[[int, int], None], count: int, size: int) -> None:
        """Call ``work(low, high)`` on equal shares of ``range(count)``, the last one in this thread.

        All of it in this thread where `size` pixels are soon done.
        """
        threads = self._count if size >= SMALL else 1
        edges = np.linspace(0, count, min(threads, count) + 1).astype(int)
        *others, mine = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        waiting = [self._pool.submit(work, *share) for share in others]
        work(*mine)
        for other in waiting:
            other.result()


class Arrays:
    """Whole-array operations of a library that looks like numpy.

    Parameters
    ----------
    name : str
    xp : module
        torch or cupy.
    put, get : callable
    add_windows : callable
        ``add_windows(target, values, rows, columns)`` adds (b, N, N) values into a (H, W) array where the
        windows overlap.
    real : type
        float32 of the library.
    """

    def __init__(self, name: str, xp: Any, put, get, add_windows) -> None:
        self.name, self._xp = name, xp
        self.put, self.get, self._add_windows = put, get, add_windows
        self._fixed: dict[int, tuple[Detector, Array, list[Array]]] = {}

    def zeros(self, a: Array) -> Array:
        return self._xp.zeros_like(a)

    def fft2(self, a: Array) -> Array:
        return self._xp.fft.fft2(a, norm="ortho")

    def ifft2(self, a: Array) -> Array:
        return self._xp.fft.ifft2(a, norm="ortho")

    def frames(self, detector, batch, parts, image, background, sums, poisson) -> Asked:
        xp, index = self._xp, batch.index
        ny, nx = parts.shape[-2:]
        weights = self.put(batch.weights)[:, :, None, None, None]
        along = [self._difference(parts[0], axis) for axis in (-2, -1)]
        probes = weights[:, 0] * parts[0] + weights[:, 1] * along[0] + weights[:, 2] * along[1]
        for k in range(1, len(parts)):
            probes = probes + weights[:, 2 + k] * parts[k]
        rows = self.put(batch.corners[:, 0, None] + np.arange(ny))[:, :, None]
        columns = self.put(batch.corners[:, 1, None] + np.arange(nx))[:, None, :]
        patches = image[rows, columns]
        fine = [detector.finer * n for n in detector.window]
        waves = xp.fft.fft2(probes * patches[:, None], s=fine, norm="ortho")

        model = (waves.real**2 + waves.imag**2).sum(1)
        if detector.spread:
            model = self._blur(model, detector.spread)
        model = self._bin(model, detector.finer)
        if background.shape[0]:
            model = model + background
        used, free = self._pixels(detector)
        which = detector.sets(index)
        good = used[self.put(which)]
        counts = self.put(self._counts(detector, index))
        seen = xp.where(good > 0, counts, 0 * good)
        here = model * good
        here = xp.where(here > 0, here, 0 * here)
        if poisson:
            factor = ((seen + kernels.FLOOR) / (here + kernels.FLOOR) - 1) / 2
            factor = xp.where(factor < 1, factor, 0 * factor + 1) * good
        else:
            small = kernels.ANSCOMBE
            factor = (xp.sqrt((seen + small) / (here + small)) - 1) * good
        score = self._score(counts, model, seen, here, free, which)
        if background.shape[0]:
            safe = xp.where(model > 1e-6, model, 0 * model + 1e-6)
            sums.background += (seen / safe * good + (1 - good)).sum(0)
        if detector.finer > 1:
            factor = xp.kron(factor, self.put(np.ones((1, detector.finer, detector.finer), np.float32)))
        if detector.spread:
            factor = self._blur(factor, detector.spread)
        residuals = self.ifft2(waves * factor[:, None])[..., :ny, :nx]

        self._add_windows(sums.image, (probes.conj() * residuals).sum(1), rows, columns)
        self._add_windows(sums.light, (probes.real**2 + probes.imag**2).sum(1), rows, columns)
        asked = patches.conj()[:, None] * residuals
        gradient = (weights[:, 0] * asked).sum(0)
        for axis in (0, 1):
            gradient = gradient - self._difference((weights[:, 1 + axis] * asked).sum(0), axis - 2)
        sums.probe[0] += gradient
        for k in range(1, len(parts)):
            sums.probe[k] += (weights[:, 2 + k] * asked).sum(0)
        sums.power += (weights[:, 0, 0] ** 2 * (patches.real**2 + patches.imag**2)).sum(0)
        if not batch.locate:
            return Asked(score, None, None)
        return Asked(
            score,
            self._normal(residuals, probes, patches),
            self._overlaps(residuals, parts[1:], patches),
        )

    def step(self, image, sums, step, keep, floor) -> None:
        image += sums.image * (step / (keep * sums.light + floor))
        sums.image *= 0
        sums.light *= 0

    # -- parts ----------------------------------------------------------------------------------------
    def _roll(self, a: Array, by: int, axis: int) -> Array:
        return self._xp.roll(a, by, axis)

    def _difference(self, a: Array, axis: int) -> Array:
        """Minus the derivative, as `kernels.differences`."""
        near = self._roll(a, -1, axis) - self._roll(a, 1, axis)
        far = self._roll(a, -2, axis) - self._roll(a, 2, axis)
        return near * (-8 / 12) + far * (1 / 12)

    def _blur(self, a: Array, spread: float) -> Array:
        beside = sum(self._roll(a, by, axis) for axis in (-2, -1) for by in (-1, 1))
        return (1 - 4 * spread) * a + spread * beside

    def _bin(self, a: Array, finer: int) -> Array:
        if finer == 1:
            return a
        b, ny, nx = a.shape
        return a.reshape(b, ny // finer, finer, nx // finer, finer).sum(4).sum(2)

    def _counts(self, detector: Detector, index: np.ndarray) -> np.ndarray:
        (top, left), (ny, nx) = detector.corner, detector.window
        cut = detector.frames[index, top : top + ny, left : left + nx].astype(np.float32)
        return np.fft.ifftshift(cut, axes=(1, 2))

    def _pixels(self, detector: Detector) -> tuple[Array, list[Array]]:
        """Sets of pixels on the device; they are brought there once."""
        if id(detector) not in self._fixed:
            flat = [self.put(f[:, 0] * detector.window[1] + f[:, 1]) for f in detector.free]
            self._fixed[id(detector)] = detector, self.put(detector.used), flat
        return self._fixed[id(detector)][1:]

    def _score(self, counts, model, seen, here, free, which) -> np.ndarray:
        xp = self._xp
        score = np.zeros((len(which), 5))
        difference = xp.sqrt(here) - xp.sqrt(seen)
        for column, values in enumerate((difference**2, seen, here)):
            score[:, column] = self.get(values.reshape(len(which), -1).sum(1))
        for j, pixels in enumerate(which):
            if len(free[pixels]):
                value, expected = counts[j].reshape(-1)[free[pixels]], model[j].reshape(-1)[free[pixels]]
                expected = xp.where(expected > 1e-6, expected, 0 * expected + 1e-6)
                safe = xp.where(value > 0, value, expected)
                score[j, 3] = float((expected - value + value * xp.log(safe / expected)).sum())
                score[j, 4] = len(free[pixels])
        return score

    def _normal(self, residuals, probes, patches) -> np.ndarray:
        inner = (slice(None), slice(None), slice(1, -1), slice(1, -1))
        up, left = (0.5 * (self._roll(patches, -1, axis) - self._roll(patches, 1, axis)) for axis in (-2, -1))
        power = (probes.real**2 + probes.imag**2).sum(1)[:, 1:-1, 1:-1]
        asked = (probes.conj() * residuals)[inner].sum(1)
        up, left = up[:, 1:-1, 1:-1], left[:, 1:-1, 1:-1]
        terms = (
            power * (up.real**2 + up.imag**2),
            power * (up.real * left.real + up.imag * left.imag),
            power * (left.real**2 + left.imag**2),
            up.real * asked.real + up.imag * asked.imag,
            left.real * asked.real + left.imag * asked.imag,
        )
        return np.stack([self.get(t.reshape(len(t), -1).sum(1)) for t in terms], axis=1).astype(float)

    def _overlaps(self, residuals, parts, patches) -> np.ndarray:
        found = np.zeros((len(residuals), len(parts), 2))
        for k in range(len(parts)):
            wave = parts[k] * patches[:, None]
            asked = wave.real * residuals.real + wave.imag * residuals.imag
            power = wave.real**2 + wave.imag**2
            for column, values in enumerate((asked, power)):
                found[:, k, column] = self.get(values.reshape(len(values), -1).sum(1))
        return found


def _torch(where: str) -> Arrays:
    torch = importlib.import_module("torch")
    place = where or ("cuda" if torch.cuda.is_available() else "cpu")
    if place.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device 'torch:cuda': torch finds no CUDA here; choose torch:cpu or numpy")
    try:
        target = torch.device(place)
    except RuntimeError:
        raise ValueError(f"torch has no device {place!r}: choose torch:cpu or torch:cuda") from None

    def add_windows(into, values, rows, columns):
        flat = (rows * into.shape[1] + columns).reshape(-1)
        into.view(-1).index_add_(0, flat, values.reshape(-1))

    if place.startswith("cuda"):
        # sums over overlapping windows must come in one order, or no two runs agree to the bit
        torch.use_deterministic_algorithms(True, warn_only=True)
    return Arrays(
        f"torch:{place}",
        torch,
        lambda a: torch.as_tensor(np.ascontiguousarray(a), device=target).clone(),
        lambda a: a.detach().cpu().numpy(),
        add_windows,
    )


def _cupy() -> Arrays:
    cupy = importlib.import_module("cupy")
    if not cupy.cuda.is_available():
        raise ValueError("device 'cupy': cupy finds no CUDA here; choose numpy or torch:cpu")

    def add_windows(into, values, rows, columns):
        for value, row, column in zip(values, rows, columns, strict=True):  # one by one: in one order
            into[row, column] += value

    return Arrays("cupy", cupy, cupy.asarray, cupy.asnumpy, add_windows)
