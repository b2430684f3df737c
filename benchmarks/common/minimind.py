"""MiniMind, a small language model: tokens (batch, length) -> logits (batch, length, vocabulary).

The architecture is that of the MiniMind project, written anew: each block computes
x + attention(norm(x)), then x + feed_forward(norm(x)). It keeps the control flow of real models (a
cache or none, a mask or none, train or eval, experts chosen by the data), because the benchmarks
also test lorafx's tracer on it. It knows nothing of lorafx.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.minimind_layers import (
    Attention, Config, FeedForward, MixtureOfExperts, Pair, RMSNorm, rotary_tables)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden, config.epsilon)
        self.feed_forward = MixtureOfExperts(config) if config.experts else FeedForward(config)

    def forward(self, x: Tensor, rotation: Pair, visible: Tensor | None,
                past: Pair | None) -> tuple[Tensor, Pair]:
        """As for Attention."""
        y, kept = self.attention(self.attention_norm(x), rotation, visible, past)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), kept


class Output(NamedTuple):
    """Logits (batch, length, vocabulary); with `use_cache`, each layer's keys and values."""

    logits: Tensor
    cache: list[Pair] | None


class MiniMind(nn.Module):
    """The whole model; its rotary tables are not in state_dict, which so fixes no `max_length`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.epsilon)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        cos, sin = rotary_tables(config.head, config.max_length, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def aux_loss(self) -> Tensor | float:
        """What the mixture-of-experts layers add to the training loss; 0 without them."""
        mixtures = (module for module in self.modules() if isinstance(module, MixtureOfExperts))
        return sum(module.aux_loss for module in mixtures)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: list[Pair] | None = None,
                use_cache: bool = False) -> Output:
        """tokens (batch, length) after those in the cache; mask (batch, past + length), 0: padding.

        Raises:
            ValueError: past + length exceeds `max_length`.
        """
        start = 0 if cache is None else cache[0][0].shape[2]
        end = start + tokens.shape[1]
        if end > self.config.max_length:
            raise ValueError(f"{end} tokens do not fit in max_length={self.config.max_length}.")
        rotation = self.cos[start:end], self.sin[start:end]  # (length, head / 2)
        visible = None if mask is None and cache is None else self.visible(mask, start, end)
        x = self.dropout(self.embedding(tokens))  # (batch, length, hidden)
        kept = []
        for index, layer in enumerate(self.layers):
            x, pair = layer(x, rotation, visible, None if cache is None else cache[index])
            kept.append(pair)
        return Output(self.head(self.norm(x)), kept if use_cache else None)

    def visible(self, mask: Tensor | None, start: int, end: int) -> Tensor:
        """Which keys each query sees, (1 or batch, 1, end - start, end): none that is padding."""
        place = torch.arange(end, device=self.cos.device)  # (end)
        visible = (place <= place[start:, None])[None, None]  # (1, 1, length, end)
        if mask is None:
            return visible
        # A padded query sees itself: over an empty row softmax would be 0 / 0.
        itself = place == place[start:, None]  # (length, end)
        return visible & mask[:, None, None].bool() | itself  # (batch, 1, length, end)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.0,
                 top_k: int | None = None, mask: Tensor | None = None,
                 use_cache: bool = True) -> Tensor:
        """tokens (batch, length) and `count` more: (batch, length + count).

        They are the likeliest, or, if temperature > 0, drawn from softmax(logits / temperature)
        over the `top_k` likeliest, with torch's default generator. Padding, 0 in mask
        (batch, length), belongs on the left.
        """
        cache: list[Pair] | None = None
        for _ in range(count):
            output = self(tokens if cache is None else tokens[:, -1:], mask, cache, use_cache)
            cache = output.cache
            chosen = choose(output.logits[:, -1], temperature, top_k)  # (batch, 1)
            tokens = torch.cat((tokens, chosen), dim=1)
            if mask is not None:
                mask = torch.cat((mask, torch.ones_like(chosen, dtype=mask.dtype)), dim=1)
        return tokens


def choose(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token for each row of logits (batch, vocabulary): (batch, 1)."""
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1)
