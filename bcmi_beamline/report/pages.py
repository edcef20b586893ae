"""The two pages: one experiment against truth, and results from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bcmi_beamline.reconstruction.metrics import Comparison, compare, modulus_histogram
from bcmi_beamline.report import figures
from bcmi_beamline.report.page import Section, write_page
from bcmi_beamline.scans import Modulator, Reconstruction, RockingScan

CUTS = "Central cuts in the orthogonal detector frame: modulus above, phase below; all at one scale."


def experiment_page(
    path: Path,
    summary: Mapping[str, Any],
    *,
    alignment: Mapping[str, figures.AlignmentCurve],
    scans: Mapping[str, RockingScan],
    modulator: Modulator,
    results: Mapping[str, Reconstruction],
    comparisons: Mapping[str, Comparison],
    truth: Reconstruction,
    figures_dir: Path | None = None,
) -> None:
    """Write the page of one whole experiment on the simulated beamline.

    Parameters
    ----------
    path : path
    summary : mapping
        What ``summary.json`` holds.
    alignment : mapping of tilt to curve
    scans, results, comparisons : mappings by name ("BCMI", "BCDI")
    modulator : Modulator
    truth : Reconstruction
    figures_dir : path, optional
        Also keep every figure there as PNG.
    """
    objects = {"truth": truth} | dict(results)
    sections = [
        Section(
            "The crystal",
            "What was simulated, and what was found of it with the modulator in (BCMI) and out (BCDI). "
            "The reconstruction knows the frames, the calibrated modulator and the distance found with it; "
            "truth is opened only for this comparison.",
            {
                "object": (figures.object_figure(_on_one_grid(objects, comparisons)), CUTS),
                "strain": (
                    figures.strain_figure(_on_one_grid(objects, comparisons)),
                    "Strain along Q in two central cuts.",
                ),
            },
        ),
        Section(
            "How good it is",
            "The modulus of a homogeneous crystal should have one value; the free log-likelihood is taken on "
            "pixels that no trial has seen.",
            {
                "histogram": (
                    figures.histogram_figure(_histograms(comparisons)),
                    "Modulus inside the support, normalised to its maximum.",
                ),
                "fsc": (
                    figures.fsc_figure({name: c.fsc for name, c in comparisons.items()}),
                    "Fourier shell correlation with truth and the 1/2-bit threshold.",
                ),
                "convergence": (
                    figures.convergence_figure(results),
                    "Error and free log-likelihood of every trial.",
                ),
            },
        ),
        Section(
            "The modulator",
            "Found by ptychography in the Bragg beam.",
            {
                "modulator": (
                    figures.modulator_figure(modulator),
                    "Modulus, phase, and the distribution of the phase where the map is trusted.",
                )
            },
        ),
        Section(
            "On the way",
            "The alignment of the modulator and the rocking curves.",
            {
                "alignment": (
                    figures.alignment_figure(alignment),
                    "Share of counts scattered far out over both tilts, with the fit.",
                ),
                "rocking": (
                    figures.rocking_figure(scans),
                    "Counts over the rocking angle, and the frame at the maximum.",
                ),
            },
        ),
    ]
    write_page(
        path,
        "Bragg coherent modulation imaging",
        f"Simulated beamline, preset {summary['preset']}: {summary['description']}.",
        _table(summary),
        sections,
        details=dict(summary),
        figures_dir=figures_dir,
    )


def results_page(
    path: Path,
    results: Mapping[str, Reconstruction],
    modulator: Modulator | None = None,
    truth: Reconstruction | None = None,
) -> None:
    """Write the page of results read from files; with `truth` each is compared with it.

    Parameters
    ----------
    path : path
    results : mapping of name to Reconstruction
    modulator, truth : optional
    """
    comparisons = {name: compare(one, truth) for name, one in results.items()} if truth else {}
    histograms = {
        name: modulus_histogram(one.image, one.support) for name, one in results.items() if one.support.any()
    }
    objects = ({"truth": truth} if truth else {}) | dict(results)
    sections = [
        Section(
            "Objects",
            "",
            {
                "object": (figures.object_figure(_on_one_grid(objects, comparisons)), CUTS),
                "strain": (
                    figures.strain_figure(_on_one_grid(objects, comparisons)),
                    "Strain along Q in two central cuts.",
                ),
                "histogram": (figures.histogram_figure(histograms), "Modulus inside the support."),
            },
        )
    ]
    traced = {name: one for name, one in results.items() if one.error is not None or one.free_llk is not None}
    if traced:
        sections[0].figures["convergence"] = (figures.convergence_figure(traced), "Every trial.")
    if comparisons:
        correlations = {name: c.fsc for name, c in comparisons.items()}
        sections[0].figures["fsc"] = (
            figures.fsc_figure(correlations),
            "Fourier shell correlation with truth.",
        )
    if modulator is not None:
        figure = (figures.modulator_figure(modulator), "Modulus and phase of the modulator.")
        sections.append(Section("The modulator", "", {"modulator": figure}))
    table = [["result", "what it is", "against truth"]]
    for name, one in results.items():
        table.append([name, repr(one), str(comparisons[name]) if name in comparisons else "-"])
    details = {name: one.configuration for name, one in results.items()}
    write_page(path, "Reconstructions", ", ".join(results), table, sections, details=details)


def _on_one_grid(
    objects: Mapping[str, Reconstruction], comparisons: Mapping[str, Comparison]
) -> dict[str, Reconstruction]:
    """Each compared object as it was compared: shifted, phased and scaled to truth."""
    shown = {}
    for name, one in objects.items():
        if name not in comparisons:
            shown[name] = one
            continue
        c = comparisons[name]
        label = name if c.verdict == "correct" else f"{name} ({c.verdict})"
        shown[label] = Reconstruction(
            image=c.image,
            support=c.support,
            voxel_size=c.voxel_size,
            geometry=one.geometry,
            shear=c.shear,
            configuration=one.configuration,
        )
    return shown


def _histograms(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    found = {name: c.modulus for name, c in comparisons.items()}
    first = next(iter(comparisons.values()))
    return {"truth": first.modulus_truth} | found


def _table(summary: Mapping[str, Any]) -> list[list[str]]:
    """The numbers of the paper's table for this experiment."""
    bcmi, bcdi = summary["bcmi"], summary["bcdi"]
    alignment, calibration, truth = summary["alignment"], summary["calibration"], summary["truth"]

    def nm(value: float | None) -> str:
        return "not reached" if value is None else f"{value:.1f} nm"

    def first_weight(result: Mapping[str, Any]) -> str:
        weights = result["mode_weights"]
        return f"{100 * weights[0] / np.sum(weights):.2f} %" if weights else "-"

    rows = [["", "BCMI (modulator in)", "BCDI (modulator out)"]]
    rows.append(["verdict", bcmi["class"], bcdi["class"]])
    rows.append(["correlation with truth", f"{bcmi['correlation']:.4f}", f"{bcdi['correlation']:.4f}"])
    twins = (f"{result['correlation_twin']:.4f}" for result in (bcmi, bcdi))
    rows.append(["correlation with the twin of truth", *twins])
    half, full = "fsc_half_bit_half_period_nm", "fsc_half_bit_full_period_nm"
    rows.append(["FSC 1/2 bit, half period", nm(bcmi[half]), nm(bcdi[half])])
    rows.append(["FSC 1/2 bit, full period", nm(bcmi[full]), nm(bcdi[full])])
    rows.append(
        [
            "modulus histogram",
            *(f"{r['modulus']['peaks']} peak(s), mode {r['modulus']['mode']:.2f}" for r in (bcmi, bcdi)),
        ]
    )
    rows.append(["weight of the first mode", first_weight(bcmi), first_weight(bcdi)])
    rows.append(
        [
            "modulator tilt, found (hidden)",
            f"Mchi {alignment['mchi_deg']:+.2f} ± {alignment['mchi_error_deg']:.2f} "
            f"({truth['hidden']['mchi_deg']:+.2f}), Mphi {alignment['mphi_deg']:+.2f} ± "
            f"{alignment['mphi_error_deg']:.2f} ({truth['hidden']['mphi_deg']:+.2f}) deg",
            "",
        ]
    )
    rows.append(
        [
            "d1, found (true)",
            f"{calibration['d1_um']:.1f} ± {calibration['d1_error_um']:.1f} µm ({truth['d1_um']:.1f})",
            "",
        ]
    )
    return rows
