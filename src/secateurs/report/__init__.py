"""What people look at: a page of everything that is recorded of some models, and tables of whole grids."""

from secateurs.report.page import ReportSettings, report

__all__ = ["ReportSettings", "report"]
