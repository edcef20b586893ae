"""What a scan says: fits that return a number with its uncertainty, or refuse with the reason.

Nothing moves on a fit that is not clearly better than no feature at all: every function raises `PoorFit`
instead of returning a number it does not believe.
"""

import math
from dataclasses import dataclass

import lmfit
import numpy as np
from scipy import ndimage, special, stats

SIGNIFICANCE = 1e-4
"""Largest chance probability (F-test against a featureless curve) at which a feature is believed."""


class PoorFit(RuntimeError):
    """A curve from which nothing may be concluded; the message says what was found and what was wanted."""


@dataclass(frozen=True)
class SharpnessFit:
    """``background + amplitude / (1 + ((a - angle) / half_width)**2)`` over tilt angles a."""

    angle_deg: float
    angle_error_deg: float
    half_width_deg: float
    amplitude: float
    background: float
    chance: float
    """Probability that a featureless curve fits this much better by chance."""


@dataclass(frozen=True)
class PeakFit:
    """Maximum of a curve of counts and how it lies; positions in the unit of the scan."""

    position: float
    """Vertex of a parabola through the measured points around the maximum of the smoothed curve."""
    position_error: float
    centroid: float
    """Centre of mass above background: unlike the maximum it moves with a second peak."""
    centroid_error: float
    fwhm: float
    """Width of the region above half maximum."""
    height: float
    background: float

    @property
    def is_split(self) -> bool:
        """Whether maximum and centroid lie so far apart that there is more than one peak, or a skew one."""
        apart = abs(self.position - self.centroid)
        return apart > max(0.2 * self.fwhm, 4 * math.hypot(self.position_error, self.centroid_error))


@dataclass(frozen=True)
class EdgeFit:
    """Error function ``low + step (1 + erf((x - position) / (sqrt(2) width))) / 2``."""

    position: float
    position_error: float
    width: float
    """Standard deviation of the blur, unit of the scan."""
    step: float


@dataclass(frozen=True)
class SlabFit:
    """Stretch of higher signal between two edges; unit of the scan."""

    centre: float
    centre_error: float
    width: float


@dataclass(frozen=True)
class LineFit:
    """Straight line; for a z-walk the slope is the tangent of the tilt."""

    slope: float
    slope_error: float
    offset: float

    @property
    def angle_deg(self) -> float:
        """Angle whose tangent is the slope, degrees."""
        return math.degrees(math.atan(self.slope))

    @property
    def angle_error_deg(self) -> float:
        """Standard uncertainty of `angle_deg`."""
        return math.degrees(self.slope_error / (1 + self.slope**2))

    def __call__(self, x: float) -> float:
        """Value of the line at `x`."""
        return self.offset + self.slope * x


def _checked(what: str, x: np.ndarray, y: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Finite points sorted by x, at least `least` of them."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{what}: positions {x.shape} and signal {y.shape} must be equally long vectors")
    good = np.isfinite(x) & np.isfinite(y)
    if good.sum() < least:
        raise PoorFit(f"{what}: {good.sum()} good points, at least {least} are needed")
    order = np.argsort(x[good])
    return x[good][order], y[good][order]


def _chance(y: np.ndarray, plain: np.ndarray, residual: np.ndarray, added: int, parameters: int) -> float:
    """F-test: probability that `added` parameters improve on the residuals `plain` as much by chance."""
    free = len(y) - parameters
    gain = (np.sum(plain**2) - np.sum(residual**2)) / added
    scatter = max(np.sum(residual**2) / free, np.finfo(float).eps * np.sum(y**2) / free)
    return float(stats.f.sf(gain / scatter, added, free)) if gain > 0 else 1.0


def _log_lorentzian(x, background, amplitude, centre, half_width):
    return np.log(background + amplitude / (1 + ((x - centre) / half_width) ** 2))


def fit_sharpness(angles_deg: np.ndarray, sharpness: np.ndarray) -> SharpnessFit:
    """Angle at which the modulator is perpendicular, from the sharpness of its walls.

    A tilt smears the side walls of the pattern and the scattering far out across them falls, equally to
    either side. How much there is differs from place to place by a factor, so the fit is made to logarithms
    and places are averaged geometrically.

    Parameters
    ----------
    angles_deg : ndarray, (K,)
        Tilt readings.
    sharpness : ndarray, (K,) or (P, K)
        High-q fraction, positive; one row per place.

    Raises
    ------
    PoorFit
        With fewer than seven points, a maximum within one step of the ends of the scan, a chance
        probability above `SIGNIFICANCE` against a straight line, or an uncertainty above a tenth of the
        range.
    """
    what = "sharpness"
    positive = np.where(np.atleast_2d(sharpness) > 0, sharpness, np.nan)
    a, log_s = _checked(what, angles_deg, np.log(positive).mean(axis=0), least=7)
    s = np.exp(log_s)
    span, step = np.ptp(a), np.median(np.diff(a))
    smooth = ndimage.gaussian_filter1d(s, 1.0, mode="nearest")
    parameters = lmfit.Parameters()
    parameters.add("background", value=float(s.min()) / 2, min=1e-3 * float(s.min()))
    parameters.add("amplitude", value=float(smooth.max() - s.min() / 2), min=0)
    parameters.add("centre", value=float(a[np.argmax(smooth)]), min=a[0] - span / 2, max=a[-1] + span / 2)
    parameters.add("half_width", value=span / 4, min=step / 2, max=3 * span)
    result = lmfit.Model(_log_lorentzian).fit(log_s, parameters, x=a, scale_covar=True)
    best = result.params
    line = np.polynomial.Polynomial.fit(a, log_s, 1)(a)
    chance = _chance(log_s, log_s - line, log_s - result.best_fit, added=2, parameters=4)
    if chance > SIGNIFICANCE:
        raise PoorFit(
            f"{what}: no maximum between {a[0]:.2f} and {a[-1]:.2f} deg "
            f"(chance probability {chance:.2g}, wanted below {SIGNIFICANCE:g})"
        )
    centre = float(best["centre"].value)
    error = _centre_error(a, log_s, result)
    if not a[0] + step <= centre <= a[-1] - step:
        raise PoorFit(
            f"{what}: maximum at {centre:.2f} +- {error:.2f} deg lies at the end of the scan "
            f"{a[0]:.2f} to {a[-1]:.2f} deg; scan around it"
        )
    if error > span / 10:
        raise PoorFit(f"{what}: maximum {centre:.2f} +- {error:.2f} deg is too uncertain for a move")
    return SharpnessFit(
        angle_deg=centre,
        angle_error_deg=error,
        half_width_deg=float(best["half_width"].value),
        amplitude=float(best["amplitude"].value),
        background=float(best["background"].value),
        chance=chance,
    )


def _centre_error(a: np.ndarray, log_s: np.ndarray, result: lmfit.model.ModelResult) -> float:
    """Uncertainty of the centre; with the other parameters held where they have no covariance.

    On a short scan background and width are degenerate; they are even about the centre and couple little.
    """
    error = result.params["centre"].stderr
    if error is not None and np.isfinite(error):
        return float(error)
    values = {name: float(p.value) for name, p in result.params.items()}
    shift = 1e-3 * float(np.ptp(a))
    up, down = ({**values, "centre": values["centre"] + d} for d in (shift, -shift))
    slope = (_log_lorentzian(a, **up) - _log_lorentzian(a, **down)) / (2 * shift)
    scatter = float(np.sum((log_s - result.best_fit) ** 2)) / (len(a) - 4)
    return float(np.sqrt(max(scatter, 1e-12) / np.sum(slope**2)))


def find_peak(positions: np.ndarray, counts: np.ndarray, what: str = "rocking curve") -> PeakFit:
    """Maximum of a curve of photon counts; a split or skew peak does not upset it.

    The curve is smoothed over a quarter of its width, and a parabola through the points around the highest
    place, weighted by counting statistics, gives the maximum and its uncertainty (scaled up where the
    scatter exceeds the statistics).

    Parameters
    ----------
    positions, counts : ndarray, (K,)
        Rocking angles or stage positions, and photon counts.
    what : str
        What the errors call the curve.

    Raises
    ------
    PoorFit
        With fewer than five points, a peak that does not stand out of the background, or a maximum at the
        end of the scan.
    """
    a, n = _checked(what, positions, counts, least=5)
    step = float(np.median(np.diff(a)))
    background = float(np.mean(np.sort(n)[: max(2, len(n) // 5)]))
    above = np.clip(n - background, 0, None)
    light_smoothing = ndimage.gaussian_filter1d(above, 0.8, mode="nearest")
    width = max(float((light_smoothing > light_smoothing.max() / 2).sum()), 2.0)
    smooth = ndimage.gaussian_filter1d(above, width / 8, mode="nearest")
    top = int(np.argmax(smooth))
    noise = max(math.sqrt(max(background, 1.0)), float(np.std(np.diff(np.sort(n)[: max(3, len(n) // 3)]))))
    if smooth[top] < 7 * noise:
        raise PoorFit(
            f"{what}: highest point {n[top]:.0f} counts on a background of {background:.0f}: no peak between "
            f"{a[0]:.4f} and {a[-1]:.4f}"
        )
    if top in (0, len(a) - 1):
        raise PoorFit(f"{what}: still rising at the end of the scan, {a[top]:.4f}; scan around it")
    reach = max(2, round(width / 4))
    near = slice(max(0, top - reach), top + reach + 1)
    vertex, error = _parabola_vertex(a[near], n[near])
    if vertex is None or not a[near][0] <= vertex <= a[near][-1]:
        vertex, error = float(a[top]), step * reach / math.sqrt(3)
    total = above.sum()
    centroid = float((a * above).sum() / total)
    variance = np.clip(n, 1, None)
    return PeakFit(
        position=vertex,
        position_error=error,
        centroid=centroid,
        centroid_error=float(np.sqrt(((a - centroid) ** 2 * variance).sum()) / total),
        fwhm=_width_at_half(a, smooth),
        height=float(smooth[top]),
        background=background,
    )


def _parabola_vertex(x: np.ndarray, counts: np.ndarray) -> tuple[float | None, float]:
    """Vertex of a parabola through counts with Poisson weights, and its uncertainty; None if it opens up."""
    middle = x.mean()
    u = x - middle
    weights = 1 / np.sqrt(np.clip(counts, 1, None))
    design = np.stack([np.ones_like(u), u, u**2], axis=1)
    coefficients, *_ = np.linalg.lstsq(design * weights[:, None], counts * weights, rcond=None)
    _, b, c = coefficients
    if c >= 0:
        return None, math.inf
    residual = (counts - design @ coefficients) * weights
    scale = max(1.0, float(residual @ residual) / max(1, len(x) - 3))
    covariance = np.linalg.inv((design * weights[:, None] ** 2).T @ design) * scale
    gradient = np.array([0, -1 / (2 * c), b / (2 * c**2)])
    return float(middle - b / (2 * c)), float(np.sqrt(gradient @ covariance @ gradient))


def _width_at_half(x: np.ndarray, y: np.ndarray) -> float:
    """Distance between the outermost crossings of half maximum, by linear interpolation."""
    half = y.max() / 2
    above = np.flatnonzero(y >= half)
    first, last = above[0], above[-1]
    left, right = x[first], x[last]
    if first > 0:
        left -= (x[first] - x[first - 1]) * (y[first] - half) / (y[first] - y[first - 1])
    if last < len(x) - 1:
        right += (x[last + 1] - x[last]) * (y[last] - half) / (y[last] - y[last + 1])
    return float(right - left)


def _edge(x, low, step, position, width):
    return low + step * (1 + special.erf((x - position) / (math.sqrt(2) * width))) / 2


def fit_edge(positions: np.ndarray, signal: np.ndarray) -> EdgeFit:
    """Position of one edge, rising or falling, seen through a beam of finite width.

    Raises
    ------
    PoorFit
        With fewer than nine points, no significant step, or an edge outside the scanned range.
    """
    what = "edge"
    x, y = _checked(what, positions, signal, least=9)
    span, step = np.ptp(x), float(np.median(np.diff(x)))
    cuts = np.arange(2, len(y) - 1)
    contrast = np.array([y[k:].mean() - y[:k].mean() for k in cuts])
    best_cut = int(np.argmax(np.abs(contrast) * np.sqrt(cuts * (len(y) - cuts))))
    cut = int(cuts[best_cut])
    parameters = lmfit.Parameters()
    parameters.add("low", value=float(y[:cut].mean()))
    parameters.add("step", value=float(contrast[best_cut]))
    parameters.add("position", value=float((x[cut - 1] + x[cut]) / 2), min=x[0] - span, max=x[-1] + span)
    parameters.add("width", value=step / 2, min=step / 20, max=span / 2)
    result = lmfit.Model(_edge).fit(y, parameters, x=x, scale_covar=True)
    best = result.params
    position = float(best["position"].value)
    chance = _chance(y, y - y.mean(), y - result.best_fit, added=3, parameters=4)
    if chance > SIGNIFICANCE or not x[0] < position < x[-1]:
        raise PoorFit(
            f"{what}: none between {x[0]:.1f} and {x[-1]:.1f} (best at {position:.1f}, chance probability "
            f"{chance:.2g}, wanted below {SIGNIFICANCE:g})"
        )
    error = best["position"].stderr
    least_error = step / math.sqrt(12)  # an edge sharper than the steps lies anywhere between two
    return EdgeFit(
        position=position,
        position_error=float(error) if error and least_error < error < span else least_error,
        width=float(best["width"].value),
        step=float(best["step"].value),
    )


def _slab(x, low, step, centre, half_width, blur):
    left, right = centre - half_width, centre + half_width
    scale = math.sqrt(2) * blur
    return low + step * (special.erf((x - left) / scale) - special.erf((x - right) / scale)) / 2


def fit_slab(positions: np.ndarray, signal: np.ndarray) -> SlabFit:
    """Centre and width of a stretch between two edges where the signal is higher.

    Raises
    ------
    PoorFit
        With fewer than nine points, no significant stretch, or one that is not inside the scan.
    """
    what = "pattern"
    x, y = _checked(what, positions, signal, least=9)
    step = float(np.median(np.diff(x)))
    inside = x[y > (y.min() + y.max()) / 2]
    parameters = lmfit.Parameters()
    parameters.add("low", value=float(y.min()))
    parameters.add("step", value=float(np.ptp(y)) or 1.0, min=0)
    parameters.add(
        "centre", value=float(inside.mean()) if len(inside) else float(x.mean()), min=x[0], max=x[-1]
    )
    parameters.add("half_width", value=max(float(np.ptp(inside)) / 2 if len(inside) else 0.0, step), min=0)
    parameters.add("blur", value=step / 2, min=step / 20, max=float(np.ptp(x)))
    result = lmfit.Model(_slab).fit(y, parameters, x=x, scale_covar=True)
    best = {name: float(p.value) for name, p in result.params.items()}
    chance = _chance(y, y - y.mean(), y - result.best_fit, added=4, parameters=5)
    left, right = best["centre"] - best["half_width"], best["centre"] + best["half_width"]
    if chance > SIGNIFICANCE or not (x[0] < left and right < x[-1]):
        raise PoorFit(
            f"{what}: not found with both edges between {x[0]:.1f} and {x[-1]:.1f} (best {left:.1f} to "
            f"{right:.1f}, chance probability {chance:.2g}, wanted below {SIGNIFICANCE:g})"
        )
    error = result.params["centre"].stderr
    least_error = step / math.sqrt(24)  # two edges sharper than the steps
    return SlabFit(
        centre=best["centre"],
        centre_error=float(error) if error and least_error < error < step else least_error,
        width=2 * best["half_width"],
    )


def fit_line(x: np.ndarray, y: np.ndarray, errors: np.ndarray | None = None) -> LineFit:
    """Weighted straight line through three or more points.

    With `errors` given the uncertainty is the larger of the one they imply and the one the scatter shows.

    Raises
    ------
    PoorFit
        With fewer than three points, or all at one x.
    """
    weights = np.ones(len(x)) if errors is None else 1 / np.asarray(errors, float)[np.argsort(x)]
    x, y = _checked("line", x, y, least=3)
    if np.ptp(x) == 0:
        raise PoorFit("line: all points lie at one position")
    if len(weights) != len(x):
        raise PoorFit("line: some points are not finite")
    design = np.stack([np.ones_like(x), x], axis=1) * weights[:, None]
    (offset, slope), *_ = np.linalg.lstsq(design, y * weights, rcond=None)
    residual = (y - offset - slope * x) * weights
    scatter = float(residual @ residual) / (len(x) - 2)
    variance = np.linalg.inv(design.T @ design)[1, 1] * (scatter if errors is None else max(1.0, scatter))
    return LineFit(slope=float(slope), slope_error=float(np.sqrt(variance)), offset=float(offset))
