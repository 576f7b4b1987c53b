"""Every public name says what it computes, of what shapes, what it raises, with an example and the source."""

import ast
import importlib
import inspect
import re
import textwrap
from typing import Any

import pytest

MODULES = (
    *("qkv", "qkv.analysis", "qkv.cache", "qkv.convert", "qkv.look", "qkv.parallel", "qkv.plots"),
    *("qkv.integrations.flash_attn", "qkv.integrations.torch", "qkv.integrations.transformers"),
)

SHAPE = re.compile(r"\((?:[A-Z]\w*|1|windows|pages|layers(?: \+ 1)?)(?:, [\w */+-]+)+,?\)|``\([^`()]*,[^`()]*\)``")
FORMULA = re.compile(r"``[^`]*(?: [=+*/@~-] |softmax\(|exp\(|sum\(|norm\(|min\()[^`]*``|::\n\n +.*[=+*/@]")
SECTIONS = {
    "formula": FORMULA,
    "shapes": SHAPE,
    "errors": re.compile(r"^ *(?:Raises|Errors):", flags=re.MULTILINE),
    "example": re.compile(r"^ *>>> ", flags=re.MULTILINE),
    "source": re.compile(r"^ *Source: ", flags=re.MULTILINE),
}

RESULTS = """analysis.Agreement analysis.CostlyToken analysis.LayerRecord analysis.Price analysis.PriceInterrupted
    analysis.Recording analysis.Saving analysis.Seen analysis.Seven analysis.Together analysis.Against
    convert.Alignment convert.CheckpointPlan convert.Divergence convert.HeadAgreement convert.Inspection
    convert.LayerAgreement look.BlockMap look.Distance look.Overview look.SinkShare look.TopKeys cache.Keys"""
"""What functions return: their fields are documented one by one."""
MORE_RESULTS = "analysis.Reach cache.Pages look.WindowCut"
"""Those that have a formula."""
DRAWINGS = """plots.agreement plots.block_map plots.cache plots.cut plots.groups plots.heads plots.mask plots.price
    plots.savings plots.svg plots.tokens"""
EXCEPTIONS, ARGUMENTS = (
    "BackendError convert.CheckpointError",
    "cache.Owner convert.KeySymmetry integrations.torch.AuxRequest",
)
ON_MODELS = "accelerate register report unregister integrations.transformers.latent"
CHECKPOINTS = """convert.agreement_by_layer convert.convert_checkpoint convert.convert_layer convert.convert_state_dict
    convert.group_heads convert.inspect_checkpoint convert.plan_checkpoint convert.plan_latent_checkpoint
    convert.prune_heads convert.prune_state_dict"""

WITHOUT: dict[str, dict[str, str]] = {
    "formula": {
        "results of functions, which have it": RESULTS,
        "no computation": f"{EXCEPTIONS} {ARGUMENTS} explain",
        "tokens are kept as they are": "CrossKVCache KVCache PagePool PagedKVCache",
        "draws what others have computed": DRAWINGS,
        "runs a model, whose layers have it": f"{ON_MODELS} unpad analysis.record analysis.seven",
        "of look.distance, look.sink_share and look.block_map": "look.overview",
        "of parallel.attention and merge, and layouts": """parallel.attention_with_lse parallel.explain parallel.merge
            parallel.Context parallel.over parallel.WHOLE""",
        "of convert.pool_heads, head_agreement and convert_to_latent": CHECKPOINTS,
    },
    "shapes": {
        "without tensors": f"{EXCEPTIONS} {ARGUMENTS} {ON_MODELS.removeprefix('accelerate ')}",
        "numbers, and results that have them": """analysis.Agreement analysis.CostlyToken analysis.PriceInterrupted
            analysis.Saving analysis.Seen analysis.Seven convert.CheckpointPlan convert.Divergence convert.Inspection
            look.Overview""",
        "those of attention": "explain parallel.explain",
        "styles and layouts of modules": "parallel.Context parallel.Heads parallel.over parallel.WHOLE",
        "those of checkpoints and layers": f"{CHECKPOINTS} convert.head_agreement convert.write_checkpoint",
        "draws what others have computed": f"{DRAWINGS} plots.reach",
    },
    "errors": {
        "results of functions, which raise": f"{RESULTS} analysis.Reach look.WindowCut convert.Projections",
        "an error itself": EXCEPTIONS,
        "nothing to be wrong about": f"{ARGUMENTS} cache.quantize parallel.WHOLE plots.svg",
    },
    "example": {
        "results of functions, which have one": f"{RESULTS} {MORE_RESULTS} convert.Projections",
        "raised, never made": EXCEPTIONS,
        "arguments, in the examples of functions": ARGUMENTS,
        "a base class": "cache.Cache",
        "a value of an argument": "parallel.WHOLE",
    },
    "source": {
        "results of functions, which have one": f"{RESULTS} {MORE_RESULTS} convert.Projections",
        "an error": EXCEPTIONS,
        "arguments": ARGUMENTS,
        "of qkv's own": f"""cache.Cache Caches CrossKVCache Int8KVCache KVCache QKVCache explain register report
            unregister analysis.losses analysis.price analysis.record analysis.seven look.block_map look.distance
            look.overview look.received look.top_keys parallel.explain parallel.over parallel.WHOLE
            {DRAWINGS.replace("plots.agreement ", "")}""",
        "that of parallel.attention": "parallel.attention_with_lse",
        "that of convert.pool_heads, or files": """convert.agreement_by_layer convert.convert_layer
            convert.convert_state_dict convert.group_heads convert.inspect_checkpoint convert.measure_divergence
            convert.plan_checkpoint convert.plan_latent_checkpoint convert.prune_state_dict convert.write_checkpoint""",
    },
}
"""By section, the reasons why names have none of it; names are those of MODULES, without `qkv.`."""


def _public() -> dict[str, Any]:
    """Each once, by its shortest name: those of `qkv` come first."""
    found: dict[int, tuple[str, Any]] = {}
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            thing = getattr(module, name)
            found.setdefault(id(thing), (f"{module.__name__}.{name}".removeprefix("qkv."), thing))
    return dict(found.values())


PUBLIC = _public()


def _text(thing: Any) -> str:
    """The docstring; of a class, those of its attributes and public methods as well, which stand on its page."""
    texts = [inspect.getdoc(thing) or ""]
    if not isinstance(thing, type):
        return texts[0]
    (defined,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(defined, ast.ClassDef)
    for node in defined.body:
        if isinstance(node, ast.FunctionDef):
            if not node.name.startswith("_") or node.name.startswith("__"):
                texts.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.append(node.value.value)
    return "\n\n".join(texts)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_public_name_has_the_section_or_a_reason(section: str) -> None:
    reasons = WITHOUT.get(section, {})
    names = {name for listed in reasons.values() for name in listed.split()}
    found = {name for name, thing in PUBLIC.items() if SECTIONS[section].search(_text(thing))}
    assert {*PUBLIC} - found - names == set(), f"without {section}"
    assert names & found == set() and names <= {*PUBLIC}, f"has {section}, or is no public name"
