"""The layers of MiniMind: norm, rotary embedding, attention, feed-forward, mixture of experts."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a model; its tokens are bytes; `experts=0`: one feed-forward for all tokens."""

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
            raise ValueError(f"hidden={self.hidden} must be a multiple of twice heads={self.heads}"
                             f", and heads one of kv_heads={self.kv_heads}.")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} must be 1 to "
                             f"experts={self.experts}.")

    @property
    def head(self) -> int:
        """Features of one attention head."""
        return self.hidden // self.heads

    @property
    def inner(self) -> int:
        """Features inside the feed-forward: by default 8/3 of hidden, up to a multiple of 64."""
        return self.feed_forward or 64 * -(-8 * self.hidden // (3 * 64))


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + epsilon), over the last dimension (arXiv:1910.07467)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size), in x's dtype; the mean is taken in float32."""
        wide = x.float()
        mean_square = wide.square().mean(-1, keepdim=True)  # (..., 1)
        return self.weight * (wide * torch.rsqrt(mean_square + self.epsilon)).type_as(x)


def rotary_tables(size: int, length: int, base: float) -> Pair:
    """cos and sin (length, size / 2) of position * base^(-2 i / size) (arXiv:2104.09864)."""
    frequencies = base ** (-torch.arange(0, size, 2).float() / size)  # (size / 2)
    angles = torch.outer(torch.arange(length).float(), frequencies)  # (length, size / 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Pair) -> Tensor:
    """x (batch, heads, length, size), its pairs (x_i, x_(i + size / 2)) turned by their angles."""
    cos, sin = rotation  # (length, size / 2)
    first, second = x.chunk(2, dim=-1)  # (batch, heads, length, size / 2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal attention; groups of query heads share a key and value head; q, k are normalised."""

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

    def forward(self, x: Tensor, rotation: Pair, visible: Tensor | None,
                past: Pair | None) -> tuple[Tensor, Pair]:
        """x (batch, length, hidden) -> the same shape, and the keys and values.

        These are (batch, kv_heads, past + length, head). `visible`, broadcast to (batch, heads,
        length, past + length), says which key each query sees; None is causal.
        """
        batch, length, _ = x.shape
        q, k, v = (y.view(batch, length, -1, self.config.head).transpose(1, 2)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))  # (b, heads, l, head)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        y = self.attend(q, k, v, visible)  # (batch, heads, length, head)
        y = self.o_proj(y.transpose(1, 2).flatten(-2))
        return self.output_dropout(y), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(head)) v over the visible keys: (batch, heads, length, head)."""
        groups = self.config.heads // self.config.kv_heads
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))  # as many heads as q
        dropout = self.config.dropout if self.training else 0.0
        if self.config.flash:
            causal = visible is None
            return F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=causal)
        if visible is None:
            shape = q.shape[2], k.shape[2]
            visible = torch.ones(shape, dtype=torch.bool, device=q.device).tril()
        scores = q @ k.transpose(-2, -1) / self.config.head ** 0.5
        scores = scores.masked_fill(~visible, float("-inf"))
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
    """The sum over the k likeliest experts of p_i expert_i(x), plus the shared experts.

    The p_i are scaled to sum to 1. After a training forward `aux_loss` holds aux_weight * experts *
    sum_i f_i P_i, f_i the share of choices that fell on expert i and P_i its mean probability
    (Fedus et al. 2021, arXiv:2101.03961, eq. 4); in eval it is 0.
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
                added = weights[where, slot, None] * expert(rows[where])
                y.index_add_(0, where, added.to(y.dtype))
        for expert in self.shared:
            y = y + expert(rows)
        self.aux_loss = self.balance(probabilities, chosen) if self.training else 0.0
        return y.view_as(x)

    def balance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        """The loss, a scalar, that is least when all experts get the same work."""
        share = F.one_hot(chosen, self.config.experts).float().mean((0, 1))  # (experts)
        products = share * probabilities.float().mean(0)  # (experts)
        return self.config.aux_weight * self.config.experts * products.sum()
