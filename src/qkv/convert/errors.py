"""`CheckpointError`: a checkpoint that cannot be read, converted or written."""


class CheckpointError(ValueError):
    """Names the file, and the tensor where there is one, what was required, what was found and what to do."""
