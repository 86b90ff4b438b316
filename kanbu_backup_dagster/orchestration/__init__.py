"""Everything that imports Dagster: ops, jobs, assets, checks, schedules, sensors, resources.

Code here adapts; the work itself is done by the library rooms below.
"""
