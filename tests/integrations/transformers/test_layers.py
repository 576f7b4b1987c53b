"""`from_transformers` against the outputs of each family's own attention modules, as they run in its model."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qkv
from qkv import Mask

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {**SIZES, **HEADS, "intermediate_size": 16, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
BERT = {**NEOX, "hidden_dropout_prob": 0.0}
EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
BART: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "max_position_embeddings": 64,
    **{
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in [("attention_heads", 4), ("ffn_dim", 8)]
    },
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {"vocab_size": 40, "d_model": 32, "d_ff": 8, "num_layers": 2, "d_kv": 6, "num_heads": 4, "pad_token_id": 0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 16

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, biases": ("llama", {**LLAMA, "attention_bias": True, "head_dim": 6, "attention_dropout": 0.25}),
    "llama, llama3": ("llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {**LLAMA, "rope_parameters": YARN}),
    "llama, dynamic": ("llama", {**LLAMA, "rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "phi, yarn": ("phi", {**LLAMA, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
    "llama, linear": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 5}),
    "mistral, no window": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 12, "rms_norm_eps": 0.1}),
    "qwen3_next": (
        "qwen3_next",
        {
            **LLAMA,
            **EXPERTS,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 2,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "gemma": ("gemma", {**LLAMA, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {"attn_implementation": "eager", **LLAMA, "head_dim": 16, "sliding_window": 5, "attn_logit_softcapping": 1.5},
    ),
    "gemma3_text": (
        "gemma3_text",
        {**LLAMA, "head_dim": 16, "sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9},
    ),
    "gemma3_text, both ways": (
        "gemma3_text",
        {**LLAMA, "sliding_window": 6, "sliding_window_pattern": 2, "use_bidirectional_attention": True, "head_dim": 8},
    ),
    "phi3": ("phi3", {**LLAMA, "sliding_window": 5}),
    "phi": ("phi", {**LLAMA, "partial_rotary_factor": 0.5}),
    "granite": ("granite", {**LLAMA, "attention_multiplier": 0.3}),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {**LLAMA, "sliding_window": 5}),
    "gpt_oss": ("gpt_oss", {**LLAMA, **EXPERTS, "head_dim": 8, "sliding_window": 5}),
    "gpt2": ("gpt2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "gpt2, no scale": ("gpt2", {**GPT2, "scale_attn_weights": False}),
    "gpt_bigcode": ("gpt_bigcode", {**GPT2, "multi_query": True}),
    "gpt_bigcode, multi-head": ("gpt_bigcode", {**GPT2, "multi_query": False}),
    "gpt_neox": ("gpt_neox", {**NEOX, "rotary_pct": 0.5}),
    "falcon, groups": ("falcon", {**NEOX, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon, multi-query": ("falcon", {**NEOX, "multi_query": True, "new_decoder_architecture": False}),
    "falcon, multi-head": (
        "falcon",
        {**NEOX, "multi_query": False, "new_decoder_architecture": False, "alibi": True, "attention_dropout": 0.25},
    ),
    "mpt": ("mpt", {"vocab_size": 40, "d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}),
    "opt": ("opt", {**NEOX, "ffn_dim": 16, "word_embed_proj_dim": 32, "enable_bias": True}),
    "bert": ("bert", BERT),
    "bert, a decoder": ("bert", {**BERT, "is_decoder": True}),
    "bart": ("bart", BART),
    "mbart": ("mbart", BART),
    "pegasus": ("pegasus", BART),
    "marian": ("marian", BART),
    "t5": ("t5", T5),
    "mt5": ("mt5", T5),
}
IDS = torch.tensor([[3, 9, 27, 11, 33, 19, 17, 5, 30, 6, 7, 1]])


def build(family: str, options: dict[str, Any]) -> Any:
    """A random model whose attention is far from uniform, and whose norms, biases and sinks are all in use."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(7)
    model = AutoModel.from_config(AutoConfig.for_model(family, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model


class Call:
    """A call of an attention module: its input, the sequence of its keys if it is another, and its output."""

    def __init__(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self.name, self.module = name, module
        self.x = args[0] if args else kwargs["hidden_states"]
        self.context = kwargs.get("key_value_states", kwargs.get("encoder_hidden_states"))
        self.want = output[0] if isinstance(output, tuple) else output


def calls_of(model: Any, suffix: str = "Attention") -> list[Call]:
    """The calls of a model's attention modules in one forward pass."""
    calls: list[Call] = []

    def record(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: calls.append(Call(name, module, args, kwargs, output))

    for name, module in model.named_modules():
        if type(module).__name__.endswith(suffix) and not re.search("Self|Layer", type(module).__name__):
            module.register_forward_hook(record(name), with_kwargs=True)
    inputs = {"decoder_input_ids": IDS[:, :7]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(IDS, use_cache=False, **inputs)
    assert calls
    return calls


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_a_layer_equals_the_module_in_its_model(name: str) -> None:
    family, options = CONFIGURATIONS[name]
    bias: Any = None
    for call in calls_of(build(family, options)):
        options = {}
        make = qkv.Attention if call.context is None else qkv.CrossAttention
        if "t5" in family and call.context is None:
            options = {} if "block.0." in call.name else {"position_bias": bias}
        layer = make.from_transformers(call.module, **options)
        bias = layer.position_bias if layer.position_bias is not None else bias
        got = layer(call.x) if call.context is None else layer(call.x, call.context)
        if family == "bert":  # its module adds the input, and normalises
            got = call.module.output.LayerNorm(got + call.x)
        torch.testing.assert_close(got, call.want, msg=lambda text, call=call: f"{call.name}: {text}")


def module_of(name: str, **changes: Any) -> Any:
    """The first attention module of a model."""
    family, options = CONFIGURATIONS[name]
    model = build(family, {**options, **changes})
    return next(module for module in model.modules() if re.search("[a-z0-9X]Attention$", type(module).__name__))


@pytest.mark.parametrize("name", ["gpt2", "bert, a decoder"])
@pytest.mark.filterwarnings("ignore")
def test_cross_attention_of_a_decoder_that_has_both(name: str) -> None:
    model = build(CONFIGURATIONS[name][0], {**CONFIGURATIONS[name][1], "add_cross_attention": True})
    modules = [module for module in model.modules() if getattr(module, "is_cross_attention", False)]
    module = next(module for module in modules if hasattr(module, "output") or name == "gpt2")
    x, context = torch.randn(2, 3, 32), torch.randn(2, 7, 32)
    want = module(x, encoder_hidden_states=context)[0]
    layer = qkv.Attention.from_transformers(module)
    assert layer.context_dim == 32
    got = layer(x, context)
    torch.testing.assert_close(module.output.LayerNorm(got + x) if name != "gpt2" else got, want)


@pytest.mark.filterwarnings("ignore")
def test_options_of_the_module_become_those_of_the_layer() -> None:
    biased = qkv.Attention.from_transformers(module_of("llama, biases"))
    assert (biased.dropout, biased.head_dim, biased.training) == (0.25, 6, False)
    assert biased.q_proj.bias is not None and biased.out_proj.bias is not None
    qwen = qkv.Attention.from_transformers(module_of("qwen2").train().to(torch.bfloat16))
    assert (qwen.training, qwen.q_proj.weight.dtype) == (True, torch.bfloat16)
    assert qwen.q_proj.bias is not None and qwen.out_proj.bias is None and qwen.scale is None
    assert qkv.Attention.from_transformers(module_of("qwen3")).qk_norm_eps == 0.1
    assert qkv.Attention.from_transformers(module_of("mistral")).mask == Mask.causal(window=5)
    assert qkv.Attention.from_transformers(module_of("bert")).mask == Mask.full()
    assert qkv.Attention.from_transformers(module_of("bert")).dropout == 0.1
    assert qkv.Attention.from_transformers(module_of("falcon, multi-head")).dropout == 0.25
    assert qkv.Attention.from_transformers(module_of("falcon, groups", attention_dropout=0.25)).dropout == 0.0
    assert qkv.Attention.from_transformers(module_of("gpt_oss")).sink_logits is not None
    assert qkv.Attention.from_transformers(module_of("qwen3_next")).options()["gate"]


@pytest.mark.filterwarnings("ignore")
def test_options_given_take_the_place_of_the_modules() -> None:
    module = module_of("llama")
    layer = qkv.CausalAttention.from_transformers(module, rotary=None, backend="reference", dropout=0.5)
    assert (layer.rotary, layer.backend, layer.dropout) == (None, "reference", 0.5)
    assert type(layer) is qkv.CausalAttention and layer.mask == Mask.causal()
    assert qkv.SlidingWindowAttention.from_transformers(module, window=4, causal=True).mask == Mask.causal(4)
    assert qkv.GroupedQueryAttention.from_transformers(module).num_kv_heads == 2
    assert qkv.MultiHeadAttention.from_transformers(module_of("gpt2")).num_kv_heads == 4
    assert qkv.MultiQueryAttention.from_transformers(module_of("gpt_bigcode")).num_kv_heads == 1


@pytest.mark.filterwarnings("ignore")
def test_weights_are_copies_and_decoding_continues_the_sequence() -> None:
    model = build(*CONFIGURATIONS["llama, llama3"])
    call = calls_of(model)[0]
    layer = qkv.Attention.from_transformers(call.module)
    pointers = {parameter.data_ptr() for parameter in call.module.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in layer.parameters()}
    cache = qkv.KVCache()
    with torch.no_grad():
        steps = torch.cat([layer(part, cache=cache) for part in call.x.split([5, 1, 6], dim=1)], dim=1)
    torch.testing.assert_close(steps, call.want)


REFUSED: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    (
        "another class",
        lambda: nn.Linear(2, 2),
        TypeError,
        r"must be a LlamaAttention, .* of transformers; got Linear\.",
    ),
    ("torch's", lambda: nn.MultiheadAttention(8, 2), TypeError, r"of transformers; got MultiheadAttention\."),
    ("LayerNorm", lambda: module_of("phi", qk_layernorm=True), ValueError, "qk_layernorm must be off, .* no LayerNorm"),
    ("wrapped", lambda: wrapped(module_of("llama")), TypeError, r"k_proj of the module must be an nn\.Linear; got Seq"),
]


@pytest.mark.filterwarnings("ignore")
def test_t5_after_the_first_layer_needs_its_position_bias() -> None:
    calls = [call for call in calls_of(build(*CONFIGURATIONS["t5"])) if call.context is None]
    first = qkv.Attention.from_transformers(calls[0].module)
    with pytest.raises(ValueError, match=r"position_bias must be given .*; got a T5Attention without\. Pass the pos"):
        qkv.Attention.from_transformers(calls[1].module)
    with pytest.raises(TypeError, match="position_bias must be a module"):
        qkv.Attention.from_transformers(calls[1].module, position_bias=True)  # type: ignore[arg-type]
    second = qkv.Attention.from_transformers(calls[1].module, position_bias=first.position_bias)
    assert second.position_bias is first.position_bias and second.scale == 1.0
    assert qkv.Attention.from_transformers(calls[1].module, position_bias=None).position_bias is None
    table = calls[0].module.relative_attention_bias.weight
    assert first.position_bias.relative_attention_bias.weight.data_ptr() != table.data_ptr()  # type: ignore[union-attr]


def wrapped(module: Any) -> Any:
    module.k_proj = nn.Sequential(module.k_proj)
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
@pytest.mark.filterwarnings("ignore")
def test_what_layers_do_not_have_is_refused_by_name(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^from_transformers: .*{message}"):
        qkv.Attention.from_transformers(make())


@pytest.mark.filterwarnings("ignore")
def test_other_numbers_of_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 query heads on 2 KV heads; got a MultiHeadAttention with 4 on 4\."):
        qkv.MultiHeadAttention.from_transformers(module_of("llama"))
    with pytest.raises(
        ValueError, match=r"on 2 KV heads; got a MultiQueryAttention with 4 on 1\. Convert an Attention"
    ):
        qkv.MultiQueryAttention.from_transformers(module_of("llama"))


@pytest.mark.filterwarnings("ignore")
def test_a_packed_state_dict_of_phi3_loads_as_it_is() -> None:
    call = calls_of(build(*CONFIGURATIONS["phi3"]))[0]
    options = qkv.Attention.from_transformers(call.module).options()
    layer = qkv.Attention(**options)
    layer.load_state_dict(call.module.state_dict())
    torch.testing.assert_close(layer(call.x), call.want)
