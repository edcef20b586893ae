"""Far-field ptychography with mixed probe modes, a varying probe and sub-pixel positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from bcmi_beamline.reconstruction.ptychography._detector import Detector
from bcmi_beamline.reconstruction.ptychography._devices import Array, Batch, Device, Sums, make_device
from bcmi_beamline.reconstruction.ptychography._phases import put_on, slow_phase
from bcmi_beamline.reconstruction.ptychography._positions import Together
from bcmi_beamline.reconstruction.ptychography._source import Free, Source, Waves

GAIN_LIMITS = 0.5, 2.0
"""Of one step of a frame's intensity."""
SMALL_SOURCE = 0.5
"""A probe is only said to come from a region if more than this share of its light does."""
BETTER = 0.97
"""A frame is moved by chance only to where its misfit is at most this share of what it was."""


class Score(NamedTuple):
    """Fit of one pass over the frames."""

    r2: float
    """``sum (|F| - sqrt(I))**2 / sum I`` over the used pixels."""
    free_llk: float
    """Mean negative Poisson log-likelihood over the free pixels; nan where none are free."""


class Engine:
    """State of a reconstruction, and the steps that improve it.

    The model of frame j is ``gain_j**2 blur(|FFT2(T(s_j) probe_j image[window j])|**2) + background`` summed
    over modes, with ``probe_j = probe + sum over k of coefficients[j, k] variations[k]``. The window starts
    at the whole pixel nearest to the frame's offset, and the probe is shifted by what is left, in Fourier
    space. A batch is made of frames whose remainders are alike: they share one shift, and what is left
    to each (a twelfth of a pixel at most) is taken to first order, so that shifts are cheap.

    Parameters
    ----------
    frames : ndarray, (J, Ny, Nx)
        Counts, zero frequency at ``n // 2``; any real dtype, never copied.
    states : ndarray, (S, Ny, Nx), uint8
        0 for a pixel to use, `kernels.MASKED`, `kernels.FREE`; frame j takes set ``j % S``.
    offsets : ndarray, (J, 2)
        Corner (row, column) of every window on the object, pixels, not whole.
    probe : ndarray, (modes, ny, nx), complex64
        Its size is the window of the frames that is used.
    image : ndarray, (H, W), complex64
        The scanned object; every window must fit with half a pixel to spare.
    flux : ndarray, (J,)
        The model of frame j is multiplied by this.
    rng : Generator
    batch : int
        Frames per update.
    spread, finer
        Of the detector, see `Detector`; the probe is `finer` times larger than the window.
    variations : int
        How many ways the probe may vary in from frame to frame (M. Odstrcil et al., Opt. Express 24, 8360
        (2016): orthogonal probe relaxation), found as polynomials in time first.
    device : Device, optional
        Where to compute; all processors by default.
    """

    def __init__(
        self,
        frames: np.ndarray,
        states: np.ndarray,
        offsets: np.ndarray,
        probe: np.ndarray,
        image: np.ndarray,
        flux: np.ndarray,
        rng: np.random.Generator,
        batch: int = 8,
        spread: float = 0.0,
        finer: int = 1,
        variations: int = 0,
        device: Device | None = None,
    ) -> None:
        ny, nx = probe.shape[-2:]
        self.detector = Detector(frames, states, (ny // finer, nx // finer), spread, finer)
        self.device = make_device("numpy") if device is None else device
        self.offsets = offsets.astype(float)
        self.gain = np.sqrt(flux).astype(np.float32)
        self.coefficients = np.zeros((len(frames), variations), np.float32)
        """How much of every variation is in the probe of each frame; see `begin_varying`."""
        self.active = np.arange(len(frames))
        """Frames in use."""
        self.rng, self.batch = rng, batch
        self._asked = np.zeros_like(self.offsets)
        """Gradient of the fit of every frame along its position, by the last pass that located."""
        self._background = np.zeros((0, 0), np.float32)
        self._pull: Array = 0
        """What the last sweep that located asked of the object, (H, W)."""
        self._totals = np.zeros((len(frames), 2))
        self._errors = np.zeros(len(frames))
        self._last_r2, self._age = np.inf, 0
        self._image = self.device.put(np.ascontiguousarray(image, np.complex64))
        self._room = np.subtract(image.shape, probe.shape[-2:])
        self._free = Free((ny, nx), self.device, _taper((ny, nx)) if finer > 1 else None)
        none = np.zeros((variations, *probe.shape))
        parts = self.detector.tilt() * np.concatenate([probe[None], none])
        self._choose(self._free, self.device.put(parts.astype(np.complex64)))

    def _choose(self, among: Free | Source, parts: Array) -> None:
        """Let the probe and its variations (k, m, ny, nx) be one of the waves of `among`."""
        put, box = self.device.put, tuple(s.stop - s.start for s in among.box)
        self._among, self._inner = among, among.hold(parts)
        self._dark = put(self._background)
        self._sums = Sums(
            image=put(np.zeros(self._image.shape, np.complex64)),
            light=put(np.zeros(self._image.shape, np.float32)),
            probe=put(np.zeros((*parts.shape[:2], *box), np.complex64)),
            power=put(np.zeros(box, np.float32)),
            background=put(np.zeros_like(self._background)),
        )
        self._previous: tuple[Array, Array] | None = None

    @property
    def _parts(self) -> Array:
        """The mean probe and its variations, (k, m, ny, nx), with the detector's tilt."""
        return self._among.waves(self._inner)

    @_parts.setter
    def _parts(self, parts: Array) -> None:
        self._inner, self._previous = self._among.hold(parts), None

    # -- what it holds --------------------------------------------------------------------------------
    @property
    def image(self) -> np.ndarray:
        """The object, (H, W), complex64."""
        return self.device.get(self._image)

    @image.setter
    def image(self, image: np.ndarray) -> None:
        self._image, self._previous = self.device.put(image.astype(np.complex64)), None

    @property
    def probe(self) -> np.ndarray:
        """Modes of the mean probe, (modes, ny, nx), complex64."""
        return self.device.get(self._parts[0]) * self.detector.tilt().conj()

    @probe.setter
    def probe(self, probe: np.ndarray) -> None:
        parts = self.device.get(self._parts)
        parts[0] = probe * self.detector.tilt()
        self._parts = self.device.put(parts)

    @property
    def background(self) -> np.ndarray | None:
        """Counts per pixel that no wave makes, zero frequency at ``n // 2``; None where not sought."""
        dark = self.device.get(self._dark)
        return np.fft.fftshift(dark) if dark.size else None

    def seek_background(self, start: float) -> None:
        """Begin to fit a background, from `start` counts in every pixel."""
        self._background = np.full(self.detector.window, start, np.float32)
        self._choose(self._among, self._parts)

    def resized(self, window: tuple[int, int], shape: tuple[int, int], offsets: np.ndarray) -> Engine:
        """Carry everything found over to another window of the detector: a finer or coarser object.

        Parameters
        ----------
        window : (ny, nx)
        shape : (H, W)
            Of the object there; its middle, index ``n // 2``, stays the middle.
        offsets : ndarray, (J, 2)
        """
        old, finer = self.detector.window, self.detector.finer
        untilted = self.device.get(self._parts) * self.detector.tilt().conj()
        parts = crop_spectrum(untilted, (finer * window[0], finer * window[1]))
        image = self.image
        index = [
            (np.arange(n) - n // 2) * (o / w) + m // 2
            for n, m, o, w in zip(shape, image.shape, old, window, strict=True)
        ]
        at = np.meshgrid(*index, indexing="ij")
        away = np.asarray(image - 1)
        real, imaginary = (
            ndimage.map_coordinates(part, at, np.float32, order=3, mode="constant")
            for part in (np.real(away), np.imag(away))
        )
        resampled = (1 + real + 1j * imaginary).astype(np.complex64)
        other = Engine(
            self.detector.frames, self.detector.states, offsets, parts[0], resampled, np.ones(len(offsets)),
            self.rng, self.batch, self.detector.spread, finer, len(parts) - 1, self.device,
        )  # fmt: skip
        other.gain, other.coefficients, other.active = self.gain, self.coefficients, self.active
        other._parts = self.device.put((parts * other.detector.tilt()).astype(np.complex64))
        return other

    def extended(
        self, frames: np.ndarray, offsets: np.ndarray, flux: np.ndarray, shape: tuple[int, int]
    ) -> Engine:
        """Take in more frames, after those there are, on an object that may be larger, bare all around.

        Parameters
        ----------
        frames, flux
            Of all frames, old and new.
        offsets : ndarray, (J, 2)
            On the larger object; those of the old frames are replaced by what was found for them.
        shape : (H, W)
            Of the object; its middle stays the middle.
        """
        grown = [(n // 2 - m // 2) for n, m in zip(shape, self.image.shape, strict=True)]
        width = [(g, n - m - g) for g, n, m in zip(grown, shape, self.image.shape, strict=True)]
        known = len(self.offsets)
        untilted = self.device.get(self._parts) * self.detector.tilt().conj()
        image = np.pad(self.image, width, constant_values=1)
        other = Engine(
            frames, self.detector.states, offsets, untilted[0], image, flux, self.rng, self.batch,
            self.detector.spread, self.detector.finer, len(untilted) - 1, self.device,
        )  # fmt: skip
        other._choose(self._among, self._parts)
        other.offsets[:known] = self.offsets + grown
        other.gain[:known], other.active = self.gain, self.active
        return other

    def come_from(self, pixel: tuple[float, float], wavelength: float, distance: float) -> None:
        """Keep the probe from here on to what comes from where it left a plane `distance` before the object.

        Parameters
        ----------
        pixel : (y, x), m
            Of the object.
        wavelength, distance : float, m
        """
        source = Source(self.detector.tilt(), self.detector.finer, pixel, wavelength, distance, self.device)
        parts = self._parts
        source.shrink(parts[0])
        kept, there = (_power(self.device.get(p)) for p in (source.hold(parts[0]), parts[0]))
        self._choose(source if kept > SMALL_SOURCE * there else self._free, parts)

    # -- one batch --------------------------------------------------------------------------------
    def _batches(self, frames: np.ndarray | None = None) -> list[np.ndarray]:
        """Active frames, or those given, in random groups whose offsets differ by whole pixels, nearly."""
        order = self.rng.permutation(self.active if frames is None else frames)
        least = int(np.clip(np.sqrt(len(order) / self.batch), 6, 16))
        row, column = ((self.offsets[order] + self.rng.uniform(0, 1, 2)) % 1).T
        batches = []
        for strip in np.array_split(np.argsort(row, kind="stable"), least):
            strip = strip[np.argsort(column[strip], kind="stable")]
            count = max(-(-len(strip) // self.batch), min(least, len(strip)))
            batches += [order[b] for b in np.array_split(strip, count)] if len(strip) else []
        return [batches[k] for k in self.rng.permutation(len(batches))]

    def _place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whole-pixel corners (b, 2), the shift (2,) that a batch shares, and what is left to each (b, 2)."""
        offsets = self.offsets[index]
        # the mean of remainders is taken on a circle: 0.49 and -0.49 are neighbours
        common = np.angle(np.exp(2j * np.pi * offsets).mean(axis=0)) / (2 * np.pi)
        corners = np.rint(offsets - common)
        if (corners < 0).any() or (corners > self._room).any():
            raise ValueError("a frame's window leaves the object array")  # the loops do not look
        return corners.astype(np.intp), common, offsets - corners - common

    def _gradient(
        self, index: np.ndarray, locate: bool, poisson: bool
    ) -> tuple[np.ndarray, np.ndarray, Waves]:
        """Add what one batch asks for to the sums.

        ``sums.probe`` is what is asked of the probe as it was shifted, and must be emptied between batches.

        Returns
        -------
        score : ndarray, (5,)
        common : ndarray, (2,)
            The shift.
        unshifted : callable
            Brings what is asked of the shifted probe to the probe's own coordinates.
        """
        corners, common, rest = self._place(index)
        gain = self.gain[index, None]
        weights = gain * np.concatenate([np.ones_like(gain), rest, self.coefficients[index]], axis=1)
        shifted, unshifted = self._among.at(common)
        asked = self.device.frames(
            self.detector,
            Batch(index, corners + [s.start for s in self._among.box], weights.astype(np.float32), locate),
            shifted(self._inner), self._image, self._dark, self._sums, poisson,
        )  # fmt: skip
        self._errors[index], self._totals[index] = asked.score[:, 0], asked.score[:, 1:3]
        if asked.normal is not None and asked.overlaps is not None:
            self._asked[index] = asked.normal[:, 3:]
            change, power = asked.overlaps[..., 0], asked.overlaps[..., 1]
            if power.size:
                self._wanted[index] = gain * change / (gain**2 * power + 1e-30)
        return asked.score.sum(axis=0), common, unshifted

    def _gradients(
        self, locate: bool, poisson: bool, frames: np.ndarray | None = None
    ) -> tuple[np.ndarray, Array]:
        """Add what all batches ask for to the sums, as things are; return their score and that of the probe.

        The latter, (k, m, h, w), is not shifted.
        """
        sums, box = self._sums, (..., *self._among.box)
        totals, spectrum = np.zeros(5), self.device.zeros(self._parts)
        asked = self.device.zeros(spectrum)
        for index in self._batches(frames):
            score, common, _ = self._gradient(index, locate, poisson)
            totals += score
            asked[box] = sums.probe
            spectrum = spectrum + self._free.at(common)[1](asked)
            sums.probe *= 0
        return totals, self._free.waves(spectrum)[box]

    def _step_image(self, damp: float, step: float) -> None:
        """Move the image by `step` times its sum over what lit it, and empty both."""
        sums = self._sums
        self.device.step(self._image, sums, step, 1 - damp, damp * float(sums.light.max()))

    def _step_probe(self, change: Array, unshifted: Waves, damp: float, step: float) -> None:
        """Move the probe by `step` times what is asked of it over what it met."""
        power = self._sums.power
        light = (1 - damp) * power + damp * float(power.max())
        self._inner = self._among.tidy(self._inner + step * unshifted(change / light))

    def _empty(self) -> None:
        for total in (self._sums.probe, self._sums.power):
            total *= 0

    # -- all frames -------------------------------------------------------------------------------
    def sweep(
        self,
        *,
        damp_image: float = 0.2,
        damp_probe: float = 0.3,
        momentum: float = 0.0,
        locate: bool = False,
        hold_probe: bool = False,
    ) -> Score:
        """Pass over all frames in random batches with rPIE steps: fast from afar, noisy at the end.

        Maiden, Johnson and Li, Optica 4, 736 (2017), Eqs. 18-19, summed over a batch.

        Parameters
        ----------
        damp_image, damp_probe : float, 0 to 1
            1 is ePIE; less takes bolder steps where little light falls.
        momentum : float
            Go on by this share of what the pass has changed: slow modes, which do not alternate, get
            ``1 / (1 - momentum)`` times further.
        locate : bool
            Note where each frame would fit better, for `move`, and how its probe differs, for `vary`.
        hold_probe : bool
            Change only the image.
        """
        totals = np.zeros(5)
        image, inner = self._image * 1, self._inner * 1
        self._begin(locate)
        for index in self._batches():
            score, _, unshifted = self._gradient(index, locate, poisson=False)
            totals += score
            if locate:
                self._pull = self._pull + self._sums.image
            self._step_image(damp_image, 1.0)
            if not hold_probe:
                self._step_probe(self._sums.probe, unshifted, damp_probe, 1.0)
            self._empty()
        if momentum:
            self._image = self._image + momentum * (self._image - image)
            self._inner = self._inner + momentum * (self._inner - inner)
        self._previous = None
        self._end()
        return _score(totals)

    def descend(
        self, *, step: float = 0.6, damp: float = 0.002, locate: bool = False, poisson: bool = False
    ) -> Score:
        """One accelerated step of image and probe down the gradient of all frames: for the finish.

        Nesterov's momentum with a restart where the fit gets worse (O'Donoghue and Candes, Found. Comput.
        Math. 15, 715 (2015)); the gradient is divided by the light, as in `sweep`. Half a step for each of
        two factors of one product never overshoots; a little more is safe since they hardly agree.

        `poisson` maximises the likelihood of Poisson counts instead of Anscombe's least squares, whose mean
        is biased where less than a few counts fall on a pixel.
        """
        self._begin(locate)
        totals, asked = self._gradients(locate, poisson)
        score = _score(totals)
        if self._previous is None or score.r2 > self._last_r2:
            self._age, self._previous = 0, (self._image * 1, self._inner * 1)
        self._last_r2 = score.r2
        self._step_image(damp, step)
        self._step_probe(asked, self._among.at((0.0, 0.0))[1], damp, step)
        self._empty()
        momentum = min(self._age / (self._age + 3), 0.98)
        self._age += 1
        stepped = self._image * 1, self._inner * 1
        self._image = self._image + momentum * (stepped[0] - self._previous[0])
        self._inner = self._inner + momentum * (stepped[1] - self._previous[1])
        self._previous = stepped
        self._end()
        return score

    def _begin(self, locate: bool) -> None:
        if locate:
            self._wanted = np.zeros_like(self.coefficients)
            self._pull = 0

    def _end(self) -> None:
        """Multiply the background by what the pass asked for (Richardson-Lucy)."""
        if self._background.size:
            self._dark = self._dark * (self._sums.background / len(self.active))
            self._sums.background *= 0

    def probe_from(self, index: np.ndarray) -> np.ndarray:
        """Probe that frames `index` alone ask for, one step from the common one; changes nothing."""
        with self._unchanged():
            kept = self._inner
            _, asked = self._gradients(locate=False, poisson=False, frames=index)
            self._step_probe(asked, self._among.at((0.0, 0.0))[1], 1e-3, 1.0)
            found, self._inner = self.probe, kept
        return found

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Look at frames without keeping what they ask for."""
        kept = self._totals.copy(), self._errors.copy(), self._asked.copy()
        yield
        self._totals, self._errors, self._asked = kept
        sums = self._sums
        for total in (sums.image, sums.light, sums.probe, sums.power, sums.background):
            total *= 0

    # -- single frames ----------------------------------------------------------------------------
    def move(self, limit: Callable[[np.ndarray], np.ndarray], gain: float = 1.5, reach: float = 0.8) -> None:
        """Move the active frames, and the object with them, to where the last pass would have them.

        Their mean stays: a common shift cannot be told from a shift of the object.

        Parameters
        ----------
        limit : callable
            Takes where they would go, (n, 2), to where they may.
        gain : float
            The curvature is that of exit waves, and pixels know only half of a wave.
        reach : float
            Bounds a step, pixels.
        """
        active, image = self.active, self.image
        before = self.offsets[active]
        power = (np.abs(self.probe) ** 2).sum(axis=0)
        frames = Together(image, power, np.rint(before).astype(int), self.gain[active])
        steps = gain * np.clip(frames.solve(self._asked[active]), -reach, reach)
        self.offsets[active] = limit(before + steps - steps.mean(axis=0))
        change = self.device.put(frames.follow(image, self.offsets[active] - before) - image)
        self._image = self._image + change
        if self._previous is not None:
            self._previous = self._previous[0] + change, self._previous[1]

    def follow_phase(self, pixel: tuple[float, float], wavelength: float, distance: float) -> None:
        """Put the slow phase on the object that the last sweep asked for, see `slow_phase`.

        Call it after a sweep that located, and not again before the few that what it leaves takes to settle.

        Parameters
        ----------
        pixel : (y, x), m
            Of the object.
        wavelength, distance : float, m
        """
        reach = wavelength * distance / (2 * np.pi * np.square(pixel))
        power = (np.abs(self.probe) ** 2).sum(axis=0)
        edges = self._laid(np.square(np.gradient(np.sqrt(power))).sum(axis=0))
        image = self.image
        phase = slow_phase(image, self.device.get(self._pull), self._laid(power), edges, reach)
        self.image = put_on(image, phase, reach)

    def search(self, limit: Callable[[np.ndarray], np.ndarray], radius: float) -> int:
        """Try another place for every active frame, at random; keep those that fit clearly better.

        Annealing (A. Maiden et al., Ultramicroscopy 120, 64 (2012)) finds frames that lie too far off for the
        residual to point home. Call it after a pass.

        Parameters
        ----------
        limit : callable
            Keeps offsets on the object.
        radius : float
            Standard deviation of what is tried, pixels.

        Returns
        -------
        int
            How many frames were moved.
        """
        before, active = self.offsets.copy(), self.active
        here = self._measure()
        tried = before[active] + self.rng.normal(0, radius, (len(active), 2))
        self.offsets[active] = limit(tried)
        better = self._measure() < BETTER * here
        self.offsets[~better] = before[~better]
        self._asked[better] = 0
        return int(better.sum())

    def _measure(self) -> np.ndarray:
        """Misfit of every active frame as things are, (J,); infinite for the others."""
        found = np.full(len(self.offsets), np.inf)
        with self._unchanged():
            for index in self._batches():
                self._gradient(index, locate=False, poisson=False)
            found[self.active] = self._errors[self.active]
        return found

    def even(self, smooth: float = 0.0) -> None:
        """Scale the model of every active frame towards the counts it was found to have in the last pass.

        Half way, since the object has been changed to the same end. With `smooth` only what so many frames
        in a row share: a beam that drifts away, but not what the object absorbs here and there.
        """
        counted, expected = self._totals[self.active].T
        change = 0.25 * np.log(np.clip(counted / np.maximum(expected, 1e-30), *GAIN_LIMITS))
        if smooth:
            change = ndimage.gaussian_filter1d(change, smooth, mode="nearest")
        self.gain[self.active] *= np.exp(change - change.mean()).astype(np.float32)

    def begin_varying(self) -> None:
        """Let the probe vary from here on, as polynomials in time first.

        Not before all frames are in: in the first few a change that is slow in time is one of the mean probe.
        """
        self.coefficients = _time_polynomials(len(self.offsets), self.coefficients.shape[1])

    def vary(self, gain: float = 0.7) -> None:
        """Change how much of every variation is in the probe of each frame, as the last pass asks.

        The coefficients keep zero mean, unit variance and are uncorrelated: what is common to all frames
        belongs to the mean probe, and what several variations share to one of them. What would only shift or
        scale the probe is taken out of the variations: it belongs to positions and intensities.
        """
        if not self.coefficients.any():
            return
        parts = self.device.get(self._parts)
        wanted = self.coefficients[self.active] + gain * self._wanted[self.active]
        mean = wanted.mean(axis=0)
        q, r = np.linalg.qr(wanted - mean)
        sign = np.sign(np.diag(r))
        size = np.sqrt(len(wanted))
        parts[0] += np.tensordot(mean, parts[1:], 1)
        parts[1:] = np.tensordot(r * sign[:, None] / size, parts[1:], 1)
        self.coefficients[self.active] = q * sign * size
        parts[1:] = _without_shifts(parts[1:], parts[0])
        self._parts = self.device.put(parts.astype(np.complex64))

    def orthogonalise(self) -> None:
        """Turn the probe modes into orthogonal ones of falling power; the intensities stay as they are."""
        parts = self.device.get(self._parts)
        if parts.shape[1] > 1:
            flat = parts[0].reshape(parts.shape[1], -1)
            _, vectors = np.linalg.eigh(flat.conj() @ flat.T)
            turned = np.einsum("mn,kmyx->knyx", vectors, parts)[:, ::-1]
            self._parts = self.device.put(turned.astype(np.complex64))

    def illumination(self) -> np.ndarray:
        """Sum over active frames of ``|probe|**2`` on the object, (H, W), float32."""
        return self._laid((np.abs(self.probe) ** 2).sum(axis=0))

    def _laid(self, power: np.ndarray) -> np.ndarray:
        """Sum over active frames of a power (ny, nx) of the beam on the object, (H, W), float32."""
        total = np.zeros(self.image.shape, np.float32)
        ny, nx = power.shape
        for j in self.active:
            row, column = np.rint(self.offsets[j]).astype(int)
            total[row : row + ny, column : column + nx] += power * self.gain[j] ** 2
        return total


def _taper(shape: tuple[int, int]) -> np.ndarray:
    """1 in the middle quarter of the area, falling to 0 half way from there to the edges; float32."""
    y, x = (
        np.cos(np.pi / 2 * np.clip(np.abs(np.arange(n) - n // 2) / (n / 8) - 2, 0, 1)) ** 2 for n in shape
    )
    return (y[:, None] * x).astype(np.float32)


def _power(waves: np.ndarray) -> float:
    return float(np.vdot(waves, waves).real)


def _score(totals: np.ndarray) -> Score:
    error, counted, _, llk, free = totals
    return Score(error / counted, llk / free if free else float("nan"))


def _without_shifts(variations: np.ndarray, probe: np.ndarray) -> np.ndarray:
    """Variations (k, m, N, N) without what scales, turns in phase or moves the probe (m, N, N)."""
    moved = [np.roll(probe, -1, axis) - np.roll(probe, 1, axis) for axis in (-2, -1)]
    basis = np.stack([probe, 1j * probe, *moved]).reshape(4, -1)
    real = np.concatenate([np.real(basis), np.imag(basis)], axis=1)
    q = np.linalg.qr(real.T)[0]
    flat = variations.reshape(len(variations), -1)
    parts = np.concatenate([np.real(flat), np.imag(flat)], axis=1)
    parts = parts - (parts @ q) @ q.T
    half = flat.shape[1]
    return (parts[:, :half] + 1j * parts[:, half:]).reshape(variations.shape).astype(np.complex64)


def _time_polynomials(count: int, degree: int) -> np.ndarray:
    """Legendre polynomials 1 to `degree` in the order of frames, (count, degree), unit variance, float32."""
    legendre = np.polynomial.legendre.legvander(np.linspace(-1, 1, count), degree)[:, 1:]
    return (legendre / np.sqrt((legendre**2).mean(axis=0))).astype(np.float32)


def crop_spectrum(waves: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """Crop or pad (..., Ny, Nx) waves in Fourier space to another window, field and counts kept."""
    spectrum = np.fft.fftshift(np.fft.fft2(waves, norm="ortho"), axes=(-2, -1))
    for axis, n in zip((-2, -1), window, strict=True):
        old = spectrum.shape[axis]
        first = old // 2 - n // 2
        if first >= 0:
            spectrum = np.take(spectrum, np.arange(first, first + n), axis)
        else:
            width = [(0, 0)] * spectrum.ndim
            width[axis] = (-first, n - old + first)
            spectrum = np.pad(spectrum, width)
    return np.fft.ifft2(np.fft.ifftshift(spectrum, axes=(-2, -1)), norm="ortho").astype(np.complex64)
