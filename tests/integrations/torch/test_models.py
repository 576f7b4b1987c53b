"""Accelerated models of other libraries: the same outputs and gradients, by the kernel."""

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import kernels
from qkv.integrations.transformers.unpadding import unpad

pytestmark = [
    pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence())),
    pytest.mark.filterwarnings("ignore"),  # of the libraries' own making
]

Run = Callable[[nn.Module, torch.dtype], Tensor]


def vector(model: nn.Module, run: Run, dtype: torch.dtype, *, slopes: bool) -> Tensor:
    """The output of the model, or the gradients of all its parameters, as one vector."""
    model.zero_grad()
    with torch.set_grad_enabled(slopes):
        out = run(model, dtype)
    if not slopes:
        return out.flatten().double()
    upstream = torch.linspace(-1, 1, out.numel()).sin().view(out.shape)
    (out * upstream.to(dtype)).sum().backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def assert_same_accelerated(model: nn.Module, run: Run, routed: int) -> None:
    """Asserts that outputs and gradients are at most twice as far from fp64 as without qkv, plus one rounding.

    ``routed`` calls of attention are routed in each forward pass, and none falls back to torch.
    """
    wide = copy.deepcopy(model).double()
    for slopes in (False, True):
        exact = vector(wide, run, torch.float64, slopes=slopes)
        plain = vector(model, run, torch.float32, slopes=slopes)
        qkv.accelerate(model)
        ours = vector(model, run, torch.float32, slopes=slopes)
        with qkv.accelerate() as report:
            again = vector(model, run, torch.float32, slopes=slopes)
        qkv.accelerate(model, enabled=False)
        assert torch.equal(vector(model, run, torch.float32, slopes=slopes), plain)
        assert torch.equal(ours, again)
        assert not torch.equal(ours, plain), "the bits of another kernel differ somewhere"
        assert (report.routed, report.fallback) == (routed, 0), str(report)
        rounding = torch.finfo(torch.float32).eps * exact.norm()
        assert exact.norm() > 0
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + rounding


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def import_vision(name: str) -> Any:
    """A module of torchvision, or of timm, which imports that.

    torchvision's own operators load with the build of torch alone that they were made for. Its transformers use none,
    but importing it gives shapes to two of them, which must exist.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for module in [module for module in sys.modules if module.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[module]
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


@pytest.mark.vision
def test_a_vision_transformer_of_timm() -> None:
    timm = import_vision("timm")
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7, qk_norm=True
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    assert_same_accelerated(model, lambda model, dtype: model(images.to(dtype)), routed=2)


@pytest.mark.vision
def test_a_vision_transformer_of_torchvision() -> None:
    models = import_vision("torchvision.models")
    model = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=64, num_classes=7
    ).eval()
    nn.init.normal_(model.heads.head.weight)  # zeros, as the library has it
    images = torch.randn(2, 3, 32, 32)
    assert_same_accelerated(model, lambda model, dtype: model(images.to(dtype)), routed=2)


def test_a_unet_of_diffusers() -> None:
    diffusers = importlib.import_module("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
    images, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    keep = torch.ones(2, 5).bool()
    keep[1, 3:] = False
    run = lambda model, dtype: (
        model(images.to(dtype), torch.tensor(10), text.to(dtype), encoder_attention_mask=keep).sample
    )
    assert_same_accelerated(model, run, routed=8)  # four blocks, each with attention to itself and to the text


def test_a_diffusion_transformer_of_diffusers() -> None:
    diffusers = importlib.import_module("diffusers")
    model = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=3, attention_head_dim=8, num_embeds_ada_norm=10
    ).eval()
    images, step, label = torch.randn(2, 4, 8, 8), torch.tensor([1, 5]), torch.tensor([3, 4])
    run = lambda model, dtype: model(images.to(dtype), timestep=step, class_labels=label).sample
    assert_same_accelerated(model, run, routed=2)


def test_a_sentence_transformer(tmp_path: Path) -> None:
    library = importlib.import_module("sentence_transformers")
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    transformers = importlib.import_module("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "sat", "ran", "on", "mat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    bert = modules.Transformer(str(tmp_path))
    pooling = modules.Pooling(bert.get_word_embedding_dimension())
    model = library.SentenceTransformer(modules=[bert, pooling], device="cpu").eval()
    texts = ["the cat sat on the mat", "a dog ran"]
    features = model.tokenize(texts)
    assert_same_accelerated(model, lambda model, dtype: model(dict(features))["sentence_embedding"], routed=2)
    plain = model.encode(texts)
    with qkv.accelerate() as report:
        assert abs(model.encode(texts) - plain).max() < 1e-5 * abs(plain).max()
    assert (report.routed, report.fallback) == (2, 0)
    assert abs(unpad(model).encode(texts) - plain).max() < 1e-5 * abs(plain).max()


def test_an_encoder_and_decoder_of_torch() -> None:
    model = nn.Transformer(24, 4, 2, 2, 48, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 9, 24), torch.randn(2, 6, 24)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    padding = torch.arange(9) > torch.tensor([[9], [5]])

    def run(model: nn.Module, dtype: torch.dtype) -> Tensor:
        masks: dict[str, Any] = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        out: Tensor = model(source.to(dtype), target.to(dtype), tgt_mask=causal.to(dtype), **masks)
        return out

    assert_same_accelerated(model, run, routed=2 + 2 * 2)
