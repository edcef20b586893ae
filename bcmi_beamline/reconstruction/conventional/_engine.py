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
    Rule,
    add,
    coefficients,
    free_log_likelihood,
    intensity,
    mix,
    mixed,
    modulus_scale,
)
from bcmi_beamline.reconstruction.fourier import WORKERS

DESCENT = {"ml": Rule.anscombe, "poisson": Rule.poisson}
"""What the accelerated descents step down."""
EXACT = "er", *DESCENT
"""The algorithms that allow for the area of the pixels."""
LEAST_BLURRED = 0.1
"""A blurred intensity is taken to be at least this part of the coherent one."""


class Engine:
    """Iterates an object towards measured moduli and a support; corner origin, complex64.

    The iterate is kept as a part inside the smallest box around the support, in real space, and the rest, in
    Fourier space: ``psi = outside + F[box]``. No map needs the rest anywhere else (`_updates`), so transforms
    start from and end at the box: exact, and with an object that fills a third of every axis at less than
    half of the work. The box is transformed along the rocking axis first; all that follows is done a few
    frames at a time while they are in cache.

    Parameters
    ----------
    packed : ndarray, (J, Ny, Nx), float32
        Counts with mask and free pixels marked (`pack`), corner origin.
    rho : ndarray, (J, Ny, Nx), complex64
        Start.
    support : ndarray, (J, Ny, Nx), bool
    workers : int
        Threads.
    pixels : bool
        Allow for the area of pixels that touch each other, in ``"er"`` and the descents. Counting over it
        multiplies the autocorrelation of the object by ``sinc(lag / field of view)`` along y and x, a tenth
        at a quarter of the field. The other maps, which search, find the crystal as often without it.
    coherence : Coherence, optional
        Blurs the intensities; fully coherent without.
    """

    def __init__(
        self,
        packed: np.ndarray,
        rho: np.ndarray,
        support: np.ndarray,
        workers: int = WORKERS,
        *,
        pixels: bool = False,
        coherence: Coherence | None = None,
    ) -> None:
        self._shape = packed.shape
        self._packed = packed
        self._frames = _portions(packed.shape[0], 8 * packed[0].size)
        self._free = [
            np.flatnonzero((block < 0) & (block > -1e29)).astype(np.int32)
            for block in (packed[frames].ravel() for frames in self._frames)
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
        self._pixels: np.ndarray | None = None
        self._pixel_transfer = _pixel_transfer(packed.shape[1:]) if pixels else None
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
        image = np.zeros([i.size for i in window], np.complex64)
        rest = self._outside
        if rest is not None:
            columns = self._columns_for(window)
            self._each(lambda frames: self._down(rest[frames].copy(), columns, window, frames), self._frames)
            image = self._box_of(columns, window)
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
            psi = np.asarray(sp_fft.fftn(beyond, norm="ortho", overwrite_x=True))
            self._outside = psi if self._outside is None else self._outside + psi

    # -- iterations ---------------------------------------------------------------------------------
    def step(self, algorithm: str, beta: float) -> None:
        """One iteration of ``"er"``, ``"hio"``, ``"raar"``, ``"dm"``, ``"ml"`` or ``"poisson"``.

        Sets `error` and `free_llk` of the iterate that the step started from. The last two are accelerated
        projected gradients, on variance-stabilised amplitudes and on Poisson's likelihood itself, whose steps
        are shorter; `beta` has no part in them.
        """
        self._pixels = self._pixel_transfer if algorithm in EXACT else None
        if algorithm in DESCENT:
            self._accelerated(DESCENT[algorithm])
            return
        self._previous = None
        if algorithm == "dm":
            self._difference_map(beta)
        else:
            self._box = self._project(*coefficients(algorithm, beta))

    def finish(self) -> None:
        """Leave an object inside the support and in `error`, `free_llk` what it is worth."""
        self._confine()
        self._pixels = self._pixel_transfer
        self._sweep(self._box, lambda *_: None)

    def refine_coherence(self, steps: int) -> None:
        """Fit the kernel of partial coherence to the present iterate."""
        if self.coherence is None:
            return
        self._pixels = self._pixel_transfer
        self.coherence.refine(self._power(self._columns(self._box), 1.0, blurred=True), self._packed, steps)

    def _confine(self) -> None:
        """Drop what is outside the support."""
        if self._previous is not None:
            self._box = self._previous
            self._previous = None
        self._box = np.where(self._inside, self.look(self._window), 0)
        self._outside = None

    def _accelerated(self, rule: Rule) -> None:
        """Y. Nesterov's extrapolation (Soviet Math. Dokl. 27, 372 (1983)) of steps down the gradient."""
        if self._previous is None:
            self._confine()
            self._previous = self._box
            self._momentum = 1.0
        following = (1 + np.sqrt(1 + 4 * self._momentum**2)) / 2
        momentum = np.float32(min((self._momentum - 1) / following, 0.9))
        self._momentum = following
        point = self._project(0, 0, 0, 1, rule=rule)
        self._box = point + momentum * (point - self._previous)
        self._previous = point

    def _project(self, a: float, b: float, c: float, d: float, rule: Rule = Rule.moduli) -> np.ndarray:
        """``S (c rho + d P)`` in the box; the rest becomes ``a rho + b P``."""
        columns = self._columns_for(self._window)
        before, after = self._outside, None
        if a or b:
            after = np.empty(self._shape, np.complex64) if before is None else before

        def update(psi: np.ndarray, scale: np.ndarray, frames: slice) -> None:
            if after is not None:
                mixed(psi.ravel(), scale, a, b, after[frames].reshape(-1))
            mix(psi.ravel(), scale, c, d)
            self._down(psi, columns, self._window, frames)

        self._sweep(self._box, update, rule)
        self._outside = after
        return self._inside * self._box_of(columns, self._window)

    def _difference_map(self, beta: float) -> None:
        """``rho + beta (S f_M - P_M f_S)`` (V. Elser, J. Opt. Soc. Am. A 20, 40 (2003)).

        ``f_M = (1 + 1/beta) P - rho / beta`` and ``f_S = (1 - 1/beta) S rho + rho / beta``.
        """
        columns, own = self._columns_for(self._window), self._columns_for(self._window)
        rest = np.empty(self._shape, np.complex64) if self._outside is None else self._outside

        def estimates(psi: np.ndarray, scale: np.ndarray, frames: slice) -> None:
            rest[frames] = psi
            self._down(psi.copy(), own, self._window, frames)
            mix(psi.ravel(), scale, -1 / beta, 1 + 1 / beta)
            self._down(psi, columns, self._window, frames)

        def close(psi: np.ndarray, scale: np.ndarray, frames: slice) -> None:
            mix(psi.ravel(), scale, 0.0, 1.0)
            add(rest[frames].reshape(-1), -beta, psi.ravel())

        self._sweep(self._box, estimates)
        error, free_llk = self.error, self.free_llk
        self._outside = rest
        shared = np.float32(1 - 1 / beta) * (self._inside * self._box_of(own, self._window))
        self._sweep(shared, close, gain=1 / beta)
        self._box = np.float32(beta) * (self._inside * self._box_of(columns, self._window))
        self.error, self.free_llk = error, free_llk

    # -- passes -------------------------------------------------------------------------------------
    def _sweep(
        self,
        box: np.ndarray,
        work: Callable[[np.ndarray, np.ndarray, slice], None],
        rule: Rule = Rule.moduli,
        gain: float = 1.0,
    ) -> None:
        """Hand ``psi = gain outside + F[box]`` and the scales of its moduli to `work`, some frames at a time.

        `work` gets psi (frames, Ny, Nx), which it may destroy, the scales (flat) and the frames.
        """
        columns = self._columns(box)
        scales = self._blurred_scales(columns, gain, rule) if self.coherence is not None else None

        def block(item: tuple[slice, np.ndarray]) -> tuple[float, float]:
            frames, free = item
            psi = self._wave(columns, frames, gain)
            if scales is not None:
                work(psi, scales[frames].reshape(-1), frames)
                return 0.0, 0.0
            power = _power_of(psi)
            scale, residual, free_llk = self._scale(power, power, frames, free, rule)
            work(psi, scale, frames)
            return residual, free_llk

        sums = self._each(block, zip(self._frames, self._free, strict=True))
        if scales is None:
            self._judge(sums)

    def _blurred_scales(self, columns: np.ndarray, gain: float, rule: Rule) -> np.ndarray:
        """Scales of the moduli, (J, Ny, Nx), where the light is partially coherent.

        The modulus projection divides by the blurred intensity (J. N. Clark et al., Nat. Commun. 3, 993
        (2012)); the step of a descent carries the quotient back through the blur as well.
        """
        assert self.coherence is not None
        power = self._power(columns, gain)
        blurred = self.coherence.blur(power)

        def moduli(item: tuple[slice, np.ndarray]) -> tuple[float, float]:
            frames, free = item
            scale, residual, free_llk = self._scale(power[frames], blurred[frames], frames, free, rule)
            blurred[frames] = scale.reshape(blurred[frames].shape)
            return residual, free_llk

        self._judge(self._each(moduli, zip(self._frames, self._free, strict=True)))
        return self.coherence.blur(blurred, back=True) if rule else blurred

    def _scale(
        self, power: np.ndarray, blurred: np.ndarray, frames: slice, free: np.ndarray, rule: Rule
    ) -> tuple[np.ndarray, float, float]:
        """Scales of the moduli (flat), residual and free log-likelihood of some frames.

        `blurred` is `power`, the coherent intensity, or what partial coherence makes of it.
        """
        if self._pixels is not None:
            blurred = self._over_pixels(blurred)
        if blurred is not power:
            # where the wave is not yet consistent, an estimate near zero would blow it up
            np.maximum(blurred, 0 if rule else np.float32(LEAST_BLURRED) * power, out=blurred)
        flat, packed = blurred.reshape(-1), self._packed[frames].reshape(-1)
        free_llk = free_log_likelihood(flat, packed, free)
        residual = modulus_scale(flat, packed, rule.value)
        if rule and self._pixels is not None:
            flat = self._over_pixels(blurred).reshape(-1)
        return flat, residual, free_llk

    def _judge(self, sums: list[Any]) -> None:
        residual, free_llk = np.sum(sums, axis=0)
        self.error = float(np.sqrt(residual / self._total))
        self.free_llk = float(free_llk / self._n_free) if self._n_free else float("nan")

    def _power(self, columns: np.ndarray, gain: float, blurred: bool = False) -> np.ndarray:
        """Intensities (J, Ny, Nx); `blurred` over the pixels where these are allowed for."""
        power = np.empty(self._shape, np.float32)

        def fill(frames: slice) -> None:
            part = _power_of(self._wave(columns, frames, gain))
            power[frames] = self._over_pixels(part) if blurred and self._pixels is not None else part

        self._each(fill, self._frames)
        return power

    def _over_pixels(self, power: np.ndarray) -> np.ndarray:
        spectrum = np.asarray(sp_fft.rfft2(power, workers=1))
        spectrum *= self._pixels
        return np.asarray(sp_fft.irfft2(spectrum, power.shape[1:], overwrite_x=True, workers=1))

    # -- transforms ---------------------------------------------------------------------------------
    def _columns_for(self, window: Window) -> np.ndarray:
        return np.empty((self._shape[0], window[1].size, window[2].size), np.complex64)

    def _columns(self, box: np.ndarray) -> np.ndarray:
        """A box transformed along the rocking axis, (J, by, bx)."""
        columns, zeta = self._columns_for(self._window), self._window[0].ravel()

        def forward(rows: slice) -> None:
            block = np.zeros(columns[:, rows].shape, np.complex64)
            block[zeta] = box[:, rows]
            _in_place(sp_fft.fft, block, axis=0)
            columns[:, rows] = block

        self._each(forward, _portions(columns.shape[1], columns[:, 0].nbytes))
        return columns

    def _box_of(self, columns: np.ndarray, window: Window) -> np.ndarray:
        """Inverse of `_columns` within a window."""
        zeta = window[0].ravel()
        box = np.empty([i.size for i in window], np.complex64)

        def inverse(rows: slice) -> None:
            block = np.ascontiguousarray(columns[:, rows])
            _in_place(sp_fft.ifft, block, axis=0)
            box[:, rows] = block[zeta]

        self._each(inverse, _portions(columns.shape[1], columns[:, 0].nbytes))
        return box

    def _wave(self, columns: np.ndarray, frames: slice, gain: float) -> np.ndarray:
        """``gain outside + F[box]`` in some frames, (frames, Ny, Nx)."""
        _, ny, nx = self._shape
        part = columns[frames]
        lines = np.zeros((*part.shape[:2], nx), np.complex64)
        lines[:, :, self._window[2].ravel()] = part
        _in_place(sp_fft.fft, lines, axis=2)
        psi = np.zeros((len(part), ny, nx), np.complex64)
        psi[:, self._window[1].ravel()] = lines
        _in_place(sp_fft.fft, psi, axis=1)
        if self._outside is not None:
            add(psi.reshape(-1), gain, self._outside[frames].reshape(-1))
        return psi

    def _down(self, psi: np.ndarray, columns: np.ndarray, window: Window, frames: slice) -> None:
        """Inverse in-plane into the columns of a window; destroys `psi`."""
        _in_place(sp_fft.ifft, psi, axis=1)
        lines = psi[:, window[1].ravel()]
        _in_place(sp_fft.ifft, lines, axis=2)
        columns[frames] = lines[:, :, window[2].ravel()]

    def _each(self, work: Callable[[Any], Any], items: Any) -> list[Any]:
        return list(self._pool.map(work, items))


def _power_of(psi: np.ndarray) -> np.ndarray:
    power = np.empty(psi.shape, np.float32)
    intensity(psi.reshape(-1), power.reshape(-1))
    return power


def _pixel_transfer(shape: tuple[int, ...]) -> np.ndarray:
    """``sinc`` of the lag relative to the field of view, on the half spectrum of a frame."""
    ny, nx = shape
    return (np.sinc(np.fft.fftfreq(ny))[:, None] * np.sinc(np.fft.rfftfreq(nx))).astype(np.float32)


def _portions(count: int, item_bytes: int, cache_bytes: int = 1 << 19) -> list[slice]:
    """Cut `count` items into portions that fit a core's cache."""
    size = max(1, cache_bytes // item_bytes)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _in_place(transform: Callable[..., Any], a: np.ndarray, **kwargs: int) -> None:
    """Unitary transform of `a` into itself (scipy may, but need not, use the memory it is offered)."""
    out: np.ndarray = transform(a, norm="ortho", overwrite_x=True, workers=1, **kwargs)
    if not np.may_share_memory(out, a):
        a[...] = out
