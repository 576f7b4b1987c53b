"""`CommandError`: what went wrong, for the person who typed the command."""


class CommandError(Exception):
    """An error whose message says all there is to know: printed without a traceback, exit code 1."""
