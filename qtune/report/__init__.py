"""The report: one page that shows what a run did, drawn from the files of its folder."""

from qtune.report.page import write_report

__all__ = ["write_report"]
