"""A trained model of 12 layers, decoded in batches by `Caches`: each row is the same text alone, whatever happens.

Tokens come padded on the left, on the right or on both sides, or as nested tensors without padding.
The model has rotary positions, groups of heads, a window in every other layer, sinks in one and a context in one.
Products outside of attention are rounded from fp64 in decoding, since torch's depend on the number of rows. Attention
has the same bits for queries in chunks of two or more; single queries sum in another order, and are within the budget.
"""

import copy
import functools
import io
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from budget import assert_within_budget
from torch import Tensor, nn

import qkv
from qkv import Caches, Mask

VOCABULARY, E, LAYERS, CONTEXT_DIM, LONGEST = 23, 32, 12, 8, 60


class Linear(nn.Linear):
    """Products whose bits do not depend on the other rows, if `exact`."""

    exact = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.exact:
            return super().forward(x)
        out = (x.double()[..., None, :] * self.weight.double()).sum(-1)
        return (out if self.bias is None else out + self.bias.double()).to(x.dtype)


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.double()
        return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


class Ragged(NamedTuple):
    """How the tokens of a jagged tensor, packed as ``(T, width)``, belong to rows."""

    offsets: Tensor

    def nested(self, packed: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(packed, self.offsets)

    def padded(self, packed: Tensor) -> Tensor:
        return self.nested(packed).to_padded_tensor(0.0)

    def packed(self, padded: Tensor) -> Tensor:
        return padded[torch.arange(padded.shape[1]) < self.offsets.diff()[:, None]]


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        mask = Mask.causal() if index % 2 else Mask.causal(9, sink_tokens=2 if index == 4 else 0)
        self.norm = Norm()
        self.attention = qkv.Attention(
            E, 4, num_kv_heads=2, mask=mask, rotary=qkv.RotaryEmbedding(8), bias=False, qk_norm=index == 3
        )
        self.cross = qkv.CrossAttention(E, 4, context_dim=CONTEXT_DIM) if index == 6 else None
        self.up, self.down = Linear(E, 2 * E), Linear(2 * E, E)
        for layer in (self.attention, self.cross):
            for name in ("q_proj", "k_proj", "v_proj", "out_proj") if layer is not None else ():
                old = getattr(layer, name)
                new = Linear(old.in_features, old.out_features, bias=old.bias is not None)
                new.load_state_dict(old.state_dict())
                setattr(layer, name, new)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | None,
        context_mask: Mask | None,
        cache: Caches | None,
        ragged: Ragged | None,
    ) -> Tensor:
        if ragged is None:
            x = x + self.attention(self.norm(x), mask=mask, cache=cache)
        else:
            x = x + self.attention(ragged.nested(self.norm(x)), mask=mask, cache=cache).values()
        if self.cross is not None:
            y = self.norm(x) if ragged is None else ragged.padded(self.norm(x))  # nested queries take no cached context
            y = self.cross(y, context, mask=context_mask, cache=cache)
            x = x + (y if ragged is None else ragged.packed(y))
        return x + self.down(self.up(self.norm(x)).relu())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, E)
        self.blocks = nn.ModuleList([Block(i) for i in range(LAYERS)])
        self.norm, self.head = Norm(), Linear(E, VOCABULARY)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        mask: Mask | None = None,
        context_mask: Mask | None = None,
        cache: Caches | None = None,
    ) -> Tensor:
        ragged = Ragged(tokens.offsets()) if tokens.is_nested else None  # type: ignore[operator]
        x = self.embedding(tokens if ragged is None else tokens.values())
        for block in self.blocks:
            x = block(x, context, mask, context_mask, cache, ragged)
        out = self.head(self.norm(x))
        return out if ragged is None else ragged.nested(out)


def sequences(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Texts in which a token follows from the one before it and from the context, with a little noise."""
    context = torch.randn(batch, 4, CONTEXT_DIM)
    step = (context[:, 0, 0] > 0).long() + 1
    tokens = [torch.randint(VOCABULARY, (batch,))]
    for _ in range(length - 1):
        noise = torch.randint(VOCABULARY, (batch,)) * (torch.rand(batch) < 0.05)
        tokens.append((tokens[-1] + step + noise) % VOCABULARY)
    return torch.stack(tokens, dim=1), context


@functools.cache
def trained(steps: int) -> tuple[Model, tuple[float, float]]:
    """The model after training, and the loss of its first and last steps."""
    torch.manual_seed(0)
    model = Model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        tokens, context = sequences(16, 24)
        loss = F.cross_entropy(model(tokens, context)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    for module in model.modules():
        if isinstance(module, Linear):
            module.exact = True
        if isinstance(module, qkv.Attention):
            module.backend = "native"
    few = max(1, steps // 10)
    return model.eval(), (sum(losses[:few]) / few, sum(losses[-few:]) / few)


class Text(NamedTuple):
    """One row: its tokens, and its context ``(1, length, CONTEXT_DIM)``."""

    tokens: list[int]
    context: Tensor

    def longer(self, more: list[int]) -> "Text":
        return Text([*self.tokens, *more], self.context)

    def alone(self, model: Model) -> Tensor:
        """Logits of the text without a cache; of at least two tokens, so that they have the bits of a chunk."""
        tokens = torch.tensor([self.tokens if len(self.tokens) > 1 else [*self.tokens, 0]])
        return model(tokens, self.context)[0, : len(self.tokens)]


class World:
    """A batch of texts that is decoded, and a model."""

    OPERATIONS = (
        *["chunk"] * 4,
        *["single"] * 2,
        *["padded"] * 4,
        *["draft"] * 4,
        "fail",
        "fail_between",
        "beams",
        "leave",
        *["join"] * 3,
        *["replace"] * 2,
        "keep",
    )

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.chance = model, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[str] = []
        self.singles: list[tuple[Tensor, Text]] = []
        """logits of single queries, and the texts that end in them"""
        self.texts, self.caches = self.prompts(3)

    def step(self) -> None:
        operation = self.chance.choice(self.OPERATIONS)
        self.history.append(operation)
        try:
            getattr(self, operation)()
            assert self.caches.lengths.tolist() == [len(text.tokens) for text in self.texts]
            assert len({cache.length for cache in self.caches.values() if not cache.of_context}) == 1
            self.retire()
        except Exception as error:
            raise AssertionError(" ".join(self.history)) from error

    def tokens(self, count: int) -> list[int]:
        return [self.chance.randrange(VOCABULARY) for _ in range(count)]

    def prompts(self, count: int) -> tuple[list[Text], Caches]:
        """New texts, prefilled together, with padding on a side and contexts of unequal lengths."""
        lengths = [self.chance.choice((2, 3, 7, 20)) for _ in range(count)]
        contexts = [self.chance.randint(1, 5) for _ in range(count)]
        texts = [
            Text(self.tokens(length), torch.randn(1, context, CONTEXT_DIM, generator=self.generator))
            for length, context in zip(lengths, contexts, strict=True)
        ]
        context = torch.full((count, max(contexts), CONTEXT_DIM), float("nan"))
        for row, text in enumerate(texts):
            context[row, : text.context.shape[1]] = text.context[0]
        caches = Caches.for_model(self.model)
        options = {"context": context, "context_mask": Mask.padding(torch.tensor(contexts))}
        empty = [Text([], text.context) for text in texts]
        self.append(empty, [text.tokens for text in texts], caches, **options)
        return texts, caches

    def append(self, texts: list[Text], more: list[list[int]], caches: Caches, **options: Any) -> list[Text]:
        """Appends tokens to each row of a batch, padded to one length or ragged, and checks all logits."""
        grown = [text.longer(new) for text, new in zip(texts, more, strict=True)]
        side = self.chance.choice(("left", "right", "both", "ragged"))
        if side == "ragged" and max(map(len, more)) > 1:  # of single queries, a padded column makes a chunk
            rows = [torch.tensor(new, dtype=torch.int64) for new in more]
            nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
            out = self.model(nested, cache=caches, **options).unbind()
        else:
            out = self.padded_call(more, side, caches, **options)
        for row, (text, new) in enumerate(zip(grown, more, strict=True)):
            want = text.alone(self.model)[len(text.tokens) - len(new) :]
            assert torch.equal(out[row], want), f"{side}: row {row} is off by {(out[row] - want).abs().max()}"
        return grown

    def padded_call(self, more: list[list[int]], side: str, caches: Caches, **options: Any) -> list[Tensor]:
        """Logits of the tokens of each row, in a batch that is padded on one side or both."""
        columns = max(2, *map(len, more))
        tokens, keep = torch.zeros(len(more), columns, dtype=torch.int64), torch.zeros(len(more), columns).bool()
        for row, new in enumerate(more):
            spare = columns - len(new)
            start = {"left": spare, "both": spare // 2}.get(side, 0)
            tokens[row, start : start + len(new)] = torch.tensor(new, dtype=torch.int64)
            keep[row, start : start + len(new)] = True
        mask = None if keep.all() and self.chance.random() < 0.5 else Mask.padding(keep)
        out = self.model(tokens, mask=mask, cache=caches, **options)
        return [row[kept] for row, kept in zip(out, keep, strict=True)]

    def chunk(self) -> None:
        count = self.chance.choice((2, 3, 5))
        self.texts = self.append(self.texts, [self.tokens(count) for _ in self.texts], self.caches)

    def single(self) -> None:
        for _ in range(self.chance.randint(1, 3)):
            new = [self.tokens(1) for _ in self.texts]
            out = self.model(torch.tensor(new), cache=self.caches)
            self.texts = [text.longer(one) for text, one in zip(self.texts, new, strict=True)]
            self.singles += [(one[0], text) for one, text in zip(out, self.texts, strict=True)]
        # What singles have cached differs in its last bits from then on.
        self.texts, self.caches = self.prompts(self.chance.randint(1, 3))

    def padded(self) -> None:
        self.texts = self.append(self.texts, [self.tokens(self.chance.randint(0, 4)) for _ in self.texts], self.caches)

    def draft(self) -> None:
        count, before = self.chance.randint(2, 4), self.texts
        drafted = self.append(before, [self.tokens(count) for _ in before], self.caches)
        refused = [self.chance.randint(0, count) for _ in before]
        self.texts = [
            Text(text.tokens[: len(text.tokens) - n], text.context) for text, n in zip(drafted, refused, strict=True)
        ]
        self.caches.crop(torch.tensor([len(text.tokens) for text in self.texts]))

    def fail(self) -> None:
        """A layer raises; the next call finds the caches as they were."""
        layers = [module for module in self.model.modules() if isinstance(module, qkv.Attention)]
        with interrupted(self.chance.choice(layers).out_proj), pytest.raises(KeyboardInterrupt):
            self.model(torch.tensor([self.tokens(3) for _ in self.texts]), cache=self.caches)
        self.padded()

    def fail_between(self) -> None:
        block = self.chance.choice(list(self.model.blocks))
        with interrupted(block.up), pytest.raises(KeyboardInterrupt), self.caches.transaction():
            self.model(torch.tensor([self.tokens(3) for _ in self.texts]), cache=self.caches)
        self.chunk()

    def beams(self) -> None:
        """Four continuations of the first text, of which the best are kept again and again."""
        self.caches.select(torch.tensor([0]))
        self.caches.repeat(4)
        self.texts = [self.texts[0]] * 4
        for _ in range(2):
            self.chunk()
            best = [self.chance.randrange(4) for _ in range(4)]
            self.caches.select(torch.tensor(best))
            self.texts = [self.texts[i] for i in best]

    def leave(self) -> None:
        rows = self.chance.sample(range(len(self.texts)), self.chance.randint(1, len(self.texts)))
        self.caches.select(torch.tensor(rows))
        self.texts = [self.texts[i] for i in rows]

    def join(self) -> None:
        if len(self.texts) < 6:
            texts, caches = self.prompts(self.chance.randint(1, 2))
            self.caches.join(caches)
            self.texts = [*self.texts, *texts]

    def replace(self) -> None:
        rows = self.chance.sample(range(len(self.texts)), self.chance.randint(1, min(2, len(self.texts))))
        self.put(rows)

    def put(self, rows: list[int]) -> None:
        texts, caches = self.prompts(len(rows))
        self.caches.replace(torch.tensor(rows), caches)
        for row, text in zip(rows, texts, strict=True):
            self.texts[row] = text

    def retire(self) -> None:
        """Replaces texts that have become long, within the first block of keys of the kernel."""
        rows = [row for row, text in enumerate(self.texts) if len(text.tokens) > LONGEST]
        if rows:
            self.put(rows)

    def keep(self) -> None:
        """Goes on with a copy of the caches."""
        self.caches = self.chance.choice(KEEP)(self.caches, self.model)

    def check_singles(self) -> None:
        exact = copy.deepcopy(self.model).double()
        plain = copy.deepcopy(self.model)
        for module in (*exact.modules(), *plain.modules()):
            if isinstance(module, qkv.Attention):
                module.backend = "reference"
        wide = [text._replace(context=text.context.double()) for _, text in self.singles]
        want = torch.stack([text.alone(exact)[-1] for text in wide])
        peer = torch.stack([text.alone(plain)[-1] for _, text in self.singles])
        assert_within_budget(torch.stack([out for out, _ in self.singles]), want, peer, "single queries")


@contextmanager
def interrupted(module: nn.Module) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = module.register_forward_pre_hook(interrupt)
    try:
        yield
    finally:
        hook.remove()


def loaded(caches: Caches, model: Model) -> Caches:
    fresh = Caches.for_model(model)
    fresh.load_state_dict(caches.state_dict())
    return fresh


def pickled(caches: Caches, model: Model) -> Caches:
    copied: Caches = pickle.loads(pickle.dumps(caches))
    copied.bind(model)
    return copied


def saved(caches: Caches, model: Model) -> Caches:
    file = io.BytesIO()
    torch.save(caches, file)
    file.seek(0)
    copied: Caches = torch.load(file, weights_only=True)
    copied.bind(model)
    return copied


KEEP: list[Callable[[Caches, Model], Caches]] = [
    lambda caches, _: copy.copy(caches),
    lambda caches, _: copy.deepcopy(caches),
    loaded,
    pickled,
    saved,
]


def decode(model: Model, seed: int, steps: int) -> None:
    world = World(model, seed)
    for _ in range(steps):
        world.step()
    world.single()
    world.check_singles()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sizes are small: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_each_row_of_a_batch_is_its_text_alone(seed: int) -> None:
    with torch.enable_grad():
        model, _ = trained(3)
    decode(model, seed, 12)


@pytest.mark.long
@torch.no_grad()
def test_each_row_is_its_text_alone_for_500_steps() -> None:
    with torch.enable_grad():
        model, (first, last) = trained(200)
    assert last < 0.5 * first
    decode(model, 100, 500)
