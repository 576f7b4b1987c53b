"""`align_heads` keeps the function, recovers planted copies, and groups heads better than neighbours do."""

import copy
from unittest import mock

import pytest
import torch
from convert import models

import qkv
from qkv.convert import (
    CheckpointError,
    KeySymmetry,
    Projections,
    agreement_by_layer,
    align_heads,
    convert_checkpoint,
    convert_layer,
    convert_state_dict,
    head_agreement,
)

HEADS, GROUPS = 8, 2
EXACT = 1e-11
"""Some thousand roundings of fp64, relative to the largest result."""


def orthogonal(*shape):
    return torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64))[0]


def key_rotations(count, width, symmetry):
    """Random rotations that the symmetry allows, plane by plane."""
    rotations = torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)
    if symmetry.normed:
        return rotations
    half = symmetry.rotary_dim // 2
    for r in rotations:
        for plane in range(half):
            a, b = (2 * plane, 2 * plane + 1) if symmetry.interleaved else (plane, plane + half)
            angle = 6.28 * torch.rand((), dtype=torch.float64)
            r[a, a], r[a, b], r[b, a], r[b, b] = angle.cos(), -angle.sin(), angle.sin(), angle.cos()
        if symmetry.rotary_dim < width:
            r[symmetry.rotary_dim :, symmetry.rotary_dim :] = orthogonal(width - symmetry.rotary_dim)
    return rotations


FREEDOMS = [
    (KeySymmetry(), {}),
    (KeySymmetry(rotary_dim=6), {"rotary": qkv.RotaryEmbedding(6)}),
    (KeySymmetry(rotary_dim=4), {"rotary": qkv.RotaryEmbedding(6, rotary_dim=4)}),
    (KeySymmetry(rotary_dim=4, interleaved=True), {"rotary": qkv.RotaryEmbedding(6, rotary_dim=4, interleaved=True)}),
    (KeySymmetry(rotary_dim=6, normed=True), {"rotary": qkv.RotaryEmbedding(6), "qk_norm": True}),
]
"""Of keys of width 6."""


def random_layer(num_kv_heads, seed=0, **options):
    torch.manual_seed(seed)
    per_head = {
        "alibi": torch.rand(2 * num_kv_heads),
        "sink_logits": True,
        "mask": qkv.Mask.causal() & qkv.Mask.dense(torch.rand(2 * num_kv_heads, 5, 5) < 0.8),
    }
    sizes = {"num_kv_heads": num_kv_heads, "head_dim": 6, "value_dim": 5}
    layer = qkv.Attention(24, 2 * num_kv_heads, **sizes, **{**per_head, **options}).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return layer


def projections(layer):
    rows = [
        part.weight if part.bias is None else torch.cat([part.weight, part.bias[:, None]], 1)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]
    return Projections(*(part.detach() for part in (*rows, layer.out_proj.weight)))


def put(layer, changed, query_order):
    """Writes projections, and what query heads have one of each in their order, into a copy of the layer."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for part, rows in zip((layer.q_proj, layer.k_proj, layer.v_proj), changed, strict=False):
            part.weight.copy_(rows[:, : part.in_features])
            if part.bias is not None:
                part.bias.copy_(rows[:, -1])
        layer.out_proj.weight.copy_(changed.out)
        if layer.sink_logits is not None:
            layer.sink_logits.copy_(layer.sink_logits[query_order])
    if layer.alibi is not None:
        layer.alibi = layer.alibi[query_order]
    if layer.mask.allow is not None:
        layer.mask = qkv.Mask.causal() & qkv.Mask.dense(layer.mask.allow[..., query_order, :, :])
    return layer


def assert_same(got, want):
    assert (got - want).abs().max() <= EXACT * want.abs().max()


def outputs(*layers):
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [layer(x) for layer in layers]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("symmetry", "options"), FREEDOMS)
def test_alignment_without_pooling_keeps_the_function(symmetry, options, bias):
    layer = random_layer(HEADS, bias=bias, **options)
    with torch.no_grad():
        for part in (layer.k_proj, layer.v_proj):
            heads = part.weight.unflatten(0, (HEADS // 2, 2, -1))
            heads.add_(heads[:1].clone(), alpha=2.0)  # Every other head is alike.
    alignment = align_heads(projections(layer), HEADS, GROUPS, symmetry)
    rotated = put(layer, alignment.apply(projections(layer)), alignment.query_order(2 * HEADS))
    assert_same(*outputs(rotated, layer))
    assert alignment.order.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert (rotated.v_proj.weight - layer.v_proj.weight).abs().max() > 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("symmetry", "options"), FREEDOMS)
def test_rotated_and_shuffled_copies_of_heads_are_found(symmetry, options, bias):
    """Query heads and outs all differ; pooled to as many heads as there are different ones, nothing is lost."""
    layer = random_layer(HEADS, bias=bias, **options)
    q, k, v, out = projections(layer)
    order = torch.randperm(HEADS)
    keys, values = key_rotations(HEADS, 6, symmetry), orthogonal(HEADS, 5)
    copies = torch.arange(GROUPS).repeat_interleave(HEADS // GROUPS)[order]
    planted = Projections(
        (keys[:, None] @ q.unflatten(0, (HEADS, 2, 6))).flatten(0, 2),
        (keys @ k.unflatten(0, (HEADS, 6))[copies]).flatten(0, 1),
        (values @ v.unflatten(0, (HEADS, 5))[copies]).flatten(0, 1),
        (values[:, None] @ out.T.unflatten(0, (HEADS, 2, 5))).flatten(0, 2).T,
    )
    source = put(layer, planted, torch.arange(2 * HEADS))
    got, mean, want = outputs(convert_layer(source, GROUPS, how="aligned"), convert_layer(source, GROUPS), source)
    assert_same(got, want)
    assert (mean - want).abs().max() > 0.1 * want.abs().max()


def deviation(weight, gain, groups):
    """The squared difference of heads from the mean of their group, relative to their squares."""
    heads = torch.cat([weight[:, :24] * gain, weight[:, 24:]], 1).unflatten(0, (HEADS, -1))
    lost = sum(((heads[h] - heads[group].mean(0)) ** 2).sum() for group in groups for h in group)
    return float(lost / (heads**2).sum())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("symmetry", "options"), FREEDOMS)
@pytest.mark.parametrize("seed", range(3))
def test_aligned_heads_deviate_less_than_unaligned_neighbours(symmetry, options, groups, seed):
    layer = random_layer(HEADS, seed, **options)
    gain = torch.rand(24, dtype=torch.float64)
    before = projections(layer)
    after = align_heads(before, HEADS, groups, symmetry, gain=gain).apply(before)
    neighbours = torch.arange(HEADS).view(groups, -1)
    unaligned, aligned = (deviation(p.k, gain, neighbours) + deviation(p.v, gain, neighbours) for p in (before, after))
    assert aligned < unaligned


@pytest.mark.parametrize(("symmetry", "options"), FREEDOMS)
def test_agreement_is_the_cosine_after_the_best_turn(symmetry, options):
    layer = random_layer(3, **options)
    found = head_agreement(projections(layer), 3, symmetry)
    k, v = (part.view(3, width, -1) for part, width in zip(projections(layer)[1:3], (6, 5), strict=True))

    def cosine(a, b):
        return (a * b).sum() / (a.norm() * b.norm())

    for heads, got, turns in (
        (k, found.keys, key_rotations(500, 6, symmetry)),
        (v, found.values, key_rotations(500, 5, KeySymmetry())),
    ):
        assert torch.equal(got, got.T) and torch.equal(got.diagonal(), torch.ones(3).double())
        for i, j in ((0, 1), (0, 2), (1, 2)):
            tried = torch.stack([cosine(turn @ heads[i], heads[j]) for turn in turns])
            assert tried.max() <= got[i, j] + 1e-9 and tried.max() >= got[i, j] - 0.4
            assert got[i, j] >= cosine(heads[i], heads[j]) - 1e-9
    if symmetry.normed:
        assert found.keys[0, 1] == pytest.approx(cosine(k[0], k[1]).item())
    turned = torch.cat([k[0], 3 * key_rotations(1, 6, symmetry)[0] @ k[0], k[2]])
    planted = head_agreement(projections(layer)._replace(k=turned), 3, symmetry).keys
    assert planted[0, 1] == pytest.approx(1) and planted[0, 2] < 0.99
    with pytest.raises(ValueError, match="head_agreement: keys and values must be finite"):
        head_agreement(projections(layer)._replace(v=turned.new_full((15, 24), torch.nan)), 3, symmetry)


@pytest.mark.parametrize(("family", "offset"), [("llama", 0.0), ("gemma2", 1.0), ("qwen3", 0.0)])
def test_the_agreement_of_a_models_layers_is_that_of_their_weights(family, offset):
    model = models.build(family)
    state, config = model.state_dict(), model.config.to_dict()
    found = {how: agreement_by_layer(state, config, 2, how=how) for how in ("mean", "aligned")}
    has_norms = family == "qwen3"
    for n, block in enumerate(model.model.layers):
        attention = block.self_attn
        k, v = (
            torch.cat([proj.weight, proj.bias[:, None]], dim=1) if proj.bias is not None else proj.weight
            for proj in (attention.k_proj, attention.v_proj)
        )
        given = Projections(attention.q_proj.weight, k, v, attention.o_proj.weight)
        gain = block.input_layernorm.weight + offset
        symmetry = KeySymmetry(config.get("head_dim", 8), normed=has_norms)
        with torch.no_grad():
            want = head_agreement(given, 8, symmetry, gain=gain)
            order = align_heads(given, 8, 2, symmetry, gain=gain).order.tolist()
        for some in found.values():
            assert some[n].layer == n
            torch.testing.assert_close(some[n].keys, want.keys)
            torch.testing.assert_close(some[n].values, want.values)
        assert found["mean"][n].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
        assert found["aligned"][n].groups == (tuple(order[:4]), tuple(order[4:]))
    assert any(layer.groups != found["mean"][0].groups for layer in found["aligned"])
    with pytest.raises(CheckpointError, match="heads of bart models cannot be aligned"):
        agreement_by_layer({}, {"model_type": "bart"}, 2)
    with pytest.raises(CheckpointError, match=r"must divide the model's 8 KV heads \(8, 4, 2, 1\); got 3"):
        agreement_by_layer(state, config, 3)
    with pytest.raises(ValueError, match="how must be one of mean, first, random, aligned; got 'x'"):
        agreement_by_layer(state, config, 2, how="x")
    state["model.layers.1.self_attn.k_proj.weight"] = torch.full_like(k[:, :64], torch.nan)
    with pytest.raises(CheckpointError, match="layer 1: head_agreement: keys and values must be finite"):
        agreement_by_layer(state, config, 2)


def test_equal_heads_are_not_changed():
    """Equal heads are neither reordered nor rotated."""
    layer = random_layer(HEADS)
    q, k, v, out = projections(layer)
    k, v = (rows.unflatten(0, (HEADS, -1))[[0] * 4 + [1] * 4].flatten(0, 1) for rows in (k, v))
    alignment = align_heads(Projections(q, k, v, out), HEADS, GROUPS, KeySymmetry())
    assert alignment.order.tolist() == list(range(HEADS))
    for rotations in (alignment.key_rotations, alignment.value_rotations):
        assert (rotations - rotations[0]).abs().max() < EXACT


def test_columns_are_weighted_by_the_gain():
    """Copies in the columns with gain 1; the columns with gain 0 are arbitrary."""
    layer = random_layer(HEADS, bias=False)
    gain = torch.cat([torch.ones(12), torch.zeros(12)]).double()
    q, k, v, out = projections(layer)
    copies, seen = torch.randperm(HEADS) % GROUPS, gain > 0
    k, v = (torch.where(seen, rows.unflatten(0, (HEADS, -1))[copies].flatten(0, 1), 5 * rows) for rows in (k, v))
    source = put(layer, Projections(q, k, v, out), torch.arange(2 * HEADS))
    with_gain = convert_layer(source, GROUPS, how="aligned", gain=gain)
    without_gain = convert_layer(source, GROUPS, how="aligned")
    x = gain * torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        assert_same(with_gain(x), source(x))
        assert (without_gain(x) - source(x)).abs().max() > 0.1 * source(x).abs().max()


def test_converting_to_all_heads_keeps_every_bit():
    layer = random_layer(HEADS)
    same = convert_layer(layer, HEADS, how="aligned")
    assert all(torch.equal(same.state_dict()[name], value) for name, value in layer.state_dict().items())


def test_half_precision_is_rounded_once():
    half = random_layer(HEADS).to(torch.bfloat16)
    got, want = (convert_layer(layer, GROUPS, how="aligned") for layer in (half, copy.deepcopy(half).float()))
    for name, value in got.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, want.state_dict()[name].to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("groups", "change", "message"),
    [
        (3, {}, r"new_kv_heads must divide num_kv_heads=8 \(8, 4, 2, 1\); got 3\."),
        (2, {"k": torch.full((48, 25), float("nan"))}, "keys and values must be finite"),
        (2, {"v": torch.full((40, 25), float("inf"))}, "keys and values must be finite"),
    ],
)
def test_invalid_arguments_are_refused(groups, change, message):
    with pytest.raises(ValueError, match=message):
        align_heads(projections(random_layer(HEADS))._replace(**change), HEADS, groups, KeySymmetry())


def test_opposite_keys_and_orthogonal_values_are_not_changed():
    """Opposite keys that must not be rotated, and orthogonal values."""
    keys, values = torch.randn(4, 8).repeat(2, 1), torch.eye(8)
    keys[4:] *= -1
    alignment = align_heads(Projections(keys, keys, values, values), 2, 1, KeySymmetry(normed=True))
    assert alignment.order.tolist() == [0, 1]
    assert torch.equal(alignment.key_rotations, torch.eye(4).repeat(2, 1, 1))


def test_sizes_that_do_not_fit_are_refused():
    given = projections(random_layer(HEADS))
    with pytest.raises(
        ValueError,
        match=r"rows of q, k, v and out\.T must be multiples of the 8 KV heads; got shapes \(96, 25\), \(47, 25\), ",
    ):
        align_heads(given._replace(k=given.k[1:]), HEADS, GROUPS, KeySymmetry())
    with pytest.raises(ValueError, match=r"each of the 25 columns of k .* got shape \(23,\)"):
        align_heads(given, HEADS, GROUPS, KeySymmetry(), gain=torch.ones(23))


def test_a_gain_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"gain must be \(24,\), one value per column; got shape \(23,\)"):
        convert_layer(random_layer(HEADS), GROUPS, how="aligned", gain=torch.ones(23))
    with pytest.raises(ValueError, match=r"gain must be \(24,\), one value per column; got 5\."):
        convert_layer(random_layer(HEADS), GROUPS, how="aligned", gain=5)


# Models of transformers.

SOURCES = {
    "partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "normed": ("phi", {"qk_layernorm": True}),
    # Llama ignores partial_rotary_factor.
    "not partial": ("llama", {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    **{family: (family, {}) for family in models.FAMILIES},
}


def by_head(model, family):
    """For each layer the rows of queries, keys and values, weights and biases, and the columns of outs, as views."""
    parameters = dict(model.named_parameters())
    for name, out in parameters.items():
        if not name.endswith(("o_proj.weight", "dense.weight", "attn.c_proj.weight")) or "mlp" in name:
            continue
        prefix = name.rpartition(".")[0].rpartition(".")[0]
        rows = [[], [], []]
        for other, parameter in parameters.items():
            if not other.startswith(f"{prefix}.") or "norm" in other or other.startswith(name.removesuffix("weight")):
                continue
            if family == "gpt2" and parameter.dim() == 2:
                parts = parameter.view(64, 3, HEADS, -1).permute(1, 2, 3, 0)
            elif family in ("gpt_neox", "gpt_bigcode"):
                parts = parameter.view(HEADS, 3, -1, *parameter.shape[1:]).transpose(0, 1)
            elif "qkv" in other or family == "gpt2":
                parts = parameter.view(3, HEADS, -1, *parameter.shape[1:])
            else:
                rows["qkv".index(other.removeprefix(f"{prefix}.")[0])].append(parameter.unflatten(0, (HEADS, -1)))
                continue
            for index, part in enumerate(parts):
                rows[index].append(part)
        columns = out.view(HEADS, -1, 64) if family == "gpt2" else out.view(64, HEADS, -1).permute(1, 2, 0)
        yield *rows, columns


def plant(model, family, groups):
    """Copies keys and values of a few heads to all, then shuffles and rotates the heads."""
    normed = family.startswith(("qwen3", "gemma3")) or any("q_layernorm" in name for name in model.state_dict())
    rotary_dim = max((2 * len(buffer) for name, buffer in model.named_buffers() if "inv_freq" in name), default=0)
    with torch.no_grad():
        for q, k, v, out in by_head(model, family):
            width = out.shape[1]
            symmetry = KeySymmetry(rotary_dim, normed=normed)
            order, copies = torch.randperm(HEADS), torch.randperm(HEADS) % groups
            keys, values = key_rotations(HEADS, width, symmetry), orthogonal(HEADS, width)
            for rows, source, rotations in (
                (q, order, keys),
                (k, copies, keys),
                (v, copies, values),
                ([out], order, values),
            ):
                for part in rows:
                    part.copy_(torch.einsum("hde,he...->hd...", rotations, part[source]))


@pytest.mark.parametrize("source", SOURCES)
def test_planted_models_are_recovered(source):
    from transformers import AutoConfig, AutoModelForCausalLM

    family, options = SOURCES[source]
    groups = 1 if family in ("gpt2", "gpt_bigcode") else GROUPS
    model = models.build(family, **options).double()
    plant(model, family, groups)
    want = models.logits(model)

    def converted(how):
        result = convert_state_dict(model.state_dict(), model.config.to_dict(), groups, how=how)
        other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**result.config)).double().eval()
        other.load_state_dict(result.state_dict)
        return models.logits(other)

    assert_same(converted("aligned"), want)
    assert (converted("mean") - want).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_folders_convert_like_state_dicts_and_align_each_layer_once(tmp_path, family):
    source = models.save(tmp_path / "source", family, shards="60KB", dtype=torch.bfloat16)
    with mock.patch("qkv.convert.families.aligned_outputs.align_heads", wraps=align_heads) as aligned:
        convert_checkpoint(source, tmp_path / "out", GROUPS, how="aligned")
    assert aligned.call_count == 3
    model = models.build(family).to(torch.bfloat16)
    converted = convert_state_dict(model.state_dict(), model.config.to_dict(), GROUPS, how="aligned")
    loaded = models.load(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in converted.state_dict.items())


@pytest.mark.parametrize(
    ("family", "norm", "offset"),
    [("gemma", "model.layers.{}.input_layernorm", 1.0), ("gpt2", "transformer.h.{}.ln_1", 0.0)],
)
def test_gains_are_those_of_the_norm_before(family, norm, offset):
    model = models.build(family)
    with mock.patch("qkv.convert.families.aligned_outputs.align_heads", wraps=align_heads) as aligned:
        convert_state_dict(model.state_dict(), model.config.to_dict(), 1, how="aligned")
    for number, call in enumerate(aligned.call_args_list):
        assert torch.equal(call.kwargs["gain"], model.state_dict()[norm.format(number) + ".weight"] + offset)


def test_models_that_cannot_be_aligned():
    from transformers import AutoModelForSeq2SeqLM, T5Config

    model = models.build("llama")
    state = {**model.state_dict(), "model.layers.1.self_attn.v_proj.weight": torch.full((64, 64), float("nan"))}
    message = (
        r"config: model\.layers\.1\.self_attn cannot be aligned: align_heads: keys and values must be finite; got NaN "
        r"or infinity\. Choose another method: mean, first or random\."
    )
    with pytest.raises(CheckpointError, match=message):
        convert_state_dict(state, model.config.to_dict(), GROUPS, how="aligned")
    # A model with a head reads names without their beginning as well.
    state = {name.removeprefix("model.") if "norm" in name else name: value for name, value in state.items()}
    with pytest.raises(
        CheckpointError, match=r"needs tensor 'model\.layers\.0\.input_layernorm\.weight', which is missing"
    ):
        convert_state_dict(state, model.config.to_dict(), GROUPS, how="aligned")
    t5 = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=4)
    )
    with pytest.raises(
        CheckpointError, match=r"heads of t5 models cannot be aligned, those of llama, .*, gpt_neox can\."
    ):
        convert_state_dict(t5.state_dict(), t5.config.to_dict(), 2, how="aligned")
