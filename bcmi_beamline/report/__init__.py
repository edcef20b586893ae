"""Figures and pages from results."""

from bcmi_beamline.report.page import Section, write_page
from bcmi_beamline.report.pages import experiment_page, results_page

__all__ = ["Section", "experiment_page", "results_page", "write_page"]
