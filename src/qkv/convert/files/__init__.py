"""Checkpoint files: JSON documents, headers of weight files, folders, and atomic writes."""
