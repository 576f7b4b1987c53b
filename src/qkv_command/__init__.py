"""The command `qkv`, outside of the package: importing `qkv` imports torch, and Ctrl-C must work meanwhile."""

INTERRUPTED = 130
"""Exit code for Ctrl-C, as in shells."""


def main() -> int:
    """Runs `qkv.cli.main` and returns its exit code; `INTERRUPTED`, without a traceback, for Ctrl-C."""
    try:
        from qkv.cli import main

        return main()
    except KeyboardInterrupt:
        return INTERRUPTED
