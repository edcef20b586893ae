"""Figures draw what they are given, leave no global state and survive poor input."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bcmi_beamline.geometry import Geometry
from bcmi_beamline.reconstruction.metrics import compare, fourier_shell_correlation, modulus_histogram
from bcmi_beamline.report import figures
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan


@pytest.fixture
def ball():
    geometry = Geometry()
    voxel = (20e-9, 24e-9, 24e-9)
    z, row, x = np.meshgrid(*((np.arange(24) - 12) * v for v in voxel), indexing="ij")
    support = x**2 + row**2 + (z + geometry.shear[0] * x) ** 2 < 140e-9**2
    image = (support * np.exp(-1j * 0.02e9 * x)).astype(np.complex64)
    return Reconstruction(image, support, voxel, geometry, geometry.shear, error=np.ones((2, 5)))


def texts(figure):
    return " ".join(
        t.get_text()
        for axes in figure.axes
        for t in [axes.title, axes.xaxis.label, *axes.texts, *legend(axes)]
    )


def legend(axes):
    return axes.get_legend().get_texts() if axes.get_legend() else []


def draw(figure):
    figure.canvas.draw()
    return figure


def test_modulator_tells_its_phase_step():
    phase = -2.45 * (np.random.default_rng(0).random((60, 50)) < 0.4)
    transmission = np.exp(1j * phase).astype(np.complex64)
    probe = np.ones((1, 8, 8), np.complex64)
    figure = draw(figures.modulator_figure(Modulator(transmission, 23e-9, 1.35e-3, 1e-6, (0.0, 0.0), probe)))
    assert "step 2.45 rad" in texts(figure) and "nm" in texts(figure)


def test_alignment_tells_angle_and_uncertainty():
    fit = SimpleNamespace(
        angle_deg=0.9, angle_error_deg=0.12, half_width_deg=2.0, amplitude=0.2, background=0.3
    )
    curve = SimpleNamespace(angles_deg=np.linspace(-5, 5, 9), sharpness=np.ones((2, 9)), fit=fit)
    assert "mchi = 0.90 ± 0.12 deg" in texts(draw(figures.alignment_figure({"mchi": curve})))


def test_scans_objects_and_quality(ball):
    comparison = compare(ball, ball)
    frames = np.random.default_rng(0).poisson(5, (9, 32, 32)).astype(np.float32)
    scan = RockingScan(frames, np.linspace(-0.1, 0.1, 9), np.zeros((32, 32), bool), ball.geometry)
    objects = {"truth": ball, "found": comparison.as_reconstruction()}
    assert "rocking angle" in texts(draw(figures.rocking_figure({"in": scan})))
    assert "found" in texts(draw(figures.object_figure(objects)))
    assert "50 nm" in texts(draw(figures.strain_figure(objects)))
    histogram = modulus_histogram(ball.image, ball.support)
    assert "1 peak" in texts(draw(figures.histogram_figure({"found": histogram})))
    fsc = fourier_shell_correlation(ball.image, ball.image, ball.voxel_size, ball.shear)
    assert "half period" in texts(draw(figures.fsc_figure({"found": fsc})))
    convergence = draw(figures.convergence_figure({"found": ball}))
    assert len(convergence.axes[0].lines) == 2 and not convergence.axes[1].lines
    drift = np.random.default_rng(1).normal(0, 1e-9, (9, 2))
    assert len(draw(figures.drift_figure(drift, drift)).axes[0].lines) == 5


def test_an_object_without_support_still_draws(ball):
    ball.support[:] = False
    assert "lost" in texts(draw(figures.object_figure({"lost": ball})))


def test_no_pyplot():
    code = "import sys, bcmi_beamline.report.figures; print('matplotlib.pyplot' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
