"""No machine meets an instruction that it lacks: what the compiled kernel consists of, read from its machine code."""

import bisect
import platform
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from qkv.kernels import LIBRARY

ON_ARM = platform.machine() in ("aarch64", "arm64")
known_architecture = pytest.mark.skipif(
    not ON_ARM and platform.machine() not in ("x86_64", "AMD64"), reason="the kernel is of another architecture"
)

ISAS = Path(__file__).parents[2] / "native/src/abi/isas.def"
LEVELS = re.findall(rf"^ISA_(?:{'ARM' if ON_ARM else 'X86|NOT_ARM'})\((\w+),", ISAS.read_text(), re.MULTILINE)
"""Instruction sets, each of which includes those before."""

MANGLED = {name: re.compile(f"(3qkv|NS_){len(name)}{name}") for name in LEVELS}
"""Their namespaces in symbols, where NS_ stands for qkv if that was named before."""

BASELINE = re.compile(rb"(?:[\x66\xf2\xf3][\x40-\x4f]?)*\x0f(?:[\x38\x3a]|\xb8)", re.DOTALL)
"""Legacy encodings that x86-64 did not begin with: SSSE3, SSE4 and popcnt."""


class Function(NamedTuple):
    start: int
    name: str
    level: int


def output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def own_level(name: str) -> int | None:
    return next((LEVELS.index(level) for level, mangled in MANGLED.items() if mangled.search(name)), None)


def functions(library: Path) -> list[Function]:
    """All functions by address, with the level that they may use.

    That is the level of the namespace in their names; for a local function without one, such as a clone of a standard
    one, the level of the object file that it came from; and the baseline for all that is shared.
    """
    found: list[Function] = []
    units: list[list[tuple[int, str, bool]]] = [[]]
    file = ""
    for line in output("objdump", "--syms", "--wide", library).splitlines():
        match = re.match(r"([0-9a-f]{16}) (.{7}) (\S+)\t[0-9a-f]+ +(?:\.hidden )?(\S*)$", line)
        if not match:
            continue
        address, flags, section, name = match.groups()
        if flags.endswith("df"):
            file = name  # of the local symbols that follow; none for those that the linker made local
            units.append([])
        elif flags.endswith("F") and section.startswith("."):
            units[-1].append((int(address, 16), name, flags[0] == "l" and file != ""))
    for unit in units:
        levels = {own_level(name) for _, name, _ in unit} - {None}
        for address, name, is_local in unit:
            level = own_level(name)
            if level is None:
                runs_on_loading = name.startswith("_GLOBAL_")
                level = max(levels) if is_local and len(levels) == 1 and not runs_on_loading else 0
            found.append(Function(address, name, level))
    return sorted(found)


BEYOND_NEON = re.compile(
    r"(bf(dot|mmla|mlal|cvt)|[us]+dot|[us]+mmla|f(mlal|mlsl|cadd|cmla)|sqrdml[as]h|(cas|swp|ld(add|set|clr|eor|[us]m)))"
)
"""How mnemonics begin that ARMv8.0 lacks: those that neonbf16 is for, and what else its flags allow."""
BEYOND_NEONBF16 = re.compile(r"[us]+mmla|bfmmla|.*\bz[0-9]+\.[bhsd]|f(mlal|mlsl|cadd|cmla)")
"""The same for instructions that it lacks, among them all of SVE."""


def needed_level_on_arm(text: str) -> int:
    """The least level that has an instruction of aarch64."""
    if BEYOND_NEONBF16.match(text):
        return len(LEVELS)
    return LEVELS.index("neonbf16") if BEYOND_NEON.match(text) else 0


def needed_level(code: str, text: str) -> int:
    """The least level that has an instruction, from its encoding in hexadecimal."""
    if ON_ARM:
        return needed_level_on_arm(text)
    if not code.startswith(("62", "c4", "c5")):  # neither EVEX nor VEX
        return len(LEVELS) if "0f" in code and BASELINE.match(bytes.fromhex(code)) else 0
    mnemonic = text.split()[0]
    if "%tmm" in text or mnemonic in ("ldtilecfg", "sttilecfg", "tilerelease"):
        return LEVELS.index("amx")
    if "bf16" in mnemonic or mnemonic.startswith("vpdp"):
        return LEVELS.index("avx512bf16")
    if code.startswith("62") or re.search(r"%k[0-7]", text):  # EVEX, or a mask
        return LEVELS.index("avx512")
    return LEVELS.index("avx2") if mnemonic.startswith("v") else len(LEVELS)  # BMI, which belongs to no level


@known_architecture
def test_no_function_contains_an_instruction_beyond_its_level() -> None:
    known = functions(LIBRARY)
    assert any(function.level for function in known), "the kernel has lost its symbols"
    starts = [function.start for function in known]
    function = known[0]
    seen, wrong = [0] * len(LEVELS), set()
    listing = output("objdump", "--disassemble", "--wide", "--section=.text", LIBRARY)
    for line in listing.splitlines():
        if line.endswith(">:"):  # a symbol, and where it begins
            function = known[bisect.bisect(starts, int(line.split()[0], 16)) - 1]
            continue
        _, code, text = (line + "\t\t").split("\t")[:3]
        if not text:
            continue
        needed = needed_level(code, text)
        seen[min(needed, len(LEVELS) - 1)] += 1
        # Atomic operations of GCC's own library ask the processor first.
        if needed > function.level and not function.name.startswith("__aarch64_"):
            wrong.add(f"{function.name}: {text.strip()}")
    assert not wrong
    assert all(seen), "instructions of every level were expected"


def test_the_library_exports_its_own_functions_alone() -> None:
    exported = {line.split()[-1] for line in output("nm", "--dynamic", "--defined-only", LIBRARY).splitlines()}
    assert exported == {
        "qkv_append",
        "qkv_gated_mlp",
        "qkv_block_numbers_size",
        "qkv_block_size",
        "qkv_compiler",
        "qkv_decoder_layers",
        "qkv_step_numbers_size",
        "qkv_fast_gated_mlp",
        "qkv_rms_norm",
        "qkv_fast_rms_norm",
        "qkv_append_pages",
        "qkv_isa",
        "qkv_interpreter_size",
        "qkv_fast_forward",
        "qkv_fast_rotate",
        "qkv_rotate",
        "qkv_rotation_size",
        "qkv_fast_project",
        "qkv_layer_step",
        "qkv_layer_step_size",
        "qkv_methods",
        "qkv_project",
        "qkv_projection_size",
        "qkv_quantize",
        "qkv_quantization_size",
        "qkv_problem_size",
        "qkv_gradients_size",
        "qkv_forward",
        "qkv_backward",
        "qkv_sequences_size",
        "qkv_forward_sequences",
        "qkv_backward_sequences",
        "qkv_count_scores",
        "qkv_supported_isas",
        "qkv_use_threads_of",
    }
