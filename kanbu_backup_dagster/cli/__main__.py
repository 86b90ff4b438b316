"""`python -m kanbu_backup_dagster.cli`: the same as `kanbu-backup`."""

from kanbu_backup_dagster.cli.main import main

main()
