"""What the kernel needs of a decoder layer of transformers itself, remembered for as long as nothing of it changes."""

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn

from qkv.integrations.transformers.output_capturing import is_idle
from qkv.integrations.transformers.steps.attention_forms import Form as AttentionForm
from qkv.integrations.transformers.steps.attention_forms import form_of as form_of_attention
from qkv.integrations.transformers.steps.attention_step import Parts, numbers_of, parts_of, projections_of, weights_in
from qkv.integrations.transformers.steps.decoder_forms import Form, form_of
from qkv.integrations.transformers.steps.rotated_forward import RotatedForward
from qkv.layers.gated_forward import GatedForward, Mlp, mlp_of
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.normed_forward import Norm, NormedForward, norm_of
from qkv.layers.plain import are_called_plainly, is_called_plainly
from qkv.layers.step_call import Block
from qkv.layers.tree_state import ClassState, TreeState
from qkv.torch_internals import has_global_hooks


class Found(NamedTuple):
    """What the kernel needs of a decoder layer itself."""

    form: AttentionForm
    parts: Parts
    block: Block

    @property
    def block_tensors(self) -> list[Tensor]:
        """Those around the attention."""
        gains = [norm.gains for norm in self.block.norms if norm is not None and norm.gains is not None]
        return [*gains, *self.block.mlp.tensors]


def found_in(module: nn.Module) -> Found | None:
    """What the kernel needs of a decoder layer; None if it is not one that the kernel computes."""
    form = form_of(type(module).forward)
    if form is None or (module.training and (form.dropouts or getattr(module, "gradient_checkpointing", False))):
        return None
    block = _block_of(module, form)
    if block is None:
        return None
    attention: Any = module._modules["self_attn"]
    of_attention = form_of_attention(type(attention).forward)
    parts = None if of_attention is None else parts_of(attention, of_attention)
    return None if of_attention is None or not isinstance(parts, Parts) else Found(of_attention, parts, block)


def is_called_by(module: nn.Module, forward: type[InstanceForward]) -> bool:
    """Whether calling a module is calling its forward of this class, of ours, and nothing else."""
    own = module.__dict__.get("forward")
    if type(own) is not forward or own.own is not None or own.is_taken_back or not own.is_of(module):
        return False
    return are_called_plainly((module,), forward, is_idle)


def _block_of(module: nn.Module, form: Form) -> Block | None:
    """What a layer computes around its attention; None if that is not one call of the kernel for each part."""
    parts = module._modules
    if not module.__dict__.keys().isdisjoint(form.names):
        return None
    modules = [None if name is None else parts.get(name) for name in form.norms]
    attention, gated = parts.get("self_attn"), parts.get("mlp")
    given = [module for module, name in zip(modules, form.norms, strict=True) if name is not None]
    if not _are_taken({RotatedForward: [attention], GatedForward: [gated], NormedForward: given}):
        return None
    for name in form.dropouts:  # none, unless it is training
        dropout = parts.get(name)
        if type(dropout) is not nn.Dropout or dropout.training or not is_called_plainly(dropout):
            return None
    mlp = mlp_of(gated)  # type: ignore[arg-type]
    if isinstance(mlp, str):
        return None
    norms = [None if norm is None else norm_of(norm) for norm in modules]
    found = [norm for norm in norms if norm is not None]
    tensors = [norm.gains for norm in found if norm.gains is not None]
    if len(tensors) != len(given) or any(norm[1:] != found[0][1:] for norm in found):  # eps, and what gains do
        return None
    return Block(tuple(norms), mlp)


def _are_taken(parts: dict[type[InstanceForward], list[nn.Module | None]]) -> bool:
    """Whether modules are called plainly, by forwards of ours that have not been taken back."""
    modules: list[nn.Module] = []
    for forward, each in parts.items():
        for module in each:
            own = None if module is None else module.__dict__.get("forward")
            if module is None or type(own) is not forward or own.is_taken_back or not own.is_of(module):
                return False
            modules.append(module)
    return are_called_plainly(modules, RotatedForward, is_idle)


class _Known(NamedTuple):
    """What was found of a layer, without its tensors, and what the layer was then."""

    tree: TreeState
    classes: ClassState
    take: "itemgetter[Any]"
    """the `_parameters` among all parameters of the layer, after which comes None"""
    found: Found
    """without tensors"""


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()
_classes: WeakValueDictionary[frozenset[type], ClassState] = WeakValueDictionary()


def remembered(module: nn.Module, is_current: Callable[[ClassState], bool]) -> Found | None:
    """What `remember` was given for a layer, if neither the layer nor its class has changed since.

    Args:
        is_current: whether classes have not changed.
    """
    known = _known.get(module)
    if known is None or has_global_hooks() or not is_current(known.classes):
        return None
    parameters = known.tree.parameters()
    if parameters is None:
        return None
    found, attention = known.found, module._modules["self_attn"]
    if numbers_of(attention, found.form) != found.parts[-3:]:  # which may be computed
        return None
    return _with_parameters(found, attention, known.take((*parameters, None)))


def remember(module: nn.Module, found: Found | None) -> Found | None:
    """Keeps what was found in a layer, for `remembered`; returns it. Layers with hooks are asked each time."""
    _known.pop(module, None)
    if found is None or module._forward_hooks:
        return found
    tree = TreeState(module)
    parameters = tree.parameters()
    if parameters is None:
        return found
    places = {id(parameter): place for place, parameter in enumerate(parameters) if parameter is not None}
    taken = [len(parameters) if each is None else places[id(each)] for each in _parameters(module, found)]
    kinds = frozenset(tree.kinds)
    classes = _classes.get(kinds)
    if classes is None or not classes.is_current():
        _classes[kinds] = classes = ClassState(kinds)
    _known[module] = _Known(tree, classes, itemgetter(*taken), _without_tensors(found))
    return found


def _parameters(module: nn.Module, found: Found) -> Iterator[Tensor | None]:
    """The parameters in what was found, in the order in which `_with_parameters` takes them."""
    attention: Any = module._modules["self_attn"]
    parts, (norms, mlp) = found.parts, found.block
    for norm in (*(parts.norms or (None, None)), *norms):
        yield None if norm is None else norm.gains
    for projection in (mlp.gate, mlp.up, mlp.down):
        yield from projection or (None, None)
    yield parts.sinks
    for name in projections_of(found.form):
        linear = attention._modules[name]
        yield from (linear._parameters["weight"], linear._parameters["bias"])


def _with_parameters(found: Found, attention: Any, parameters: tuple[Any, ...]) -> Found | None:
    """What was found, with these parameters."""
    form, parts, (norms, mlp) = found
    q_gains, k_gains, a, b, c, d, gate, gate_bias, up, up_bias, down, down_bias, sinks, *projections = parameters
    weights = weights_in(attention, form, parts.head_dim, projections)
    if weights is None:
        return None
    heads = parts.norms
    if heads is not None:
        heads = heads[0]._replace(gains=q_gains), heads[1]._replace(gains=k_gains)
    norms = tuple([norm and Norm(gains, norm.eps, norm.gain) for norm, gains in zip(norms, (a, b, c, d), strict=True)])
    return Found(
        form,
        Parts(weights, heads, sinks, *parts[-3:]),
        Block(norms, Mlp((gate, gate_bias), mlp.up and (up, up_bias), (down, down_bias), mlp.activation)),
    )


def _without_tensors(found: Found) -> Found:
    form, parts, (norms, mlp) = found
    nothing: Any = (None, None)
    heads = parts.norms and (parts.norms[0]._replace(gains=None), parts.norms[1]._replace(gains=None))
    norms = tuple([norm and norm._replace(gains=None) for norm in norms])
    return Found(
        form,
        parts._replace(weights={}, norms=heads, sinks=None),
        Block(norms, Mlp(nothing, mlp.up and nothing, nothing, mlp.activation)),
    )
