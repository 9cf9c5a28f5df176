"""Tables that print on a terminal, in a file and as Markdown."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

PLAIN_WIDTH = 140  # where the output is not a terminal


def console() -> Console:
    """Standard output: as wide as the terminal, else PLAIN_WIDTH and without control codes."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PLAIN_WIDTH, soft_wrap=False)


@dataclass(frozen=True)
class Table:
    """Cells of text in rows under headers; ``numbers`` names the columns that are aligned on the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[str] = field(default_factory=frozenset)

    def show(self) -> None:
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
        for header in self.headers:
            table.add_column(header, justify="right" if header in self.numbers else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console().print(table)

    def markdown(self) -> str:
        rule = ["---:" if header in self.numbers else "---" for header in self.headers]
        lines = [self.headers, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
