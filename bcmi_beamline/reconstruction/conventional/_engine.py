"""One object, its data and the passes over memory that iterate it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from scipy import fft as sp_fft

from bcmi_beamline.reconstruction.conventional._coherence import Coherence
from bcmi_beamline.reconstruction.conventional._support import Window, wrapped_box
from bcmi_beamline.reconstruction.conventional._updates import (
    add,
    coefficients,
    free_log_likelihood,
    intensity,
    mix,
    mixed,
    modulus_scale,
)
from bcmi_beamline.reconstruction.fourier import WORKERS

ANSCOMBE = 3 / 8
LEAST_BLURRED = 0.1
"""A blurred intensity is taken to be at least this part of the coherent one."""


class Engine:
    """Iterates an object towards measured moduli and a support; corner origin, complex64.

    The iterate is kept as a part inside the smallest box around the support, in real space, and the rest, in
    Fourier space: ``psi = outside + F[box]``. No map needs the rest anywhere else (`_updates`), so transforms
    start from and end at the box: exact, and with an object that fills a third of every axis at less than
    half of the work. In-plane transforms are done frame by frame; those along the rocking axis a few rows
    at a time together with the modulus projection and the update, while the data are in cache.

    Parameters
    ----------
    packed : ndarray, (J, Ny, Nx), float32
        Counts with mask and free pixels marked (`pack`), corner origin.
    rho : ndarray, (J, Ny, Nx), complex64
        Start.
    support : ndarray, (J, Ny, Nx), bool
    workers : int
        Threads.
    coherence : Coherence, optional
        Blurs the intensities; fully coherent without.
    """

    def __init__(
        self,
        packed: np.ndarray,
        rho: np.ndarray,
        support: np.ndarray,
        workers: int = WORKERS,
        coherence: Coherence | None = None,
    ) -> None:
        self._shape = packed.shape
        # (Ny, J, Nx), so that the columns of some rows lie together
        self._packed = np.ascontiguousarray(packed.transpose(1, 0, 2))
        self._rows = _portions(packed.shape[1], 8 * packed[:, 0].size)
        self._free = [
            np.flatnonzero((block < 0) & (block > -1e29)).astype(np.int32)
            for block in (self._packed[rows].ravel() for rows in self._rows)
        ]
        self._n_free = sum(free.size for free in self._free)
        self._total = float(packed[packed >= 0].sum(dtype=float)) or 1.0
        self._pool = ThreadPoolExecutor(max(1, workers))
        self._support = support
        self._window = wrapped_box(support)
        self._inside = support[self._window]
        self._outside: np.ndarray | None = None
        self._take(rho)
        self._previous: np.ndarray | None = None
        self._momentum = 1.0
        self.coherence = coherence
        self.error = float("nan")
        self.free_llk = float("nan")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    # -- the iterate --------------------------------------------------------------------------------
    @property
    def rho(self) -> np.ndarray:
        """The iterate on the whole grid, (J, Ny, Nx), complex64."""
        return self.look(tuple(np.ix_(*(np.arange(n) for n in self._shape))))

    def look(self, window: Window) -> np.ndarray:
        """The iterate in a window (`wrapped_box`) that holds the support."""
        image = np.zeros(np.broadcast_shapes(*(i.shape for i in window)), np.complex64)
        if self._outside is not None:
            planes = np.empty((window[0].size, *self._shape[1:]), np.complex64)

            def back(rows: slice) -> None:
                self._down(self._outside[rows].copy(), planes, window, rows)  # pyright: ignore[reportOptionalSubscript]

            self._each(back, self._rows)
            image = self._box_of(planes, window)
        place = [(b - w.ravel()[0]) % n for b, w, n in zip(self._window, window, self._shape, strict=True)]
        image[tuple(place)] += self._box
        return image

    @property
    def support(self) -> np.ndarray:
        """Where the object may be, (J, Ny, Nx), bool; setting it moves the box."""
        return self._support

    @support.setter
    def support(self, support: np.ndarray) -> None:
        whole = np.zeros(self._shape, np.complex64)
        whole[self._window] = self._box
        self._support = support
        self._window = wrapped_box(support)
        self._inside = support[self._window]
        self._take(whole)
        self._previous = None

    def _take(self, rho: np.ndarray) -> None:
        """Put `rho` into the box, what lies beyond it into the rest."""
        self._box = rho[self._window]
        beyond = rho.copy()
        beyond[self._window] = 0
        if beyond.any():
            psi = np.asarray(sp_fft.fftn(beyond, norm="ortho", overwrite_x=True)).transpose(1, 0, 2)
            self._outside = np.ascontiguousarray(psi if self._outside is None else self._outside + psi)

    # -- iterations ---------------------------------------------------------------------------------
    def step(self, algorithm: str, beta: float) -> None:
        """One iteration of ``"er"``, ``"hio"``, ``"raar"``, ``"dm"`` or ``"ml"``.

        Sets `error` and `free_llk` of the iterate that the step started from. ``"ml"`` is accelerated
        projected gradient on variance-stabilised amplitudes; `beta` has no part in it.
        """
        if algorithm == "ml":
            self._accelerated()
            return
        self._previous = None
        if algorithm == "dm":
            self._difference_map(beta)
        else:
            self._box = self._project(*coefficients(algorithm, beta))

    def finish(self) -> None:
        """Leave an object inside the support and in `error`, `free_llk` what it is worth."""
        self._confine()
        self._sweep(self._box, lambda *_: None)

    def refine_coherence(self, steps: int) -> None:
        """Fit the kernel of partial coherence to the present iterate."""
        if self.coherence is None:
            return
        power = np.empty(self._packed.shape, np.float32)
        planes = self._planes(self._box)

        def moduli(rows: slice) -> None:
            intensity(self._wave(planes, rows, 1.0).ravel(), power[rows].reshape(-1))

        self._each(moduli, self._rows)
        self.coherence.refine(power, self._packed, steps)

    def _confine(self) -> None:
        """Drop what is outside the support."""
        if self._previous is not None:
            self._box = self._previous
            self._previous = None
        self._box = np.where(self._inside, self.look(self._window), 0)
        self._outside = None

    def _accelerated(self) -> None:
        """Y. Nesterov's extrapolation (Soviet Math. Dokl. 27, 372 (1983)) of steps down the gradient."""
        if self._previous is None:
            self._confine()
            self._previous = self._box
            self._momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * self._momentum**2)) / 2
        momentum = np.float32(min((self._momentum - 1) / following, 0.9))
        self._momentum = following
        point = self._project(0, 0, 0, 1, offset=ANSCOMBE)
        self._box = point + momentum * (point - self._previous)
        self._previous = point

    def _project(self, a: float, b: float, c: float, d: float, offset: float = 0.0) -> np.ndarray:
        """``S (c rho + d P)`` in the box; the rest becomes ``a rho + b P``."""
        planes = np.empty((self._window[0].size, *self._shape[1:]), np.complex64)
        before, after = self._outside, None
        if a or b:
            after = np.empty(self._packed.shape, np.complex64) if before is None else before

        def update(psi: np.ndarray, scale: np.ndarray, rows: slice) -> None:
            if after is not None:
                mixed(psi.ravel(), scale, a, b, after[rows].reshape(-1))
            mix(psi.ravel(), scale, c, d)
            self._down(psi, planes, self._window, rows)

        self._sweep(self._box, update, offset)
        self._outside = after
        return self._inside * self._box_of(planes, self._window)

    def _difference_map(self, beta: float) -> None:
        """``rho + beta (S f_M - P_M f_S)`` (V. Elser, J. Opt. Soc. Am. A 20, 40 (2003)).

        ``f_M = (1 + 1/beta) P - rho / beta`` and ``f_S = (1 - 1/beta) S rho + rho / beta``.
        """
        shape = (self._window[0].size, *self._shape[1:])
        planes, own = np.empty(shape, np.complex64), np.empty(shape, np.complex64)
        rest = np.empty(self._packed.shape, np.complex64) if self._outside is None else self._outside

        def estimates(psi: np.ndarray, scale: np.ndarray, rows: slice) -> None:
            rest[rows] = psi
            self._down(psi.copy(), own, self._window, rows)
            mix(psi.ravel(), scale, -1 / beta, 1 + 1 / beta)
            self._down(psi, planes, self._window, rows)

        def close(psi: np.ndarray, scale: np.ndarray, rows: slice) -> None:
            mix(psi.ravel(), scale, 0.0, 1.0)
            add(rest[rows].reshape(-1), -beta, psi.ravel())

        self._sweep(self._box, estimates)
        error, free_llk = self.error, self.free_llk
        self._outside = rest
        shared = np.float32(1 - 1 / beta) * (self._inside * self._box_of(own, self._window))
        self._sweep(shared, close, gain=1 / beta)
        self._box = np.float32(beta) * (self._inside * self._box_of(planes, self._window))
        self.error, self.free_llk = error, free_llk

    # -- passes -------------------------------------------------------------------------------------
    def _sweep(
        self,
        box: np.ndarray,
        work: Callable[[np.ndarray, np.ndarray, slice], None],
        offset: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        """Hand ``psi = gain outside + F[box]`` and the scales of its moduli to `work`, rows by rows.

        `work` gets psi (rows, J, Nx), which it may destroy, the scales (flat) and the rows.
        """
        planes = self._planes(box)
        blurred = self._blurred(planes, gain, offset) if self.coherence is not None else None

        def block(item: tuple[slice, np.ndarray]) -> tuple[float, float]:
            rows, free = item
            psi, packed = self._wave(planes, rows, gain), self._packed[rows].ravel()
            if blurred is not None:
                work(psi, blurred[rows].ravel(), rows)
                return 0.0, 0.0
            power = np.empty(packed.size, np.float32)
            intensity(psi.ravel(), power)
            free_llk = free_log_likelihood(power, packed, free)
            residual = modulus_scale(power, packed, offset)
            work(psi, power, rows)
            return residual, free_llk

        sums = self._each(block, zip(self._rows, self._free, strict=True))
        if blurred is None:
            self._judge(sums)

    def _blurred(self, planes: np.ndarray, gain: float, offset: float) -> np.ndarray:
        """Scales of the moduli, (Ny, J, Nx), where the light is partially coherent.

        The modulus projection divides by the blurred intensity (J. N. Clark et al., Nat. Commun. 3, 993
        (2012)); the gradient step (`offset` above 0) carries the quotient back through the blur as well.
        """
        assert self.coherence is not None
        power = np.empty(self._packed.shape, np.float32)
        self._each(
            lambda rows: intensity(self._wave(planes, rows, gain).ravel(), power[rows].reshape(-1)),
            self._rows,
        )
        if offset:
            power = self.coherence.blur(power)
        else:  # where the wave is not yet consistent, an estimate near zero would blow it up
            power = np.maximum(self.coherence.blur(power), np.float32(LEAST_BLURRED) * power)

        def moduli(item: tuple[slice, np.ndarray]) -> tuple[float, float]:
            rows, free = item
            flat, packed = power[rows].reshape(-1), self._packed[rows].ravel()
            free_llk = free_log_likelihood(flat, packed, free)
            return modulus_scale(flat, packed, offset), free_llk

        self._judge(self._each(moduli, zip(self._rows, self._free, strict=True)))
        return self.coherence.blur(power, back=True) if offset else power

    def _judge(self, sums: list[Any]) -> None:
        residual, free_llk = np.sum(sums, axis=0)
        self.error = float(np.sqrt(residual / self._total))
        self.free_llk = float(free_llk / self._n_free) if self._n_free else float("nan")

    def _planes(self, box: np.ndarray) -> np.ndarray:
        """Frames of a box, transformed in-plane, (bz, Ny, Nx)."""
        _, ny, nx = self._shape
        rows, columns = self._window[1].ravel(), self._window[2].ravel()
        planes = np.empty((len(box), ny, nx), np.complex64)

        def forward(k: int) -> None:
            lines = np.zeros((rows.size, nx), np.complex64)
            lines[:, columns] = box[k]
            _in_place(sp_fft.fft, lines, axis=1)
            planes[k] = 0
            planes[k][rows] = lines
            _in_place(sp_fft.fft, planes[k], axis=0)

        self._each(forward, range(len(box)))
        return planes

    def _box_of(self, planes: np.ndarray, window: Window) -> np.ndarray:
        """Inverse of `_planes` within a window; destroys `planes`."""
        rows, columns = window[1].ravel(), window[2].ravel()
        box = np.empty((len(planes), rows.size, columns.size), np.complex64)

        def inverse(k: int) -> None:
            _in_place(sp_fft.ifft, planes[k], axis=0)
            lines = planes[k][rows]
            _in_place(sp_fft.ifft, lines, axis=1)
            box[k] = lines[:, columns]

        self._each(inverse, range(len(planes)))
        return box

    def _wave(self, planes: np.ndarray, rows: slice, gain: float) -> np.ndarray:
        """``gain outside + F[box]`` in some rows, (rows, J, Nx)."""
        psi = np.zeros(self._packed[rows].shape, np.complex64)
        psi[:, self._window[0].ravel()] = planes[:, rows].transpose(1, 0, 2)
        _in_place(sp_fft.fft, psi, axis=1)
        if self._outside is not None:
            add(psi.ravel(), gain, self._outside[rows].ravel())
        return psi

    def _down(self, psi: np.ndarray, planes: np.ndarray, window: Window, rows: slice) -> None:
        """Inverse along the rocking axis into the frames of a window; destroys `psi`."""
        _in_place(sp_fft.ifft, psi, axis=1)
        planes[:, rows] = psi[:, window[0].ravel()].transpose(1, 0, 2)

    def _each(self, work: Callable[[Any], Any], items: Any) -> list[Any]:
        return list(self._pool.map(work, items))


def _portions(count: int, item_bytes: int, cache_bytes: int = 1 << 19) -> list[slice]:
    """Cut `count` items into portions that fit a core's cache."""
    size = max(1, cache_bytes // item_bytes)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _in_place(transform: Callable[..., Any], a: np.ndarray, **kwargs: int) -> None:
    """Unitary transform of `a` into itself (scipy may, but need not, use the memory it is offered)."""
    out: np.ndarray = transform(a, norm="ortho", overwrite_x=True, workers=1, **kwargs)
    if not np.may_share_memory(out, a):
        a[...] = out
