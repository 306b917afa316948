"""What people look at: a page of everything that is recorded of some models, and tables of whole grids."""

from secateurs.report.compare import CompareSettings, Comparison, compare
from secateurs.report.grid import SweepSettings
from secateurs.report.page import ReportSettings, report
from secateurs.report.sweep import sweep

__all__ = ["CompareSettings", "Comparison", "ReportSettings", "SweepSettings", "compare", "report", "sweep"]
