"""MiniMind, a small decoder-only language model: tokens (batch, length) -> logits (batch, length, vocabulary).

The architecture is that of the MiniMind project, written anew: each block computes x + attention(norm(x)), then
x + feed_forward(norm(x)). It keeps the control flow of real models (a cache or none, a mask or none, train or eval,
experts chosen by the data), because the benchmarks also test lorafx's tracer on it. It knows nothing of lorafx.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model; `vocabulary` is 256 for bytes, and `experts=0` means one feed-forward for all tokens."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 256
    max_length: int = 2048
    feed_forward: int | None = None
    rope_base: float = 1e6
    epsilon: float = 1e-5
    dropout: float = 0.0
    flash: bool = True
    experts: int = 0
    experts_per_token: int = 2
    shared_experts: int = 1
    aux_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(f"hidden={self.hidden} must be a multiple of twice heads={self.heads}, "
                             f"and heads one of kv_heads={self.kv_heads}.")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} must be 1 to experts={self.experts}.")

    @property
    def head(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads

    @property
    def inner(self) -> int:
        """Features inside the feed-forward: by default 8/3 of hidden, rounded up to a multiple of 64."""
        return self.feed_forward or 64 * -(-8 * self.hidden // (3 * 64))


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size), in x's dtype; the mean is taken in float32."""
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)).type_as(x)


def rotary_tables(size: int, length: int, base: float) -> Pair:
    """cos and sin (length, size / 2) of position * base^(-2 i / size) (Su et al. 2021, arXiv:2104.09864, eq. 15)."""
    frequencies = base ** (-torch.arange(0, size, 2).float() / size)  # (size / 2)
    angles = torch.outer(torch.arange(length).float(), frequencies)  # (length, size / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Pair) -> Tensor:
    """Turn the pairs (x_i, x_(i + size / 2)) of x (batch, heads, length, size) by the angles of their positions."""
    cos, sin = rotation  # (length, size / 2)
    first, second = x.chunk(2, dim=-1)  # (batch, heads, length, size / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key and a value head; q and k are normalised by head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        narrow = config.kv_heads * config.head
        self.config = config
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.q_norm = RMSNorm(config.head, config.epsilon)
        self.k_norm = RMSNorm(config.head, config.epsilon)
        self.output_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: Pair, visible: Tensor | None, past: Pair | None) -> tuple[Tensor, Pair]:
        """x (batch, length, hidden) -> the same shape, and the keys and values (batch, kv_heads, past + length, head).

        `visible`, broadcast to (batch, heads, length, past + length), says which key each query sees; None is causal.
        """
        batch, length, hidden = x.shape
        q, k, v = (y.view(batch, length, -1, self.config.head).transpose(1, 2)  # (batch, heads, length, head)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = self.attend(q, k, v, visible)  # (batch, heads, length, head)
        return self.output_dropout(self.o_proj(y.transpose(1, 2).reshape(batch, length, hidden))), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(head)) v over the visible keys: (batch, heads, length, head)."""
        groups = self.config.heads // self.config.kv_heads
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))  # (batch, heads, past + length, head)
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash:
            return F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=visible is None)
        if visible is None:
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()  # (length, length)
        scores = (q @ k.transpose(-2, -1) / self.config.head ** 0.5).masked_fill(~visible, float("-inf"))
        return F.dropout(scores.softmax(-1), dropout) @ v


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.inner, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.inner, bias=False)
        self.down_proj = nn.Linear(config.inner, config.hidden, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Router(nn.Module):
    """The probability of each expert for each token: softmax(x W^T)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.experts, config.hidden).normal_(0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) -> (tokens, experts)."""
        return F.softmax(F.linear(x, self.weight), dim=-1)


class MixtureOfExperts(nn.Module):
    """sum over the k likeliest experts of p_i expert_i(x), the p_i scaled to sum to 1, plus the shared experts.

    After a training forward `aux_loss` holds experts * sum_i f_i P_i, f_i the share of choices that fell on expert i
    and P_i its mean probability, times `aux_weight` (Fedus et al. 2021, arXiv:2101.03961, eq. 4); in eval it is 0.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.experts))
        self.shared = nn.ModuleList(FeedForward(config) for _ in range(config.shared_experts))
        self.aux_loss: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, hidden) -> the same shape."""
        rows = x.flatten(0, 1)  # (tokens, hidden)
        probabilities = self.router(rows)  # (tokens, experts)
        weights, chosen = probabilities.topk(self.config.experts_per_token)  # (tokens, k)
        weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(rows)  # (tokens, hidden)
        for index, expert in enumerate(self.experts):
            where, slot = torch.nonzero(chosen == index, as_tuple=True)
            if len(where):
                y.index_add_(0, where, (weights[where, slot, None] * expert(rows[where])).to(y.dtype))
        for expert in self.shared:
            y = y + expert(rows)
        self.aux_loss = self.balance(probabilities, chosen) if self.training else 0.0
        return y.view_as(x)

    def balance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """The loss, a scalar, that is least when all experts get the same work."""
        share = F.one_hot(chosen, self.config.experts).float().mean((0, 1))  # (experts)
        return self.config.aux_weight * self.config.experts * (share * probabilities.float().mean(0)).sum()


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden, config.epsilon)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden, config.epsilon)
        self.feed_forward = MixtureOfExperts(config) if config.experts else FeedForward(config)

    def forward(self, x: Tensor, rotation: Pair, visible: Tensor | None, past: Pair | None) -> tuple[Tensor, Pair]:
        """As for Attention."""
        y, kept = self.attention(self.attention_norm(x), rotation, visible, past)
        x = x + y
        return x + self.feed_forward(self.feed_forward_norm(x)), kept


class Output(NamedTuple):
    """Logits (batch, length, vocabulary), and with `use_cache` each layer's keys and values for the next call."""

    logits: Tensor
    cache: list[Pair] | None


class MiniMind(nn.Module):
    """The whole model. The rotary tables are buffers outside state_dict, so a checkpoint does not fix `max_length`."""

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
        return sum(module.aux_loss for module in self.modules() if isinstance(module, MixtureOfExperts))

    def forward(self, tokens: Tensor, mask: Tensor | None = None, cache: list[Pair] | None = None,
                use_cache: bool = False) -> Output:
        """tokens (batch, length), after the tokens in the cache; mask (batch, past + length) is 0 at padding.

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
        """Which keys each query sees, (1 or batch, 1, end - start, end): those up to itself that are no padding."""
        place = torch.arange(end, device=self.cos.device)  # (end)
        visible = (place <= place[start:, None])[None, None]  # (1, 1, length, end)
        if mask is None:
            return visible
        # A padded query sees itself: over an empty row softmax would be 0 / 0.
        return visible & mask[:, None, None].bool() | (place == place[start:, None])  # (batch, 1, length, end)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, temperature: float = 0.0, top_k: int | None = None,
                 mask: Tensor | None = None, use_cache: bool = True) -> Tensor:
        """tokens (batch, length) and `count` more, (batch, length + count): the likeliest, or drawn if temperature > 0.

        Sampling is from softmax(logits / temperature) over the `top_k` likeliest, with torch's default generator.
        Padding, 0 in mask (batch, length), belongs on the left.
        """
        cache: list[Pair] | None = None
        for _ in range(count):
            output = self(tokens if cache is None else tokens[:, -1:], mask, cache, use_cache)
            cache = output.cache
            chosen = choose(output.logits[:, -1], temperature, top_k)  # (batch, 1)
            tokens = torch.cat((tokens, chosen), dim=1)
            mask = None if mask is None else torch.cat((mask, torch.ones_like(chosen, dtype=mask.dtype)), dim=1)
        return tokens


def choose(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """One token for each row of logits (batch, vocabulary): (batch, 1)."""
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (batch, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1)
