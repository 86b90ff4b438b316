"""Where bytes come from: PostgreSQL, directly or in a container, and the source tree.

Direct and docker differ in one thing only: how a command is run. Nothing here compresses, encrypts or stores.
"""
