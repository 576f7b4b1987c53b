"""`CommandError`: an error for the user of the command line."""


class CommandError(Exception):
    """Its message is printed without a traceback; the command exits with code 1."""
