"""The report of a run, as one file that opens anywhere."""

from vitrail.reporting.report import write_report

__all__ = ["write_report"]
