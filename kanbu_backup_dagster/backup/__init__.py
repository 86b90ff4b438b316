"""What a backup is: its names, manifest, recipe, stages, keys, catalog, verification and retention.

Nothing here imports Dagster or knows where bytes come from; where they go is known through `storage` alone.
"""
