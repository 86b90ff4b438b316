"""Where the server's own log lines go: standard error, which service managers and containers keep."""

from __future__ import annotations

import logging


def log_to_stderr() -> None:
    """Show our own log lines, and others' warnings."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("kanbu_backup").setLevel(logging.INFO)
