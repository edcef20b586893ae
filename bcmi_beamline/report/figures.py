"""Figures of a calibration, an alignment, scans and objects.

Every function takes plain arrays or the containers and returns a `matplotlib.figure.Figure`, made without
pyplot so that nothing global is touched and no display is needed. Lengths are metres on the way in and
nanometres or micrometres on the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bcmi_beamline.reconstruction.metrics import Histogram, ShellCorrelation
from bcmi_beamline.reconstruction.strain import orthogonalise, strain
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

MODULUS, PHASE, SIGNED, COUNTS = "viridis", "twilight", "RdBu_r", "magma"
"""Colour maps: sequential for moduli, cyclic for phases, diverging for strain."""

COLOURS = ("#0b6fa4", "#d1495b", "#2e8b57", "#8a5fbf", "#e08e0b", "#555555")
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.origin": "upper",
    "image.interpolation": "nearest",
}


class Lorentzian(Protocol):
    """A fitted sharpness curve."""

    @property
    def angle_deg(self) -> float: ...  # noqa: D102
    @property
    def angle_error_deg(self) -> float: ...  # noqa: D102
    @property
    def half_width_deg(self) -> float: ...  # noqa: D102
    @property
    def amplitude(self) -> float: ...  # noqa: D102
    @property
    def background(self) -> float: ...  # noqa: D102


class AlignmentCurve(Protocol):
    """Sharpness (places, angles) over one tilt with its fit, as the alignment plan returns it."""

    @property
    def angles_deg(self) -> np.ndarray: ...  # noqa: D102
    @property
    def sharpness(self) -> np.ndarray: ...  # noqa: D102
    @property
    def fit(self) -> Lorentzian: ...  # noqa: D102


def _subplots(rows: int, columns: int, size: tuple[float, float], **kwargs: Any) -> tuple[Figure, np.ndarray]:
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, axes


# -- modulator and alignment -----------------------------------------------------------------------------
def modulator_figure(modulator: Modulator) -> Figure:
    """Modulus and phase of the calibrated map, and the histogram of its phase where it is trusted."""
    figure, axes = _subplots(1, 3, (13, 4.2), width_ratios=(1, 1, 0.85))
    t = modulator.transmission
    trusted = np.ones(t.shape, bool) if modulator.trusted is None else modulator.trusted
    window = _box(trusted)
    shown = np.where(trusted, t, np.nan)[window]
    phase = np.angle(shown)
    for axis, values, title, colour, limits in (
        (
            axes[0, 0],
            np.abs(shown),
            "modulus",
            MODULUS,
            (0, max(1.1, float(np.nanpercentile(np.abs(shown), 99)))),
        ),
        (axes[0, 1], phase, "phase (rad)", PHASE, (-np.pi, np.pi)),
    ):
        _map(figure, axis, values, modulator.pixel_size, title, colour, limits)
    axis = axes[0, 2]
    values = phase[np.isfinite(phase)]
    axis.hist(values, 120, range=(-np.pi, np.pi), color=COLOURS[0], density=True)
    axis.set(xlabel="phase (rad)", ylabel="density", title="phase where trusted", xlim=(-np.pi, np.pi))
    axis.set_title(_phase_step(values), fontsize=9)
    return figure


def _phase_step(phase: np.ndarray) -> str:
    """The distance between the two levels of a two-valued phase map, in words."""
    low, high = phase[phase < -1.0], phase[phase > -1.0]
    if min(low.size, high.size) < 0.02 * phase.size:
        return "phase where trusted: one level"
    return f"phase where trusted: step {np.median(high) - np.median(low):.2f} rad"


def alignment_figure(curves: Mapping[str, AlignmentCurve]) -> Figure:
    """Sharpness over each tilt: every place, their mean, the fit and where it stands."""
    figure, axes = _subplots(1, max(1, len(curves)), (5.2 * max(1, len(curves)), 3.8))
    for axis, (name, curve) in zip(axes[0], curves.items(), strict=False):
        angles, sharpness, fit = np.asarray(curve.angles_deg), np.atleast_2d(curve.sharpness), curve.fit
        axis.plot(angles, sharpness.T, color="0.8", lw=1)
        mean = np.exp(np.log(np.maximum(sharpness, np.finfo(float).tiny)).mean(axis=0))  # as it is fitted
        axis.plot(angles, mean, "o", color=COLOURS[0], ms=4, label="geometric mean of places")
        fine = np.linspace(angles.min(), angles.max(), 300)
        model = fit.background + fit.amplitude / (1 + ((fine - fit.angle_deg) / fit.half_width_deg) ** 2)
        axis.plot(fine, model, color=COLOURS[1], label="fit")
        axis.axvspan(
            fit.angle_deg - fit.angle_error_deg,
            fit.angle_deg + fit.angle_error_deg,
            color=COLOURS[1],
            alpha=0.2,
        )
        axis.set(
            xlabel=f"{name} (deg)",
            ylabel="high-q fraction",
            title=f"{name} = {fit.angle_deg:.2f} ± {fit.angle_error_deg:.2f} deg",
        )
        axis.legend(frameon=False)
    return figure


# -- scans -----------------------------------------------------------------------------------------------
def rocking_figure(scans: Mapping[str, RockingScan]) -> Figure:
    """Counts over the rocking angle, and the frame at each peak."""
    n = max(1, len(scans))
    figure, axes = _subplots(1, n + 1, (4.6 + 4.0 * n, 3.9), width_ratios=(1.15, *(1,) * n))
    for number, (name, scan) in enumerate(scans.items()):
        frames = np.where(scan.mask, 0, scan.frames)
        counts = frames.sum(axis=(1, 2), dtype=float)
        colour = COLOURS[number % len(COLOURS)]
        axes[0, 0].semilogy(scan.angles_deg, np.maximum(counts, 0.5), color=colour, label=name)
        peak = int(np.argmax(counts))
        image = np.where(scan.mask, np.nan, np.log10(1 + frames[peak]))
        axis = axes[0, number + 1]
        picture = axis.imshow(image, cmap=COUNTS)
        axis.set_facecolor("0.6")
        axis.set_title(f"{name}: frame at {scan.angles_deg[peak]:+.3f} deg")
        axis.set(xticks=[], yticks=[])
        figure.colorbar(picture, ax=axis, label="log$_{10}$(1 + counts)", shrink=0.85)
    axes[0, 0].set(xlabel="rocking angle (deg)", ylabel="counts per frame", title="rocking curve")
    axes[0, 0].legend(frameon=False)
    return figure


# -- objects ---------------------------------------------------------------------------------------------
def object_figure(objects: Mapping[str, Reconstruction]) -> Figure:
    """Central cuts of modulus and phase, one column per object, in the orthogonal detector frame.

    Objects should stand on each other (`Comparison.as_reconstruction`), or their cuts show different places.
    """
    straight = {name: _straight(one) for name, one in objects.items()}
    figure, axes = _subplots(4, len(straight), (3.4 * len(straight) + 0.8, 12.4))
    half = _half_extent(straight.values())
    for column, (name, one) in enumerate(straight.items()):
        top = float(np.percentile(np.abs(one.image[one.support]), 99.5)) if one.support.any() else 1.0
        phase = np.where(one.support, np.angle(one.image * np.exp(-1j * _mean_phase(one))), np.nan)
        for row, (values, plane, colour, limits) in enumerate(
            (
                (np.abs(one.image) / top, "y", MODULUS, (0, 1.15)),
                (np.abs(one.image) / top, "z", MODULUS, (0, 1.15)),
                (phase, "y", PHASE, (-np.pi, np.pi)),
                (phase, "z", PHASE, (-np.pi, np.pi)),
            )
        ):
            axis = axes[row, column]
            _cut(axis, values, one, plane, colour, limits, half)
            if row == 0:
                axis.set_title(name, fontweight="bold")
            if column == 0:
                what = "modulus" if row < 2 else "phase"
                axis.set_ylabel(f"{what}, x′{plane}′ cut")
    _colour_bar(figure, axes[:2], MODULUS, (0, 1.15), "modulus")
    _colour_bar(figure, axes[2:], PHASE, (-np.pi, np.pi), "phase (rad)")
    return figure


def strain_figure(objects: Mapping[str, Reconstruction], limit: float | None = None) -> Figure:
    """Strain along Q in two central cuts, one column per object; `limit` in strain, not per cent."""
    straight = {name: _straight(one) for name, one in objects.items()}
    fields = {name: strain(one) for name, one in straight.items()}
    if limit is None:
        values = np.concatenate([f[np.isfinite(f)] for f in fields.values()])
        limit = float(np.percentile(np.abs(values), 98)) if values.size else 1e-3
    figure, axes = _subplots(2, len(straight), (3.4 * len(straight) + 0.8, 6.4))
    half = _half_extent(straight.values())
    for column, (name, one) in enumerate(straight.items()):
        for row, plane in enumerate("yz"):
            _cut(axes[row, column], fields[name] * 100, one, plane, SIGNED, (-limit * 100, limit * 100), half)
        axes[0, column].set_title(name, fontweight="bold")
    for row, plane in enumerate("yz"):
        axes[row, 0].set_ylabel(f"x′{plane}′ cut")
    _colour_bar(figure, axes, SIGNED, (-limit * 100, limit * 100), "strain along Q (%)")
    return figure


def histogram_figure(histograms: Mapping[str, Histogram]) -> Figure:
    """Distributions of the modulus inside the support."""
    figure, axes = _subplots(1, 1, (6, 3.8))
    for number, (name, h) in enumerate(histograms.items()):
        peaks = f"{h.peaks} peak" + ("" if h.peaks == 1 else "s")
        colour = COLOURS[number % len(COLOURS)]
        axes[0, 0].plot(h.centres, h.density, color=colour, label=f"{name}: {h.mode:.2f}, {peaks}")
        axes[0, 0].fill_between(h.centres, h.density, color=colour, alpha=0.12)
    axes[0, 0].set(xlabel="modulus, relative to its 99.5th percentile", ylabel="density", xlim=(0, 1.2))
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(frameon=False)
    return figure


# -- convergence and quality -----------------------------------------------------------------------------
def convergence_figure(results: Mapping[str, Reconstruction]) -> Figure:
    """Error and free log-likelihood of every trial over the iterations."""
    figure, axes = _subplots(1, 2, (11, 3.8))
    for number, (name, result) in enumerate(results.items()):
        for axis, curves in zip(axes[0], (result.error, result.free_llk), strict=True):
            if curves is None:
                continue
            colour = COLOURS[number % len(COLOURS)]
            for trial, curve in enumerate(np.atleast_2d(curves)):
                iterations = np.arange(1, curve.size + 1)
                axis.semilogy(
                    iterations, curve, color=colour, lw=1, alpha=0.75, label=name if trial == 0 else None
                )
    for axis, label in zip(axes[0], ("error (R-factor)", "free log-likelihood per pixel"), strict=True):
        axis.set(xlabel="iteration", ylabel=label)
        if axis.lines:
            axis.legend(frameon=False)
    return figure


def fsc_figure(correlations: Mapping[str, ShellCorrelation]) -> Figure:
    """Fourier shell correlations, their 1/2-bit thresholds (dashed) and the resolutions they give."""
    figure, axes = _subplots(1, 1, (6.4, 4.0))
    axis = axes[0, 0]
    for number, (name, fsc) in enumerate(correlations.items()):
        colour = COLOURS[number % len(COLOURS)]
        frequency = fsc.q / (2 * np.pi) * 1e-6
        bound = "≤ " if fsc.limited_by_grid else ""
        label = f"{name}: {bound}{fsc.resolution_half_period * 1e9:.1f} nm half period"
        axis.plot(frequency, fsc.correlation, color=colour, label=label)
        axis.plot(frequency, fsc.threshold, "--", color=colour, lw=1, alpha=0.8)
        if np.isfinite(fsc.resolution_full_period) and not fsc.limited_by_grid:
            axis.axvline(1e-6 / fsc.resolution_full_period, color=colour, lw=0.8, ls=":")
    axis.set(xlabel="spatial frequency (1/µm)", ylabel="Fourier shell correlation", ylim=(-0.05, 1.05))
    axis.set_xlim(left=0)
    axis.legend(frameon=False, loc="upper right", title="dashed: 1/2 bit")
    return figure


def drift_figure(
    drift: np.ndarray, truth: np.ndarray | None = None, angles_deg: np.ndarray | None = None
) -> Figure:
    """Drift (J, 2) in x' and y' as found, over angle or frame, and the true one where there is one.

    The mean of either is taken off: an object shifted as a whole has not drifted.
    """
    figure, axes = _subplots(1, 1, (6.4, 3.6))
    axis = axes[0, 0]
    over = np.arange(len(drift)) if angles_deg is None else angles_deg
    for k, name in enumerate(("x′", "y′")):
        axis.plot(over, (drift[:, k] - drift[:, k].mean()) * 1e9, color=COLOURS[k], label=f"{name} found")
        if truth is not None:
            true = (truth[:, k] - truth[:, k].mean()) * 1e9
            axis.plot(over, true, "--", color=COLOURS[k], lw=1, label=f"{name} true")
    axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axis.set(xlabel="frame" if angles_deg is None else "rocking angle (deg)", ylabel="drift (nm)")
    axis.legend(frameon=False, ncols=2)
    return figure


# -- pieces ----------------------------------------------------------------------------------------------
def path_figure(path: Mapping[str, np.ndarray]) -> Figure:
    """Where every axis that moves stands at each frame; the x, y path of the modulator where both move.

    Parameters
    ----------
    path : mapping of device name to ndarray, (frames,)
    """
    moving = {name: values for name, values in path.items() if np.ptp(values) > 0}
    pair = [name for name in moving if name.endswith(("nanogoniometer_x", "nanogoniometer_y"))]
    rows = max(1, len(moving))
    figure, axes = _subplots(rows, 2 if len(pair) == 2 else 1, (9, 1 + 1.6 * rows))
    for axis, (name, values) in zip(axes[:, 0], moving.items(), strict=False):
        axis.plot(values, color=COLOURS[0], lw=1)
        axis.set(ylabel=name.replace("_", " ", 1))
    axes[-1, 0].set(xlabel="frame")
    if len(pair) == 2:
        for axis in axes[:, 1]:
            axis.remove()
        plane = figure.add_subplot(axes[0, 1].get_gridspec()[:, 1])
        x, y = (moving[name] for name in sorted(pair))
        plane.plot(x, y, "-", color="0.7", lw=0.6)
        plane.plot(x, y, ".", color=COLOURS[1], ms=2.5)
        plane.set(xlabel="x (µm)", ylabel="y (µm)", aspect="equal", title="modulator")
    return figure


def _map(
    figure: Figure,
    axis: Axes,
    values: np.ndarray,
    pixel: float,
    title: str,
    colour: str,
    limits: tuple[float, float],
) -> None:
    picture = axis.imshow(values, cmap=colour, vmin=limits[0], vmax=limits[1], extent=_extent(values, pixel))
    axis.set(xticks=[], yticks=[], title=title)
    axis.set_facecolor("0.85")
    _scale_bar(axis)
    figure.colorbar(picture, ax=axis, shrink=0.85)


def _cut(
    axis: Axes,
    values: np.ndarray,
    one: Reconstruction,
    plane: str,
    colour: str,
    limits: tuple[float, float],
    half: tuple[float, float, float],
) -> None:
    """The x'y' or x'z' plane through the middle of the support, all at one scale."""
    middle = [round(c) for c in _middle(one.support)]
    image = values[middle[0]] if plane == "y" else values[::-1, middle[1]]  # z' up
    centre = (middle[1], middle[2]) if plane == "y" else (len(values) - 1 - middle[0], middle[2])
    pixel = one.voxel_size[1 if plane == "y" else 0], one.voxel_size[2]
    tall, wide = half[1 if plane == "y" else 0], half[2]
    ny, nx = image.shape
    left, top = -(centre[1] + 0.5) * pixel[1], (centre[0] + 0.5) * pixel[0]
    extent = (left * 1e6, (left + nx * pixel[1]) * 1e6, (top - ny * pixel[0]) * 1e6, top * 1e6)
    axis.imshow(image, cmap=colour, vmin=limits[0], vmax=limits[1], extent=extent, aspect="equal")
    axis.set_facecolor("0.9" if colour != MODULUS else "#440154")
    axis.set(xlim=(-wide * 1e6, wide * 1e6), ylim=(-tall * 1e6, tall * 1e6), xticks=[], yticks=[])
    _scale_bar(axis, "white" if colour == MODULUS else "black")


def _scale_bar(axis: Axes, colour: str = "black") -> None:
    """A round length of about a quarter of the width; data coordinates are micrometres."""
    (left, right), (bottom, top) = sorted(axis.get_xlim()), sorted(axis.get_ylim())
    quarter = (right - left) / 4
    decade = 10 ** np.floor(np.log10(quarter))
    length = max(m for m in (1, 2, 5) if m * decade <= quarter * 1.0001) * decade
    x, y = left + 0.05 * (right - left), bottom + 0.05 * (top - bottom)
    axis.add_patch(Rectangle((x, y), length, 0.018 * (top - bottom), color=colour, lw=0))
    label = f"{length:g} µm" if length >= 1 else f"{length * 1000:g} nm"
    axis.text(
        x + length / 2, y + 0.035 * (top - bottom), label, color=colour, ha="center", va="bottom", fontsize=9
    )


def _colour_bar(
    figure: Figure, axes: np.ndarray, colour: str, limits: tuple[float, float], label: str
) -> None:
    mappable = ScalarMappable(Normalize(*limits), colour)
    bar = figure.colorbar(mappable, ax=list(axes.ravel()), label=label, shrink=0.6, aspect=30)
    if colour == PHASE:
        bar.set_ticks([-np.pi, 0, np.pi], labels=["−π", "0", "π"])


def _extent(image: np.ndarray, pixel: float) -> tuple[float, float, float, float]:
    tall, wide = (n * pixel * 1e6 / 2 for n in image.shape)
    return (-wide, wide, -tall, tall)


def _box(where: np.ndarray) -> tuple[slice, slice]:
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    if rows.size == 0:
        return slice(None), slice(None)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _straight(one: Reconstruction) -> Reconstruction:
    """In an orthogonal frame; as it is when it is there already."""
    return one if one.shear == (0.0, 0.0) else orthogonalise(one)


def _middle(support: np.ndarray) -> np.ndarray:
    """Centre of mass of a support, or of the array when it is empty."""
    if not support.any():
        return np.array(support.shape) / 2
    return np.argwhere(support).mean(axis=0)


def _half_extent(objects: Any) -> tuple[float, float, float]:
    """Half size (z', y', x') in metres of the box that shows every object from its middle."""
    half = np.zeros(3)
    for one in objects:
        index = np.argwhere(one.support)
        if index.size:
            half = np.maximum(
                half, np.abs(index - _middle(one.support)).max(axis=0) * np.array(one.voxel_size)
            )
    half = np.maximum(half * 1.15, 20e-9)
    return float(half[0]), float(half[1]), float(half[2])


def _mean_phase(one: Reconstruction) -> float:
    total = complex(one.image[one.support].sum())
    return float(np.angle(total)) if total else 0.0
