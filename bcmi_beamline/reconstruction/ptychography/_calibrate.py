"""Calibration of a modulator by far-field ptychography in the Bragg beam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from scipy import ndimage
from scipy.fft import next_fast_len

from bcmi_beamline.reconstruction.propagation import propagate
from bcmi_beamline.reconstruction.ptychography._detector import PIXEL_SPREAD
from bcmi_beamline.reconstruction.ptychography._devices import make_device
from bcmi_beamline.reconstruction.ptychography._engine import Engine, Score, crop_spectrum
from bcmi_beamline.reconstruction.ptychography._finish import (
    centre_of_mass,
    find_levels,
    flatten,
    focus,
    phase_ramp,
    shift_wave,
)
from bcmi_beamline.reconstruction.ptychography._positions import (
    affine_numbers,
    extrapolate,
    scale_error,
    turned,
    without_affine,
)
from bcmi_beamline.reconstruction.ptychography._quality import half_scans, ring_correlation
from bcmi_beamline.reconstruction.ptychography._start import (
    FULL_FIELD,
    Grid,
    beam_fills,
    beam_width,
    check_scan,
    first_probe,
    pattern_width,
    pixel_states,
)
from bcmi_beamline.reconstruction.threads import one_thread_per_product
from bcmi_beamline.scans import Modulator, PtychographyScan

Progress = Callable[[float, str], None]
Show = Callable[[np.ndarray, np.ndarray, tuple[float, float]], None]

TRUSTED_ILLUMINATION = 0.5
"""A pixel is trusted that got this share of the light of a well-lit one (the 95th percentile): at the edge of
an evenly scanned field half of the light falls."""

SWEEPS = 0.7
"""Share of the iterations spent on random batches, before the accelerated finish on all frames."""
MOMENTUM, MOMENTUM_FROM = 0.7, 3
"""Of the sweeps but the last, once the first few have found the way."""
POSITIONS_FROM = 0.2
"""Share of the iterations after which positions are refined, where there was no coarse start."""
FLAT = 0.99
"""Passes that leave the free log-likelihood above this share of the best before them are not worth while, nor
are coarse sweeps that leave R2 there."""
BATCH = 8
FREE_FRACTION = 0.05

STEADY_FRAMES = 15.0
"""Standard deviation, in frames, of what is taken for a change of the beam and not of the object."""

COARSE_FROM = 192
"""Edge of the window, pixels, from which on a coarse start pays."""
COARSE_WINDOW = 112
"""Edge, at least, of the window of the coarse start."""
COARSE_ROOM = 1.25
"""The window of the coarse start is at least so many times as wide as the pattern: light that it cuts off is
light that the modulator scatters back into it."""
FIRST_FRAMES, FIRST_SHARE, GROWTH = 80, 1 / 12, 1.35
"""The coarse start begins with so many frames, at least, and takes in the others by and by."""
STAGE_STEP, STAGE_SWEEPS = 0.02, 3
"""Rotation in rad of the first trials of the stage, and the sweeps that judge a trial."""
FIRST_SWEEPS, GROWING_SWEEPS, LAST_SWEEPS = 10, 2, 10
SHADOW = 10.0
"""Times sqrt(lambda d1): a beam that is wider casts shadows of the object that hide its slow phases (14 on
`paper-hs`). In a narrower one (4.7 on `paper-ls`) something else asks for them, steadily and wrongly."""
TOLD_DEPTH = 0.2
"""Share of the depth of focus, pixel**2 / wavelength, to which the smallest area tells a crystal's plane: in
noise-free waves of four simulated crystals each 0.15 at most on `small`, 0.2 on `paper-ls`, 0.4 on
`paper-hs`.
"""
BRIGHTER = 0.03
"""Of the largest modulus: where only what is brighter counts, d1 changes by what unsharp edges do."""
PARTS, PART = 4, 100
"""Parts of the scan that d1 is found from alone, and frames of each, at most."""
CRYSTAL_FROM = 4
"""Passes of a run without a coarse start after which the probe shows where it comes from."""


@dataclass(frozen=True)
class Options:
    """How to calibrate; see `calibrate`."""

    iterations: int = 60
    modes: int = 1
    refine_positions: bool = True
    refine_rotation: bool = False
    search_radius: float = 0.0
    from_crystal: bool = True
    refine_intensities: bool = True
    variations: int = 0
    background: bool = False
    likelihood: Literal["poisson", "amplitude"] = "poisson"
    patience: int = 0
    resolution: bool = False
    seed: int = 0
    device: str = "numpy"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("iterations", 1, 100_000),
            ("modes", 1, 8),
            ("variations", 0, 4),
            ("patience", 0, 100_000),
            ("search_radius", 0, 50),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} to {high}, not {getattr(self, name)}")
        if self.likelihood not in ("poisson", "amplitude"):
            raise ValueError(f"likelihood must be poisson or amplitude, not {self.likelihood!r}")


def calibrate(
    scan: PtychographyScan | Iterable[PtychographyScan],
    *,
    progress: Progress | None = None,
    show: Show | None = None,
    **options: Any,
) -> Modulator:
    """Reconstruct the modulator and the Bragg beam on it from a ptychographic scan, and nothing else.

    Parameters
    ----------
    scan : PtychographyScan, or an iterable of them
        Frames in the order in which they were taken. With `sample_distance` 0 any far-field ptychography: no
        distance is then sought and nothing is assumed about the object's levels. Of a scan that is running an
        iterable: each item is all of the scan so far.
    progress : callable, optional
        Called as ``progress(fraction, message)`` after every pass; the fraction is 0 until all frames are in.
    show : callable, optional
        Called as ``show(transmission, probe, pixel)`` now and then: the object as it is, complex (H, W), the
        modes of the probe, and the pixel (y, x) in metres of both, coarse at first.
    iterations : int
        Passes over all frames in full; a start on fewer pixels comes before them where frames are large.
    modes : int, 1 to 8
        Mutually incoherent probe modes.
    refine_positions : bool
        Of every frame. Scale and rotation of all positions together stay those of the encoders.
    refine_rotation : bool
        Seek that rotation too, by trial: some thirty passes of the coarse start.
    search_radius : float
        Pixels, standard deviation; where not 0 every pass of the first half also tries another place for each
        frame at random, for positions that are wrong by more than the object's features. The radius shrinks.
    from_crystal : bool
        Keep the probe to waves that come from a small region, `sample_distance` before, which the data show.
        It is left free where less than half of the light comes from one, and without a distance.
    refine_intensities : bool
        Follow slow changes of the beam's intensity; fast ones are the monitor's (`scan.flux`).
    variations : int, 0 to 4
        Ways in which the probe may change from frame to frame.
    background : bool
        Fit counts that no wave makes, for each pixel.
    likelihood : {"poisson", "amplitude"}
        What the accelerated finish maximises.
    patience : int
        When so many passes together have not bettered the free log-likelihood by 1 %, go on to the finish,
        and when the finish has not, stop; 0: never.
    resolution : bool
        Also compare the maps of two half scans (Fourier ring correlation); it costs six passes more.
    seed : int
        Fixes the order of frames and the free pixels: same seed, same result on the same machine.
    device : str
        Where to compute, see `make_device`.

    Returns
    -------
    Modulator
        ``frames[j]`` is the sum over modes of ``|FFT2(probe(r) transmission(r - X_j))|**2``, in counts with a
        unitary transform, integrated over pixels. Bare membrane 1; the wave at the crystal has its centre of
        mass on the beam axis. `metadata` holds `phase_step_rad`, `transmission_modulus` and
        `two_valuedness` of the modulator, `mode_powers`, `position_correction_rms_m`,
        `resolution_half_period_m` where asked for, and the configuration.
        `sample_distance_error` is a standard uncertainty; where no distance was sought `sample_distance` is
        0 and its error nan.

    Raises
    ------
    ValueError
        In one line, when the scan cannot be reconstructed (`check_scan`) or a parameter is out of range.

    References
    ----------
    A. Maiden, D. Johnson, P. Li, Optica 4, 736 (2017): rPIE.
    P. Thibault, A. Menzel, Nature 494, 68 (2013): mixed modes.
    P. Thibault, M. Guizar-Sicairos, New J. Phys. 14, 063004 (2012): maximum likelihood.
    """
    chosen = Options(**options)
    arriving = iter([scan] if isinstance(scan, PtychographyScan) else scan)
    first = next(arriving, None)
    while first is not None and len(first.frames) < FIRST_FRAMES:
        longer = next(arriving, None)
        if longer is None:
            break
        first = longer
    if first is None:
        raise ValueError("there is no scan: the source ended before its first frames")
    with one_thread_per_product():  # threads of a product wait by spinning, in the way of those of the frames
        run = _Run(first, chosen, progress, show)
        if not isinstance(scan, PtychographyScan) or run.coarse is not None or chosen.refine_rotation:
            run.begin(arriving)
        run.iterate()
        return run.finish()


class _Run:
    """One calibration: the engine, where its frames lie, and how well it fits."""

    def __init__(
        self, scan: PtychographyScan, options: Options, progress: Progress | None, show: Show | None
    ) -> None:
        self.scan, self.options, self.progress, self.show = scan, options, progress, show
        mean = check_scan(scan)
        rng = np.random.default_rng(options.seed)
        width = pattern_width(mean)
        self.finer = 1 if beam_fills(scan, width) < FULL_FIELD else 2
        self.full = Grid.around(scan, self.finer)
        fresnel = np.sqrt(scan.wavelength * scan.sample_distance)
        self.shadows = options.from_crystal and beam_width(scan, width) > SHADOW * fresnel
        """Whether slow phases of the object hide, see `slow_phase`."""
        self.coarse = self._coarse_window(width)
        """Window of the coarse start; None where the frames are small enough as they are."""
        self.scores: list[Score] = []
        self.located = False
        self.distance = scan.sample_distance
        """Of the crystal that the probe comes from, m."""
        self.focused = False
        """Whether `distance` is one that was found."""
        self.stage = 1 + 0j
        """Rotation of all positions, as a complex number of modulus 1."""
        grid, probe = self.grid, first_probe(scan, mean, options.modes, rng, self.finer)
        self.engine = Engine(
            frames=scan.frames,
            states=pixel_states(scan.mask, FREE_FRACTION, options.seed),
            offsets=grid.offsets(scan.positions),
            probe=crop_spectrum(probe, grid.window),
            image=np.ones(grid.shape, np.complex64),
            flux=self._flux(),
            rng=rng,
            batch=BATCH,
            spread=PIXEL_SPREAD,
            finer=self.finer,
            variations=options.variations,
            device=make_device(options.device),
        )

    def _coarse_window(self, width: int) -> tuple[int, int] | None:
        shape = self.scan.frames.shape[1:]
        if min(shape) < COARSE_FROM:
            return None
        share = max(1 / max(min(shape) // COARSE_WINDOW, 1), COARSE_ROOM * width / min(shape))
        if share > 0.9:
            return None
        ny, nx = (2 * _fast_length(n * share / 2) * self.finer for n in shape)
        return ny, nx

    @property
    def grid(self) -> Grid:
        """Grid of the engine as it is."""
        return self.full if self.coarse is None else self.full.coarser(self.coarse)

    def _flux(self) -> np.ndarray:
        flux = self.scan.flux
        return np.ones(len(self.scan.frames)) if flux is None else flux / flux.mean()

    # -- passes -------------------------------------------------------------------------------------
    def _settle(self, gain: float) -> None:
        """Let every frame go where, and be as bright as, the last pass found it."""
        engine, grid = self.engine, self.grid
        if self.options.refine_intensities:
            engine.even(STEADY_FRAMES)
        if self.options.refine_positions:
            start = self._start(grid)[engine.active]
            engine.move(lambda offsets: grid.limit(without_affine(offsets, start)), gain=gain)
        self.located = True

    def _confine(self, refocus: bool = False) -> None:
        """Keep the probe to what comes from the crystal that it shows now, at the distance that it shows."""
        scan, grid, engine = self.scan, self.grid, self.engine
        if not self.options.from_crystal or not scan.sample_distance:
            return
        if refocus:
            self.distance = focus(
                engine.probe[0], grid.pixel, scan.wavelength, self.distance,
                finer=self.finer, wide=not self.focused,
            )  # fmt: skip
            self.focused = True
        engine.come_from(grid.pixel, scan.wavelength, self.distance)

    def _start(self, grid: Grid) -> np.ndarray:
        """Offsets (J, 2) by the encoders, and by the rotation that was found for them."""
        return turned(grid.offsets(self.scan.positions), self.stage)

    def straighten(self) -> None:
        """Seek the rotation of all positions: the vertex of a parabola through three trials, thrice."""
        for step in (STAGE_STEP, STAGE_STEP / 2, STAGE_STEP / 4):
            errors = [self._try_stage(np.exp(1j * k * step)) for k in (-1, 0, 1)]
            curve = errors[0] - 2 * errors[1] + errors[2]
            vertex = (errors[0] - errors[2]) / (2 * curve) if curve > 0 else 0.0
            ratio = np.exp(1j * step * float(np.clip(vertex, -1.5, 1.5)))
            self._turn(ratio)
            self.stage *= ratio
            self._tell(0.0, f"stage turned by {np.rad2deg(np.angle(self.stage)):.3f} deg")

    def _try_stage(self, ratio: complex) -> float:
        """Misfit after a few sweeps from here with all positions, and the object, turned by `ratio`."""
        engine = self.engine
        kept = engine.image, engine.probe, engine.offsets.copy(), engine.rng
        engine.rng = np.random.default_rng(0)
        self._turn(ratio)
        for i in range(STAGE_SWEEPS):
            score = engine.sweep(momentum=0.5 if i < STAGE_SWEEPS - 1 else 0.0)
        engine.image, engine.probe, engine.offsets, engine.rng = kept
        return score.r2

    def _turn(self, ratio: complex) -> None:
        engine = self.engine
        middle = engine.offsets.mean(axis=0) + np.array(engine.probe.shape[-2:]) // 2
        back = np.array([[ratio.real, ratio.imag], [-ratio.imag, ratio.real]])
        image = engine.image
        parts = [
            ndimage.affine_transform(part, back, middle - back @ middle, order=3, mode="nearest")
            for part in (np.real(image), np.imag(image))
        ]
        engine.image = parts[0] + 1j * parts[1]
        engine.offsets = self.grid.limit(turned(engine.offsets, ratio))

    def _tell(self, done: float, message: str) -> None:
        if self.progress is not None:
            self.progress(done, message)
        if self.show is not None:
            self.show(self.engine.image, self.engine.probe, self.grid.pixel)

    def begin(self, arriving: Iterator[PtychographyScan]) -> None:
        """Find probe, object, drift and intensities, taking in the frames as they came, coarsely if large.

        A drift that would make nonsense of all frames together is small among those that follow each other:
        it is found there and taken on.

        Parameters
        ----------
        arriving : iterator
            Of the scan as it grows.
        """
        known = min(len(self.scan.frames), max(FIRST_FRAMES, round(FIRST_SHARE * len(self.scan.frames))))
        self.engine.active = np.arange(known)
        for i in range(FIRST_SWEEPS):
            momentum = MOMENTUM if MOMENTUM_FROM <= i < FIRST_SWEEPS - 1 else 0.0
            score = self.engine.sweep(momentum=momentum, locate=i >= MOMENTUM_FROM)
            if i >= MOMENTUM_FROM:
                self._settle(1.5)
        self._confine()
        while known < len(self.scan.frames) or self._longer(arriving):
            known = self._take_in(known)
            for momentum in np.linspace(MOMENTUM, 0, GROWING_SWEEPS):
                score = self.engine.sweep(momentum=float(momentum), locate=True)
                self._settle(1.5)
            self._confine()
            self._tell(0.0, f"start: {known} of {len(self.scan.frames)} frames, R2 {score.r2:.5f}")
        flat = False
        for i in range(LAST_SWEEPS):
            last, before = flat or i == LAST_SWEEPS - 1, score.r2
            score = self.engine.sweep(momentum=0.0 if last else MOMENTUM, locate=True)
            self._settle(1.5)
            if i == 0 and self.shadows:
                self.engine.follow_phase(self.grid.pixel, self.scan.wavelength, self.distance)
            if last:
                break
            flat = i > 0 and score.r2 > FLAT * before
        self._tell(0.0, f"start: R2 {score.r2:.5f}")
        if self.options.refine_rotation:
            self.straighten()
        if self.coarse is not None:
            found = self.full.limit(self.full.offsets(self.grid.positions(self.engine.offsets)))
            self.coarse = None
            self.engine = self.engine.resized(self.scan.frames.shape[1:], self.full.shape, found)
        self._confine()

    def _longer(self, arriving: Iterator[PtychographyScan]) -> bool:
        """Wait for more frames of a running scan; False when it has ended."""
        for scan in arriving:
            if len(scan.frames) > len(self.scan.frames):
                self.scan, self.full = scan, self.full.holding(scan)
                grid = self.grid
                self.engine = self.engine.extended(
                    scan.frames, grid.offsets(scan.positions), self._flux(), grid.shape
                )
                return True
        return False

    def _take_in(self, known: int) -> int:
        """Put the next frames in use where the drift of the others leads; return how many are in use."""
        engine, grid = self.engine, self.grid
        more = min(len(self.scan.frames) - known, round((GROWTH - 1) * known) + 1)
        new = slice(known, known + more)
        if self.options.refine_positions:
            start = self._start(grid)
            engine.offsets[new] = grid.limit(extrapolate(engine.offsets, start, known, more))
        if self.options.refine_intensities:
            last = slice(max(known - 50, 0), known)
            monitored = np.sqrt(self._flux())
            engine.gain[new] *= np.median(engine.gain[last] / monitored[last]).astype(np.float32)
        engine.active = np.arange(known + more)
        return known + more

    def iterate(self) -> None:
        """Pass over all frames in full: sweeps, then the accelerated finish."""
        options, engine = self.options, self.engine
        engine.begin_varying()
        if options.background:
            engine.seek_background(1e-3 * float(np.median(engine.gain)) ** 2)
        sweeps = round(SWEEPS * options.iterations)
        stage, begun = 0, self.located
        for i in range(options.iterations):
            moving = self.located or i >= POSITIONS_FROM * options.iterations
            sweeping = i < sweeps
            if sweeping:
                momentum = MOMENTUM if (begun or i >= MOMENTUM_FROM) and i < sweeps - 1 else 0.0
                score = engine.sweep(momentum=momentum, locate=moving)
            else:
                score = engine.descend(locate=moving, poisson=options.likelihood == "poisson")
            if moving:
                if options.search_radius and i < options.iterations / 2:
                    engine.search(self.full.limit, options.search_radius * (1 - 2 * i / options.iterations))
                if sweeping:
                    engine.vary()
                self._settle(1.5 if sweeping else 1.0)
            if sweeping and (begun or i >= CRYSTAL_FROM - 1) and (i + 1) & i == 0:
                self._confine(refocus=True)
            self.scores.append(score)
            self._tell(
                (i + 1) / options.iterations,
                f"iteration {i + 1} of {options.iterations}: R2 {score.r2:.5f}, "
                f"free LLK {score.free_llk:.3f}",
            )
            if self._flat(stage):
                if not sweeping:
                    break
                sweeps, stage = i + 1, i + 1
        engine.orthogonalise()

    def _flat(self, stage: int) -> bool:
        """Whether the last passes since `stage` have bettered the free error by next to nothing."""
        patience = self.options.patience
        free = [s.free_llk for s in self.scores[stage:]]
        if not patience or len(free) <= patience:
            return False
        return min(free[-patience:]) > FLAT * min(free[:-patience])

    # -- result -------------------------------------------------------------------------------------
    def finish(self) -> Modulator:
        """Remove the ambiguities, find the distance, and put everything in its container."""
        scan, engine, grid = self.scan, self.engine, self.grid
        image, probe = engine.image, engine.probe
        illumination = engine.illumination()
        trusted = illumination > TRUSTED_ILLUMINATION * np.percentile(illumination[illumination > 0], 95)
        bragg = scan.sample_distance > 0
        if bragg:
            ramp, scale, levels = flatten(image, trusted)
        else:
            inside = image[trusted]
            ramp, scale = np.zeros(2), np.median(np.abs(inside)) * np.exp(1j * np.angle(inside.sum()))
            levels = find_levels(inside / scale)
        image = image * phase_ramp(image.shape, -ramp) / scale
        probe = probe * phase_ramp(probe.shape[1:], ramp) * scale
        centre, distance, error = grid.centre, 0.0, float("nan")
        if bragg:
            distance, focused = self._distance(probe[0], ramp)
            unscaled = scale_error(grid.positions(engine.offsets), scan.positions)
            error = float(np.hypot(focused, distance * unscaled))
            row, column = centre_of_mass(propagate(probe, scan.object_pixel, scan.wavelength, -distance))
            probe = shift_wave(probe, (-row, -column))
            centre = (centre[0] + column * grid.pixel[1], centre[1] - row * grid.pixel[0])
        positions = grid.positions(engine.offsets)
        # a common shift of all positions is one of the object: it goes to where the array's centre is
        away = (positions - scan.positions).mean(axis=0)
        positions -= away
        powers = (np.abs(probe) ** 2).sum(axis=(1, 2), dtype=float)
        size, turn = affine_numbers(positions, scan.positions)
        metadata: dict[str, Any] = {
            "phase_step_rad": levels.phase_step,
            "transmission_modulus": levels.modulus,
            "two_valuedness": levels.two_valuedness,
            "mode_powers": (powers / powers.sum()).tolist(),
            "position_correction_rms_m": float(np.sqrt(((positions - scan.positions) ** 2).mean())),
            "stage_scale": size,
            "stage_rotation_deg": float(np.rad2deg(turn)),
            "intensities": (engine.gain**2).tolist(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "run_uid": str(scan.metadata.get("run_uid", "")),
            "configuration": {
                "method": "ptychography",
                **asdict(self.options),
                "batch": BATCH,
                "free_fraction": FREE_FRACTION,
                "field": self.finer,
            },
        }
        if self.options.resolution:
            rings = ring_correlation(*half_scans(engine), trusted, grid.pixel[1])
            metadata["resolution_half_period_m"] = rings.half_period
            metadata["ring_correlation"] = [
                [float(v) for v in ring] for ring in zip(rings.frequency, rings.correlation, strict=True)
            ]
        return Modulator(
            transmission=image.astype(np.complex64),
            pixel_size=grid.pixel[1],
            sample_distance=distance,
            sample_distance_error=error,
            centre=(float(centre[0] - away[0]), float(centre[1] - away[1])),
            probe=probe.astype(np.complex64),
            trusted=trusted,
            positions=positions,
            positions_start=scan.positions.copy(),
            r2=np.array([s.r2 for s in self.scores]),
            free_llk=np.array([s.free_llk for s in self.scores]),
            metadata=metadata,
        )

    def _distance(self, probe: np.ndarray, ramp: np.ndarray) -> tuple[float, float]:
        """d1 and its standard uncertainty, m.

        The uncertainty joins the scatter between parts of the scan (noise), what the answer changes when only
        the brighter part of the crystal counts (edges that are not sharp), and how well a plane is told.
        The scale of the positions is not in it: see `scale_error`.
        """
        scan, engine = self.scan, self.engine
        args = (scan.object_pixel, scan.wavelength)
        distance = focus(probe, *args, scan.sample_distance, finer=self.finer)
        near: dict[str, Any] = {"finer": self.finer, "wide": False}
        brighter = focus(probe, *args, distance, floor=BRIGHTER, **near) - distance
        back = phase_ramp(probe.shape, ramp)
        count = min(len(scan.frames) // PARTS, PART)
        parts = np.random.default_rng(0).permutation(len(scan.frames))[: PARTS * count].reshape(PARTS, count)
        found = [focus(engine.probe_from(p)[0] * back, *args, distance, **near) for p in parts]
        noise = np.std(found, ddof=1) * np.sqrt(count / len(scan.frames))
        told = TOLD_DEPTH * max(scan.object_pixel) ** 2 / scan.wavelength
        return distance, float(np.sqrt(brighter**2 + noise**2 + told**2))


def _fast_length(n: float) -> int:
    """The next length that a transform is fast at."""
    return int(next_fast_len(int(np.ceil(n))))  # pyright: ignore[reportArgumentType]
