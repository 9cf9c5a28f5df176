"""What folders of results say: one page for a browser, one table for a terminal."""

from .page import write_report
from .words import terminal_table

__all__ = ["terminal_table", "write_report"]
