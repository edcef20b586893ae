"""Whole arrays of another library against the fused loops, wherever that library is installed."""

from __future__ import annotations

import numpy as np
import pytest

from bcmi_beamline.reconstruction.ptychography._detector import PIXEL_SPREAD
from bcmi_beamline.reconstruction.ptychography._devices import make_device
from bcmi_beamline.reconstruction.ptychography._engine import Engine


def _engine(name: str, finer: int = 1) -> Engine:
    rng = np.random.default_rng(2)
    n, frames = 24, 12
    y, x = np.mgrid[: n * finer, : n * finer] - n * finer // 2
    probe = 30 * np.exp(-(x**2 + y**2) / 8 + 0.1j * x)[None] * np.array([1, 0.3j])[:, None, None]
    image = np.exp(0.3j * rng.standard_normal((60, 62)))
    states = (rng.random((2, n, n)) < 0.1).astype(np.uint8) * rng.integers(1, 3, (2, n, n), np.uint8)
    counts = rng.poisson(4, (frames, n, n)).astype(np.uint16)
    places, flux = rng.uniform(2, 9, (frames, 2)), rng.uniform(0.5, 2, frames)
    engine = Engine(
        counts, states, places, probe, image, flux, np.random.default_rng(0), batch=4,
        spread=PIXEL_SPREAD, finer=finer, variations=1, device=make_device(name),
    )  # fmt: skip
    engine.seek_background(0.3)
    engine.begin_varying()
    return engine


def _passes(engine: Engine) -> tuple:
    engine.come_from((60e-9, 60e-9), 0.138e-9, 10e-6)
    scores = [engine.sweep(momentum=0.5, locate=True)]
    engine.move(lambda offsets: offsets)
    engine.vary()
    engine.even()
    scores += [engine.descend(locate=True, poisson=True) for _ in range(2)]
    return scores, engine.image, engine.probe, engine.offsets, engine.gain, engine.background


@pytest.mark.parametrize("finer", [1, 2])
@pytest.mark.parametrize("name", ["torch:cpu", "torch:cuda", "cupy"])
def test_same_results_within_rounding(name, finer):
    library = pytest.importorskip(name.split(":")[0])
    if name != "torch:cpu" and not library.cuda.is_available():
        pytest.skip("no accelerator here")
    mine, other = (_passes(_engine(n, finer)) for n in ("numpy", name))
    np.testing.assert_allclose(other[0], mine[0], rtol=1e-3)
    for a, b in zip(mine[1:], other[1:], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, atol=2e-3 * np.abs(a).max())


def test_a_device_that_is_not_there_is_refused_in_one_line():
    for name in ("numpy:2", "gpu", "torch:nowhere", "cupy"):
        try:
            make_device(name)
        except ValueError as error:
            assert "\n" not in str(error)
            assert "choose" in str(error) or "pip install" in str(error)
        else:
            assert name == "cupy"
