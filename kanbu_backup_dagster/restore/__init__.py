"""Putting a backup back: the database through a staging database and a swap, the drill, the source tree.

Nothing here imports Dagster: with this room and a folder of backups a database is restored on a bare machine.
"""
