"""`find_layers`: the layers of a model that decode from a cache."""

from torch import nn

from qkv.cache.base import Owner

_PREFIXES = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names under which torch's wrappers (compiled, FSDP, checkpointing) have the module that they wrap."""


def owner_of(layer: object) -> Owner | None:
    """The identity of a layer that makes caches; None for anything else.

    Such a layer has a method ``make_cache(capacity, dtype)`` and its `Owner` as ``_owner``. Wrappers, which pass
    attributes on, are not layers; nor are layers that read another one's cache.
    """
    owner = getattr(layer, "_owner", None) if callable(getattr(type(layer), "make_cache", None)) else None
    return owner if isinstance(owner, Owner) else None


def find_layers(model: nn.Module) -> tuple[dict[str, nn.Module], set[str]]:
    """The layers of a module tree that make caches, by name, without the names that wrappers add.

    Returns:
        the layers, and the names of those that occur several times; their name is that of the first place.
    """
    layers: dict[str, nn.Module] = {}
    names: dict[Owner, str] = {}
    shared = set()
    for path, module in model.named_modules(remove_duplicate=False):
        owner = owner_of(module)
        if owner is None:
            continue
        if owner in names:
            shared.add(names[owner])
            continue
        names[owner] = name = _name_of(model, path)
        layers[name] = module
    return layers, shared


def _name_of(model: nn.Module, path: str) -> str:
    """A path in the module tree without the names that wrappers add."""
    kept, module = [], model
    for part in path.split(".") if path else ():
        is_added = part in _PREFIXES or (part == "module" and isinstance(module, _DATA_PARALLEL))
        kept += [] if is_added else [part]
        module = module.get_submodule(part)
    return ".".join(kept)


_DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
