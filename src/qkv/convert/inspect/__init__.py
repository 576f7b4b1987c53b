"""The attention of a checkpoint, read from its configuration and headers."""
