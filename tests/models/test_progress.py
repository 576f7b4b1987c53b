"""Progress: bars on a terminal, plain lines elsewhere."""

import io

import pytest

from qkv.models.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def _count(stream, unit):
    with Progress(stream).step("counting", 3, unit) as on_progress:
        on_progress(3)


@pytest.mark.parametrize(("unit", "amount"), [("tokens", "3/3 tokens"), ("calls", "3/3 calls"), ("bytes", "3/3 bytes")])
def test_terminal_gets_a_bar_that_goes_away(terminal, unit, amount):
    _count(terminal, unit)
    shown = terminal.getvalue()
    assert "counting" in shown
    assert amount in "".join(part.split("m", 1)[-1] for part in shown.split("\x1b["))
    assert shown.endswith("\x1b[2K")


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_terminal_gets_plain_lines_even_if_colour_is_forced(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    stream = io.StringIO()
    _count(stream, "tokens")
    assert stream.getvalue() == "counting ...\n"


def test_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    _count(terminal, None)
    assert terminal.getvalue() == "counting ...\n"
