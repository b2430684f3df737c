"""The models that are timed: embedded tokens x (batch, length, width) -> logits for each token.

None has an embedding, so that x can be a leaf and the gradient dX, which every contender must
compute, is x.grad. All know nothing of lorafx. The encoder and the Llama-like layer are
straight-line code, which a tracer can follow; MiniMind is not (its forward branches), as most
published models are not.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.minimind import MiniMind
from common.minimind_layers import Config, FeedForward, RMSNorm, rotary_tables, rotate

# The layer that gives the logits; no contender adapts it.
HEAD = "head"


class Decoder(MiniMind):
    """MiniMind from its first block on: x (batch, length, hidden) -> its logits."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embedding = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return MiniMind.forward(self, x).logits


class EncoderLayer(nn.Module):
    """BERT's: y = norm(x + attention(x)), then norm(y + feed_forward(y)) (arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, width) -> the same shape."""
        # q, k, v: (batch, heads, length, head)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.key(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        y = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.feed_forward_norm(y + self.down(F.gelu(self.up(y))))


class LlamaLayer(nn.Module):
    """y = x + attention(norm(x)), then y + feed_forward(norm(y)): rotary, causal."""

    def __init__(self, width: int, inner: int, length: int = 4096) -> None:
        super().__init__()
        self.heads = width // 64
        projections = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = projections
        self.attention_norm, self.feed_forward_norm = RMSNorm(width, 1e-5), RMSNorm(width, 1e-5)
        self.feed_forward = FeedForward(Config(hidden=width, feed_forward=inner))
        cos, sin = rotary_tables(64, length, 1e4)  # (length, 32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, width) -> the same shape."""
        rotation = self.cos[:x.shape[1]], self.sin[:x.shape[1]]
        normal = self.attention_norm(x)
        # q, k, v: (batch, heads, length, 64)
        q = self.q_proj(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(normal).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return y + self.feed_forward(self.feed_forward_norm(y))


class Stack(nn.Sequential):
    """Layers one after the other, and then, where there are labels to tell apart, the head."""

    def __init__(self, layers: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.add_module(HEAD, head)


def minimind(hidden: int, layers: int) -> nn.Module:
    """MiniMind with its own vocabulary of 6,400 and two key and value heads."""
    return Decoder(Config(hidden=hidden, layers=layers, heads=8, kv_heads=2, vocabulary=6400,
                          max_length=4096))


def encoder(width: int, layers: int) -> nn.Module:
    """A BERT-base-like encoder that labels each token with one of 32 classes."""
    stacked = [EncoderLayer(width, width // 64, 4 * width) for _ in range(layers)]
    return Stack(stacked, nn.Linear(width, 32))


def llama(width: int, layers: int) -> nn.Module:
    """Llama-like layers, feed-forward 11/4 of the width, no head: a class for each feature."""
    return Stack([LlamaLayer(width, 11 * width // 4) for _ in range(layers)], nn.Identity())


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture at one width, with as many layers as its namesake has."""

    build: Callable[[int, int], nn.Module]
    width: int
    layers: int


MODELS = {
    "MiniMind 26M": Family(minimind, 512, 8),
    "MiniMind 104M": Family(minimind, 768, 16),
    "encoder, BERT-base": Family(encoder, 768, 12),
    "Llama layer, 1024": Family(llama, 1024, 1),
    "Llama layer, 2048": Family(llama, 2048, 1),
    "tiny MiniMind": Family(minimind, 32, 1),
    "tiny encoder": Family(encoder, 64, 1),
}


def targets(model: nn.Module, kind: str) -> list[str]:
    """The layers to adapt: "linear", all nn.Linear but the head; "square", those with in == out."""
    found = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != HEAD:
            if kind == "linear" or layer.in_features == layer.out_features:
                found.append(name)
    return found


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 or wider of logits (..., classes), labels (...)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), labels.flatten())
