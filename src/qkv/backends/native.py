"""The slot of the compiled CPU kernel. Empty: this version ships none."""

from qkv.backends.result import Result
from qkv.problem import Problem

NAME = "native"


def why_not(problem: Problem) -> list[str]:
    return ["this version of qkv ships no compiled kernel"]


def why_rather_not(problem: Problem) -> list[str]:
    return []


def run(problem: Problem) -> Result:
    raise NotImplementedError(why_not(problem)[0])
