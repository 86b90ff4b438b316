"""Writes the file's JSON schema: `python -m kanbu_backup_dagster.schedule_file > kanbu_backup.schema.json`."""

from __future__ import annotations

import sys

from kanbu_backup_dagster.schedule_file.model import schema_text

sys.stdout.write(schema_text())
