"""Forwards of models of transformers whose loop over their layers hands all of them on at once.

Such a loop is ``for layer in self.layers: x = layer(x, ...)``, with arguments that are read and not computed. It is
found in the source of the forward, and a forward is compiled from that source in which ``x`` is what a function returns
for the layers and their arguments. The file, and other models, do not change.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import nn

Call = tuple[nn.Module, dict[str, Any]]
"""A layer, and its arguments after the first."""

Run = Callable[[Sequence[Call], Any], Any]
"""Takes the calls of a loop, and the first argument of the first one; returns what the last one returns."""

_RUN, _CALL, _CALLS = "_qkv_run", "_qkv_call", "_qkv_calls"
"""Names in the code of these forwards."""


@functools.lru_cache(maxsize=1024)
def with_layers_at_once(forward: Any, run: Run) -> FunctionType | None:
    """A forward that calls ``run`` instead of the layers of its only such loop; None if it has none."""
    inner = inspect.unwrap(forward) if isinstance(forward, FunctionType) else None
    if type(inner) is not FunctionType or inner.__closure__:
        return None
    function = _source_of(inner)
    loops = [] if function is None else [place for place, part in enumerate(function.body) if _is_loop(part)]
    if function is None or len(loops) != 1:
        return None
    function.body[loops[0] : loops[0] + 1] = _at_once(function.body[loops[0]])
    return _within_wrappers(forward, inner, _compiled(function, inner, run))


def _source_of(function: FunctionType) -> ast.FunctionDef | None:
    """The definition of a function, without decorators and annotations; None if its code is not of that source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    return definition if _does(_code_of(definition, function)) == _does(function.__code__) else None


def _code_of(definition: ast.FunctionDef, function: FunctionType, *free: str) -> CodeType:
    """The code of a definition in the file of a function, within one that has these names; neither is run."""
    file, names = function.__globals__, sorted(_names(definition) & function.__globals__.keys())
    # Compilers write calls of methods of what a file imports otherwise.
    imported = [name for name in names if getattr(file[name], "__module__", None) != file.get("__name__")]
    module = ast.parse("".join(f"import {name}\n" for name in imported) + f"def within({', '.join(free)}): ...")
    module.body[-1].body = [definition]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(module), function.__code__.co_filename, "exec", dont_inherit=True)
    for _ in range(2):
        code = next(each for each in code.co_consts if isinstance(each, CodeType))
    return code


def _does(code: CodeType) -> tuple[Any, ...]:
    """What a function does, wherever it stands."""
    constants = [_does(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, constants


def _constant(value: object) -> str:
    # Python 3.10 has the names of functions within one among its constants, and where they stand.
    return repr(value.rpartition("<locals>.")[2] if isinstance(value, str) else value)


def _is_loop(part: ast.stmt) -> bool:
    """Whether a statement is ``for layer in self.layers: x = layer(x, name=value, **names)``, or with ``enumerate``."""
    if not isinstance(part, ast.For) or part.orelse or len(part.body) != 1:
        return False
    layers, target = part.iter, part.target
    if isinstance(target, ast.Tuple) and len(target.elts) == 2 and isinstance(target.elts[0], ast.Name):
        if not (isinstance(layers, ast.Call) and _is_name(layers.func, "enumerate") and len(layers.args) == 1):
            return False
        if layers.keywords:
            return False
        layers, target = layers.args[0], target.elts[1]
    body = part.body[0]
    if not (isinstance(target, ast.Name) and isinstance(body, ast.Assign) and len(body.targets) == 1):
        return False
    x, call = body.targets[0], body.value
    if not (isinstance(x, ast.Name) and isinstance(call, ast.Call) and _is_name(call.func, target.id)):
        return False
    if len(call.args) != 1 or not _is_name(call.args[0], x.id) or x.id == target.id:
        return False
    values = [keyword.value for keyword in call.keywords]
    return _is_read(layers) and all(_is_read(value) and x.id not in _names(value) for value in values)


def _is_name(part: ast.AST, name: str) -> bool:
    return isinstance(part, ast.Name) and part.id == name


def _is_read(part: ast.expr) -> bool:
    """Whether an expression calls nothing: names, attributes, items and constants, one or another on a condition."""
    kinds = (ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.IfExp, ast.expr_context)
    return all(isinstance(each, kinds) for each in ast.walk(part))


def _names(part: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(part) if isinstance(each, ast.Name)}


def _at_once(loop: Any) -> list[ast.stmt]:
    """The statements in place of a loop: one that collects the calls, and one that makes them."""
    assign = loop.body[0]
    call = ast.Call(ast.Name(_CALL, ast.Load()), [assign.value.func], assign.value.keywords)
    append = ast.Call(ast.Attribute(ast.Name(_CALLS, ast.Load()), "append", ast.Load()), [call], [])
    given: list[ast.expr] = [ast.Name(_CALLS, ast.Load()), assign.value.args[0]]
    first = ast.Assign([ast.Name(_CALLS, ast.Store())], ast.List([], ast.Load()))
    last = ast.Assign(assign.targets, ast.Call(ast.Name(_RUN, ast.Load()), given, []))
    made = [first, ast.For(loop.target, loop.iter, [ast.Expr(append)], []), last]
    return [ast.copy_location(each, loop) for each in made]


def _call(layer: nn.Module, /, **arguments: Any) -> Call:
    return layer, arguments


def _compiled(definition: ast.FunctionDef, function: FunctionType, run: Run) -> FunctionType:
    """The function of a changed definition of another one, among the names of its file."""
    code = _code_of(definition, function, _RUN, _CALL)
    cells = tuple(CellType({_RUN: run, _CALL: _call}[name]) for name in code.co_freevars)
    changed = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    changed.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(changed, function)
    return changed


def _within_wrappers(forward: Any, inner: FunctionType, changed: FunctionType) -> FunctionType | None:
    """A forward with a function within its wrappers, which are transformers', replaced; None if others wrap it."""
    if forward is inner:
        return changed
    closure = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    names = [name for name, cell in closure.items() if _content(cell) is forward.__wrapped__]
    if len(names) != 1 or not forward.__globals__["__name__"].startswith("transformers."):
        return None
    within = _within_wrappers(forward.__wrapped__, inner, changed)
    if within is None:
        return None
    closure[names[0]] = CellType(within)
    copied = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, tuple(closure.values())
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, forward)
    return copied


def _content(cell: CellType) -> object:
    """What a variable of a wrapper refers to; None for one without a value."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
