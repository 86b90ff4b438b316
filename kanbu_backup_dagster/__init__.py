"""Kanbu Backup on Dagster: backups of a PostgreSQL database and a source tree that can be trusted and restored."""

__version__ = "0.1.0"
