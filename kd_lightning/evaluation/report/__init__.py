"""The comparison of teacher, baseline and distilled student: JSON, Markdown, pictures, table.

`build_report` turns results into the JSON document (docs/report_schema.md); everything else uses only that document,
so a report can be printed or drawn again without the run. Nothing here imports torch at import time.
"""

from kd_lightning.evaluation.report.build import SCHEMA_VERSION, build_report
from kd_lightning.evaluation.report.files import PAGE, load_report, write_report
from kd_lightning.evaluation.report.findings import findings
from kd_lightning.evaluation.report.results import (
    Curve,
    DataSummary,
    ModelResult,
    OutputsTime,
    read_curve,
    read_curves,
    role,
)
from kd_lightning.evaluation.report.table import comparison_rows, markdown_table, print_table
from kd_lightning.evaluation.report.text import report_markdown, summary

__all__ = [
    "PAGE",
    "SCHEMA_VERSION",
    "Curve",
    "DataSummary",
    "ModelResult",
    "OutputsTime",
    "build_report",
    "comparison_rows",
    "findings",
    "load_report",
    "markdown_table",
    "print_table",
    "read_curve",
    "read_curves",
    "report_markdown",
    "role",
    "summary",
    "write_report",
]
