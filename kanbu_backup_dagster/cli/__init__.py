"""`kanbu-backup`, the command line. Commands parse, ask and print; what they do is done in the rooms below."""
