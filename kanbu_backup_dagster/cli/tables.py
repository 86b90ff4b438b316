"""Tables on the terminal.

What belongs here: how wide they are, and that what they hold is text and nothing else. What does not: what they say.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_LEAST_WIDTH = 200


def print_table(table: Table) -> None:
    """Print a table. Square brackets and colons in its texts are themselves; a style takes a `rich.text.Text`."""
    console = Console(markup=False, emoji=False, highlight=False)
    # A name cut short by a narrow terminal, or by a pipe's 80 columns, cannot be copied.
    console.width = max(console.width, _LEAST_WIDTH)
    console.print(table)
