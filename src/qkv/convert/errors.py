"""`CheckpointError`: a checkpoint that cannot be read, converted or written."""


class CheckpointError(ValueError):
    """Its message names the file, the tensor if any, what was required, what was found and what to do."""
