"""The web server: Dagster's UI and GraphQL, `POST /api/backup/trigger`, and access control."""
