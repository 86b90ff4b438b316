"""Where bytes go: one small protocol, and its implementations: a local folder and an rclone mount.

A storage knows files, folders and atomic landing; it does not know what a backup, a manifest or a key is.
"""
