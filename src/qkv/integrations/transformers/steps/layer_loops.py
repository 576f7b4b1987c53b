"""Forwards of models of transformers whose loop over their layers hands all of them on at once.

Such a loop is ``for layer in self.layers[:n]: x = layer(x, ...)``, with arguments that are read and not computed. It is
found in the source of the forward, and a forward is compiled from that source in which ``x`` is what a function returns
for the layers and their arguments. The file, and other models, do not change.
"""

import ast
import functools
import inspect
import tokenize
import warnings
from collections.abc import Callable, Sequence
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

Call = tuple[nn.Module, dict[str, Any]]
"""A layer, and its arguments after the first."""

Run = Callable[[Sequence[Call], Any, Any], Any]
"""Takes the calls of a loop, the first argument of the first one, and the module whose forward has the loop; returns
what the last one returns."""

_RUN, _CALL, _CALLS, _IS_LIST = "_qkv_run", "_qkv_call", "_qkv_calls", "_qkv_is_list"
"""Names in the code of these forwards."""


def with_layers_at_once(forward: Any, run: Run) -> FunctionType | None:
    """A forward that calls ``run`` instead of the layers of its only such loop; None if it has none."""
    inner = inspect.unwrap(forward) if isinstance(forward, FunctionType) else None
    if type(inner) is not FunctionType or inner.__closure__:
        return None
    return _with_layers_at_once(forward, inner, inner.__code__, run)


def code_of(forward: Any) -> CodeType | None:
    """The code within the wrappers of a forward, which notebooks replace where they reload a file."""
    return getattr(inspect.unwrap(forward), "__code__", None) if isinstance(forward, FunctionType) else None


@functools.lru_cache(maxsize=1024)
def _with_layers_at_once(forward: Any, inner: FunctionType, code: CodeType, run: Run) -> FunctionType | None:
    """As above, of a function with this code, which notebooks replace where they reload a file."""
    with warnings.catch_warnings():  # of what is compiled, which Python has given before
        warnings.simplefilter("ignore")
        function = _source_of(inner)
        loops = [] if function is None else [place for place, part in enumerate(function.body) if _is_loop(part, code)]
        if function is None or len(loops) != 1 or not function.args.args:
            return None
        function.body[loops[0]] = _at_once(function.body[loops[0]], function.args.args[0].arg)
        return _within_wrappers(forward, inner, _compiled(function, inner, run))


def _source_of(function: FunctionType) -> ast.FunctionDef | None:
    """The definition of a function, without decorators and annotations; None if its code is not of that source."""
    try:
        lines, first = inspect.getsourcelines(function)
        block = ["if True:\n"] if lines[0][:1].isspace() else []
        tree = ast.parse("".join(block + lines))
    except (OSError, TypeError, SyntaxError, ValueError, tokenize.TokenError):  # a file that has been edited since
        return None
    definition = next((part for part in ast.walk(tree) if isinstance(part, ast.FunctionDef)), None)
    if definition is None:
        return None
    definition.decorator_list, definition.returns = [], None
    arguments = definition.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    ast.increment_lineno(tree, first - 1 - len(block))
    return definition if _does(_code_of(definition, function)) == _does(function.__code__) else None


def _code_of(definition: ast.FunctionDef, function: FunctionType, *free: str) -> CodeType:
    """The code of a definition in the file of a function, within one that has these names; neither is run."""
    file, names = function.__globals__, sorted(_names(definition) & function.__globals__.keys())
    # Compilers write calls of methods of what a file imports otherwise.
    imported = [name for name in names if _is_imported(file[name], file)]
    module = ast.parse("".join(f"import {name}\n" for name in imported) + f"def within({', '.join(free)}): ...")
    module.body[-1].body = [definition]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(module), function.__code__.co_filename, "exec", dont_inherit=True)
    for _ in range(2):
        code = next(each for each in code.co_consts if isinstance(each, CodeType))
    return code


def _is_imported(value: object, file: dict[str, Any]) -> bool:
    """Whether a file has a value from another; instances, such as loggers, are taken for its own."""
    is_named = isinstance(value, ModuleType | type | FunctionType)
    return is_named and getattr(value, "__module__", None) != file.get("__name__")


def _does(code: CodeType) -> tuple[Any, ...]:
    """What a function does, wherever it stands."""
    constants = [_does(each) if isinstance(each, CodeType) else _constant(each) for each in code.co_consts]
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    takes_any = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_code, getattr(code, "co_exceptiontable", b""), constants, names, counts, takes_any


def _constant(value: object) -> str:
    # Python 3.10 has the names of functions within one among its constants, and where they stand.
    return repr(value.rpartition("<locals>.")[2] if isinstance(value, str) else value)


def _is_loop(part: ast.stmt, code: CodeType) -> bool:
    """Whether a statement is ``for layer in self.layers[:n]: x = layer(x, name=value, **names)``, or with
    ``enumerate``; nobody else sees its variables.
    """
    if not isinstance(part, ast.For) or part.orelse or len(part.body) != 1:
        return False
    layers, body = _layers(part), part.body[0]
    if not (isinstance(layers, ast.Subscript) and isinstance(layers.slice, ast.Slice) and _is_read(layers)):
        return False  # a slice is a list of its own, in which calls replace nothing
    if not (isinstance(body, ast.Assign) and len(body.targets) == 1 and isinstance(body.value, ast.Call)):
        return False
    call, is_numbered = body.value, layers is not part.iter
    targets = part.target.elts if isinstance(part.target, ast.Tuple) and is_numbered else [part.target]
    names = [each.id for each in (*targets, body.targets[0]) if isinstance(each, ast.Name)]
    if len(names) != (3 if is_numbered else 2) or names[-1] in names[:-1] or not _are_variables(names, code):
        return False
    *_, layer, x = names
    if not _is_name(call.func, layer) or len(call.args) != 1 or not _is_name(call.args[0], x):
        return False
    values = [keyword.value for keyword in call.keywords]
    return all(_is_read(value) and x not in _names(value) for value in values)


def _layers(loop: ast.For) -> ast.expr:
    """The layers of a loop, within ``enumerate`` or not."""
    of = loop.iter
    is_numbered = isinstance(of, ast.Call) and _is_name(of.func, "enumerate") and len(of.args) == 1 and not of.keywords
    return of.args[0] if is_numbered else of  # type: ignore[attr-defined]


def _are_variables(names: list[str], code: CodeType) -> bool:
    """Whether names are variables of a function that no function within it reads."""
    return not set(names) - set(code.co_varnames) and set(names).isdisjoint(code.co_cellvars)


def _is_name(part: ast.AST, name: str) -> bool:
    return isinstance(part, ast.Name) and part.id == name


def _is_read(part: ast.expr) -> bool:
    """Whether an expression calls nothing: names, attributes, items and constants, one or another on a condition."""
    kinds = (ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.IfExp, ast.expr_context)
    return all(isinstance(each, kinds) for each in ast.walk(part))


def _names(part: ast.AST) -> set[str]:
    return {each.id for each in ast.walk(part) if isinstance(each, ast.Name)}


def _at_once(loop: Any, owner: str) -> ast.stmt:
    """The statement in place of a loop of a method of ``owner``: over a list of modules, collect the calls, then make
    them.
    """
    assign = loop.body[0]
    call = ast.Call(ast.Name(_CALL, ast.Load()), [assign.value.func], assign.value.keywords)
    append = ast.Call(ast.Attribute(ast.Name(_CALLS, ast.Load()), "append", ast.Load()), [call], [])
    given = [ast.Name(_CALLS, ast.Load()), assign.value.args[0], ast.Name(owner, ast.Load())]
    run = ast.Call(ast.Name(_RUN, ast.Load()), given, [])
    made = [
        ast.copy_location(ast.Assign([ast.Name(_CALLS, ast.Store())], ast.List([], ast.Load())), loop),
        ast.copy_location(ast.For(loop.target, loop.iter, [_at(assign, ast.Expr, append)], []), loop),
        _at(assign, functools.partial(ast.Assign, assign.targets), run),
    ]
    is_list = ast.Call(ast.Name(_IS_LIST, ast.Load()), [_layers(loop).value], [])  # type: ignore[attr-defined]
    return ast.copy_location(ast.If(is_list, made, [loop]), loop)


def _at(assign: ast.Assign, statement: Callable[[ast.expr], ast.stmt], call: ast.expr) -> ast.stmt:
    """A statement of a call, which tracebacks show in the place of an assignment of another."""
    return ast.copy_location(statement(ast.copy_location(call, assign.value)), assign)


def _call(layer: nn.Module, /, **arguments: Any) -> Call:
    return layer, arguments


def _is_list(layers: object) -> bool:
    """Whether going through layers does nothing else; lists of other kinds may load each when its turn comes."""
    return type(layers) is nn.ModuleList


def _compiled(definition: ast.FunctionDef, function: FunctionType, run: Run) -> FunctionType:
    """The function of a changed definition of another one, among the names of its file."""
    values = {_RUN: run, _CALL: _call, _IS_LIST: _is_list}
    code = _code_of(definition, function, *values)
    cells = tuple(CellType(values[name]) for name in code.co_freevars)
    changed = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, cells)
    changed.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(changed, function)
    return changed


def _within_wrappers(forward: Any, inner: FunctionType, changed: FunctionType) -> FunctionType | None:
    """A forward with a function within its wrappers, which are transformers', replaced; None if others wrap it."""
    if forward is inner:
        return changed
    is_function: bool = type(forward) is FunctionType
    if not is_function:
        return None
    closure = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    names = [name for name, cell in closure.items() if _content(cell) is forward.__wrapped__]
    if len(names) != 1 or not str(forward.__globals__.get("__name__")).startswith("transformers."):
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
