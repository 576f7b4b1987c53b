"""`record`: its numbers, compared with those of weights that eager attention writes out; and a model left as it was."""

import copy
import re
from typing import Any

import pytest
import torch
import transformers
from families.small import HEADS, MODELS, SIZES, build, decoder
from torch import Tensor, nn

import qkv
from qkv import Mask
from qkv.analysis.recording import Recording, record
from qkv.analysis.words import what_layers_see

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers' own making

IDS = torch.randint(3, 96, (2, 23), generator=torch.Generator().manual_seed(0))
KEEP = torch.ones_like(IDS)
KEEP[1, :6] = 0
WINDOWS, SINKS = (4, 9), 2


def weights_of(model: Any, **inputs: Any) -> list[Tensor]:
    """As eager attention writes them out, in the order of its calls."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, use_cache=False)
    if "encoder_attentions" not in out:
        return list(out.attentions)
    both = zip(out.decoder_attentions, out.cross_attentions, strict=True)
    return [*out.encoder_attentions, *(weights for pair in both for weights in pair)]


def inputs_of(name: str, keep: Tensor | None = None) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": IDS}
    if keep is not None:
        given["attention_mask"] = keep
    return {**given, "decoder_input_ids": IDS[:, :17]} if name == "bart" else given


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_weights_of_eager(name: str, padded: bool) -> None:
    model, inputs = build(name), inputs_of(name, KEEP if padded else None)
    found = record(model, windows=WINDOWS, sink_tokens=SINKS, blocks=5, **inputs)
    expected = weights_of(model, **inputs)
    assert len(found.layers) == len(expected)
    for layer, eager in zip(found.layers, expected, strict=True):
        p, lq, lk = eager.double(), *eager.shape[2:]
        tokens = torch.ones(2, lq, dtype=torch.bool) if layer.is_token is None else layer.is_token
        assert torch.equal(tokens, KEEP.bool()) if padded and lq == lk == 23 else tokens.all()
        i, j = torch.arange(lq)[:, None], torch.arange(lk)
        sees_later = bool((p[:, :, 0, 1:] > 0).any())
        assert layer.is_cross == (lq != lk)
        for n, window in enumerate(WINDOWS if lq == lk else ()):
            hidden = ((i - j >= window) | (sees_later & (j - i >= window))) & (j >= SINKS)
            check(layer.cut.mass[n], (p * hidden).sum(-1), tokens)
        assert layer.cut.mass.shape[0] == (2 if lq == lk else 0)
        total = p.sum(-1)
        entropy = torch.special.entr(p / total[..., None]).sum(-1)
        check(layer.keys_in_effect, entropy.exp(), tokens)
        check(layer.distance.mean, (p * (i - j)).sum(-1) / total, tokens)
        check(layer.sinks.first, p[..., :SINKS].sum(-1), tokens)
        check(layer.sinks.learned, 1 - total, tokens)
        if not padded:
            of_queries, of_keys = (torch.arange(n) * 5 // n for n in (lq, lk))
            means = [[p[:, :, of_queries == a][..., of_keys == b].sum(-1).mean(-1) for b in range(5)] for a in range(5)]
            for a in range(5):
                for b in range(5):
                    torch.testing.assert_close(layer.map.mean[:, :, a, b].double(), means[a][b], rtol=1e-4, atol=1e-5)


def check(got: Tensor, want: Tensor, tokens: Tensor) -> None:
    keep = tokens[:, None].expand(got.shape)
    torch.testing.assert_close(got.double()[keep], want[keep], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bart"])
def test_heaviest_keys_of_chosen_queries_are_those_of_eager(name: str) -> None:
    model, inputs = build(name), inputs_of(name)
    places = (20, 3, -1, 3)
    found, expected = record(model, queries=places, **inputs), weights_of(model, **inputs)
    for layer, eager in zip(found.layers, expected, strict=True):
        lq = eager.shape[2]
        assert layer.queries == ((20, 3, 22) if lq == 23 else (3, 16)) and layer.top is not None
        rows, keys = eager[:, :, list(layer.queries)].double(), layer.top.keys
        counts = (keys >= 0).sum(-1)
        of_found = rows.gather(3, keys.clamp(min=0)) * (keys >= 0)
        torch.testing.assert_close(layer.top.weights.double(), of_found, rtol=1e-3, atol=1e-5)
        heaviest = rows.sort(dim=-1, descending=True).values
        total = (heaviest * (torch.arange(rows.shape[3]) < counts[..., None])).sum(-1)
        torch.testing.assert_close(layer.top.covered.double(), total, rtol=1e-3, atol=1e-5)
        seen = (rows > 0).sum(-1)
        assert ((total >= 0.9 - 1e-5) | (counts == seen)).all()
    assert all(layer.top is None and layer.queries == () for layer in record(model, **inputs).layers)


def test_masks_are_those_in_effect() -> None:
    """Whatever a configuration says: Qwen2 has two switches that leave a window out."""
    assert [layer.window for layer in record(build("mistral"), IDS).layers] == [7, 7]
    assert [layer.window for layer in record(build("gemma2"), IDS).layers] == [7, None]
    options = {"sliding_window": 7, "max_window_layers": 1}
    for uses, want in ((False, [None, None]), (True, [None, 7])):
        model = decoder("qwen2", use_sliding_window=uses, **options)().eval()
        assert [layer.window for layer in record(model, IDS).layers] == want
    layers = record(build("bart"), **inputs_of("bart")).layers
    assert [layer.is_cross for layer in layers] == [False, False, False, True, False, True]
    assert layers[2].mask == Mask.causal()
    assert layers[0].name == "encoder.layers.0.self_attn" and layers[3].name == "decoder.layers.0.encoder_attn"


def test_a_layer_loses_what_its_neediest_head_of_keys_loses() -> None:
    model = build("llama")
    found, p = record(model, IDS, windows=WINDOWS), weights_of(model, input_ids=IDS)
    for n, window in enumerate(WINDOWS):
        hidden = (torch.arange(23)[:, None] - torch.arange(23)) >= window
        for index, layer in enumerate(found.layers):
            by_head = (p[index] * hidden).sum(-1)[..., window:].mean(-1)
            want = by_head.view(2, 2, 3).amax(2)
            torch.testing.assert_close(layer.cut_by_kv_head()[n], want, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(found.cut_by_layer()[index, n], want.max(), rtol=1e-3, atol=1e-5)
            moved = layer.cut.change[n, ..., window:].mean(-1)
            torch.testing.assert_close(found.change_by_layer()[index, n], moved.max(), rtol=1e-5, atol=1e-6)
    assert found.change_by_layer().shape == (2, len(WINDOWS)) and found.change_by_layer().gt(0).all()


def test_padding_on_either_side_is_not_among_the_queries_that_lose() -> None:
    model, row = build("llama"), IDS[:1, :17]
    want = record(model, row, windows=WINDOWS).cut_by_layer()
    padding, ones = torch.zeros(1, 12, dtype=torch.long), torch.ones_like(row)
    for order in (1, -1):
        ids, keep = (torch.cat([pad, one][::order], dim=1) for pad, one in ((padding, row), (padding, ones)))
        found = record(model, ids, attention_mask=keep, windows=WINDOWS).cut_by_layer()
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)


def test_layers_of_encoders_lose_keys_to_both_sides() -> None:
    model = build("bert")
    found, p = record(model, IDS, windows=[9, 14]), weights_of(model, input_ids=IDS)
    i, j = torch.arange(23)[:, None], torch.arange(23)
    for n, window in enumerate((9, 14)):
        hidden = (i - j).abs() >= window
        loses = hidden.any(1)
        assert loses.any() and (window == 9 or not loses.all())
        for layer, weights in zip(found.layers, p, strict=True):
            want = (weights * hidden).sum(-1)[..., loses].mean(-1)
            torch.testing.assert_close(layer.cut_by_head()[n], want, rtol=1e-3, atol=1e-5)


def test_groups_of_layers() -> None:
    groups = {name: [layer.group for layer in record(build(name), **inputs_of(name)).layers] for name in MODELS}
    assert groups.pop("bert") == ["encoder"] * 2
    assert groups.pop("bart") == ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]
    assert all(found == ["decoder"] * 2 for found in groups.values())


def test_a_window_may_hide_keys_of_one_of_two_texts() -> None:
    found = record(build("bart"), windows=[20], **inputs_of("bart"))  # 23 tokens, and 17 of the decoder
    assert all(cut > 0 for cut in found.cut_by_layer()[:2, 0]) and not found.cut_by_layer()[[2, 4]].any()
    with pytest.raises(ValueError, match="a window of 23 cuts nothing of 23 tokens"):
        record(build("bart"), windows=[23], **inputs_of("bart"))


def test_documents_that_are_packed() -> None:
    """Told by positions that begin anew, as transformers has them; a window does not reach into another one."""
    model = build("llama")
    row, positions = IDS[:1], torch.cat([torch.arange(14), torch.arange(9)])[None]
    found, p = (
        record(model, row, position_ids=positions, windows=[4, 9]),
        weights_of(model, input_ids=row, position_ids=positions),
    )
    back = torch.arange(23)[:, None] - torch.arange(23)
    for layer, weights in zip(found.layers, p, strict=True):
        assert not weights[:, :, 14:, :14].any() and layer.group == "decoder"
        torch.testing.assert_close(layer.distance.mean, (weights * back).sum(-1), rtol=1e-3, atol=1e-4)
        for n, window in enumerate((4, 9)):
            torch.testing.assert_close(layer.cut.mass[n], (weights * (back >= window)).sum(-1), rtol=1e-3, atol=1e-4)


def test_layers_without_heads_are_named() -> None:
    kinds = ["conv", "full_attention", "conv", "full_attention"]
    model = decoder("lfm2", num_hidden_layers=4, layer_types=kinds)().eval()
    found = record(model, IDS)
    assert found.without_heads == ("model.layers.0", "model.layers.2")
    assert "model.layers.2 keeps no keys by heads" in str(found).splitlines()
    assert all(record(build(name), **inputs_of(name)).without_heads == () for name in ("llama", "gpt2", "bart"))


def test_queries_without_a_number_are_known() -> None:
    model = build("llama")

    def spoil(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(1, torch.tensor([20]), torch.nan)

    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(spoil)
    first, second = record(model, IDS, windows=[4]).layers
    handle.remove()
    assert not first.no_number.any()
    assert second.no_number.any((0, 1)).nonzero().tolist() == [[20]] and second.no_number[:, :, 20].all()
    clean = record(model, IDS, windows=[4]).layers[1]
    others = [i for i in range(23) if i != 20]
    torch.testing.assert_close(second.mean(second.keys_in_effect), clean.keys_in_effect[..., others].mean(-1))
    torch.testing.assert_close(second.cut_by_head()[0], clean.cut.mass[0][..., others[4:]].mean(-1))
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: out.index_fill(1, torch.tensor([0]), torch.nan)
    )
    second = record(model, IDS, windows=[4]).layers[1]
    handle.remove()
    assert second.no_number.all() and second.cut_by_head().isnan().all(), "not 0, which would be an answer"


def test_what_is_asked_of_the_model_is_given() -> None:
    """Logits of all tokens for labels, and all queries of a model whose body leaves some out for a few logits."""
    assert len(record(build("qwen3"), IDS, labels=IDS).layers) == 2
    options = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "global_head_dim": 8}
    kinds = ["sliding_attention", "full_attention"] * 2
    shared = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": kinds, "sliding_window": 7}
    model = decoder("gemma4_text", **options, **shared)().eval()
    found, p = record(model, IDS, windows=[4]), weights_of(model, input_ids=IDS)
    back = torch.arange(23)[:, None] - torch.arange(23)
    for layer, weights in zip(found.layers, p, strict=True):
        torch.testing.assert_close(layer.cut.mass[0], (weights * (back >= 4)).sum(-1), rtol=1e-3, atol=1e-4)
    assert [layer.window for layer in found.layers[:2]] == [7, None]
    assert "a dense mask" in str(found)  # a slice of the mask of all queries


def test_attention_to_another_sequence_is_known_by_any_name() -> None:
    options = {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"}}
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**SIZES | options, **HEADS)
    model = transformers.models.mllama.modeling_mllama.MllamaForCausalLM(config).eval()
    layers = record(model, IDS, cross_attention_states=torch.randn(2, 5, 48), windows=[9]).layers
    assert [layer.is_cross for layer in layers] == [False, True, False]


def state(model: nn.Module) -> list[object]:
    """What a model is, apart from its tensors."""
    hooks = [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]
    return [
        [(name, id(value)) for module in model.modules() for name, value in vars(module).items()],
        [module.config.to_dict() for module in model.modules() if hasattr(module, "config")],
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        hooks,
    ]


@pytest.mark.parametrize("how", ["eager", "sdpa", "qkv", "accelerated", "wrapped"])
def test_a_model_is_as_it_was(how: str) -> None:
    model: Any = build("llama")
    if how == "accelerated":
        qkv.accelerate(model)
    elif how != "wrapped":
        qkv.register()
        model.set_attn_implementation(how)
    root = nn.ModuleDict({"model": model}) if how == "wrapped" else model
    run: Any = root["model"] if how == "wrapped" else root
    with torch.no_grad():
        want = model(IDS).logits
        before = state(root)
        found = record(run, IDS, windows=WINDOWS)
        assert state(root) == before
        with pytest.raises(ValueError, match="a window of 23 cuts nothing of 23 tokens"):
            record(run, IDS, windows=[4, 23])
        assert state(root) == before
        assert torch.equal(model(IDS).logits, want)
        # Fewer tokens than the kernel takes in one call for a whole layer.
        assert len(record(run, IDS[:, :3]).layers) == len(found.layers) == 2


def test_recordings_are_printed_as_tables() -> None:
    text = str(record(build("gemma2"), IDS, windows=[4], sink_tokens=2))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "sees", "in", "effect", "distance", "sinks", "cut", "by", "4"]
    assert lines[1].startswith("model.layers.0.self_attn    7 keys") and lines[2].split()[1:3] == ["all", "keys"]
    assert lines[3].startswith("cut: the weight on keys that a window hides, with 2 sink tokens, of the KV head")
    assert all(len(line) <= 120 for line in lines)
    assert "a context" in str(record(build("bart"), windows=[4], **inputs_of("bart")))
    assert "left out" not in text
    padded = str(record(build("gemma2"), IDS, windows=[4], attention_mask=KEEP))
    assert "left out: 6 queries of padding" in padded.splitlines()


def test_a_notebook_shows_a_recording_as_a_table() -> None:
    found = record(build("gemma2"), IDS, windows=[4], sink_tokens=2)
    text = found._repr_html_()
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    lines = str(found).splitlines()
    assert [" ".join(row).split() for row in cells] == [line.split() for line in lines[:-1]]
    assert f"<caption>{lines[-1]}</caption>" in text
    named = found._replace(layers=(found.layers[0]._replace(name='<img src="x">'),), windows=())
    text = named._replace(layers=tuple(layer._replace(windows=()) for layer in named.layers))._repr_html_()
    assert "&lt;img src=&quot;x&quot;&gt;" in text and "<img" not in text and "cut" not in text


def test_calls_that_are_refused() -> None:
    model = build("llama")
    for call, error, message in (
        (lambda: record(nn.Linear(3, 3), IDS), TypeError, "must be, or contain, a model of transformers; got Linear"),
        (lambda: record(model, IDS[0]), ValueError, r"record: input_ids must be a tensor \(B, L\) of integers, one"),
        (lambda: record(model, IDS[:, :0]), ValueError, "one token or more"),
        (lambda: record(model, IDS, windows=[0]), ValueError, "each of windows must be at least 1; got 0"),
        (lambda: record("model", IDS), TypeError, "must be, or contain, a model of transformers; got str"),
        (lambda: record(model, IDS, windows=5), TypeError, "windows must be a sequence of counts; got int"),
        (lambda: record(model, IDS, windows=iter([5])), TypeError, "windows must be a sequence of counts"),
        (lambda: record(torch.compile(model, backend="eager"), IDS), ValueError, "must not be compiled"),
        (lambda: record(model, IDS, windows=["4"]), TypeError, "each of windows must be an int"),
        (lambda: record(model, IDS, sink_tokens=-1), ValueError, "sink_tokens must be at least 0"),
        (lambda: record(copy.deepcopy(model).train(), IDS), ValueError, "must be in evaluation mode"),
        (lambda: record(model, IDS, blocks=0), ValueError, "blocks must be at least 1"),
        (
            lambda: record(model, IDS, queries=[-24]),
            ValueError,
            "be from -23 to 22, for 23 queries; got -24",
        ),
        (lambda: record(model, IDS, queries=3), TypeError, "queries must be a sequence of places; got int"),
        (lambda: record(model, IDS, queries=["3"]), TypeError, "each of queries must be an int"),
    ):
        with pytest.raises(error, match=message):
            call()
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=97, hidden_size=48, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        record(mamba.eval(), IDS)


def test_a_recording_holds_numbers_alone() -> None:
    found = record(build("llama"), IDS, windows=WINDOWS)
    assert isinstance(found, Recording)
    assert copy.deepcopy(found).cut_by_layer().equal(found.cut_by_layer())
    for layer in found.layers:
        for x in (*layer.cut, layer.keys_in_effect, *layer.distance, *layer.sinks, layer.map.mean):
            assert x.dtype is torch.float32 and not x.requires_grad


def test_what_has_no_number_is_said_in_a_table() -> None:
    model = copy.deepcopy(build("llama"))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[:8] = torch.nan
    found = record(model, IDS, windows=[4])
    text = str(found)
    assert "nan" not in text and "no number" in text.splitlines()[2]
    assert "Queries of heads that have no number, for NaN or inf" in text
    assert "Queries of heads that have no number" in found._repr_html_()
    first = found.layers[0]
    near = first._replace(distance=first.distance._replace(mean=torch.full_like(first.distance.mean, -0.01)))
    assert what_layers_see([near], found.cut_by_layer()[:1])[0][2] == "0.0"
