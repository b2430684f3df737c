"""Models and their sites, counted by hand: the table, and torch's own modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


@dataclasses.dataclass(frozen=True)
class Row:
    """A model: how it is built and called, and its weights of linear calls, counted by hand."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], tuple[Tensor, ...]]
    sites: int
    no_gradient: frozenset[str] = frozenset()  # sites whose weights get none in the original either
    missed: int = 0  # of them lorafx leaves alone, and names
    exact: bool = True  # grad mode and requires_grad leave the original's kernels as they are


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, MEMORY = drawn(2, 5, 8), drawn(2, 4, 8, seed=1)
PADDING = torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])
ROWS: list[Row] = []


def row(sites: int, *calls: Any) -> Callable[[Any], Any]:
    """Register a module class, called with each tuple or dict of keywords, or with (X,)."""
    def register(cls: Any) -> Any:
        def run(model: nn.Module) -> tuple[Tensor, ...]:
            results = [
                model(**call) if isinstance(call, dict) else model(*call)
                for call in calls or ((X,),)
            ]
            return tuple(tensor for result in results for tensor in flat(result))

        ROWS.append(Row(cls.__name__, lambda: cls().double(), run, sites))
        return cls
    return register


def flat(result: Any) -> list[Tensor]:
    """The tensors in what a model returns."""
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in flat(item)]
    return [result] if isinstance(result, Tensor) else []


def torch_row(
    name: str,
    build: Callable[[], nn.Module],
    sites: int,
    call: Callable[[nn.Module], Any],
    exact: bool = True,
) -> None:
    """Register a module of torch's own."""
    ROWS.append(
        Row(
            name, lambda: build().double(), lambda model: tuple(flat(call(model))), sites,
            exact=exact
        )
    )


# torch's own modules. An attention has four weights: query, key, value and output.
ATTENTION = 4
torch_row(
    "attention", lambda: nn.MultiheadAttention(8, 2, batch_first=True), ATTENTION,
    lambda m: m(X, X, X), exact=False
)
torch_row(
    "attention with masks", lambda: nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True),
    ATTENTION,
    lambda m: m(
        X, X, X, key_padding_mask=PADDING, attn_mask=torch.ones(5, 5).tril() == 0, is_causal=False
    ),
    exact=False
)
torch_row("attention across", lambda: nn.MultiheadAttention(8, 2, batch_first=True), ATTENTION,
          lambda m: m(X, MEMORY, MEMORY), exact=False)
torch_row(
    "attention of three widths",
    lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True), ATTENTION,
    lambda m: m(X, drawn(2, 3, 6), drawn(2, 3, 4)), exact=False
)
torch_row(
    "attention without biases", lambda: nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True),
    ATTENTION, lambda m: m(X, X, X, need_weights=False), exact=False
)
torch_row(
    "encoder layer", lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ATTENTION + 2,
    lambda m: m(X), exact=False
)
torch_row(
    "encoder layer, norm first",
    lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True), ATTENTION + 2,
    lambda m: m(X, src_key_padding_mask=PADDING), exact=False
)
torch_row(
    "encoder",
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
    2 * (ATTENTION + 2), lambda m: m(X, src_key_padding_mask=PADDING)[~PADDING], exact=False
)
torch_row(
    "decoder",
    lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2),
    2 * (2 * ATTENTION + 2), lambda m: m(X, MEMORY), exact=False
)
torch_row("transformer", lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
          (ATTENTION + 2) + (2 * ATTENTION + 2), lambda m: m(X, MEMORY), exact=False)
torch_row(
    "recurrent", lambda: nn.Sequential(nn.LSTM(8, 8), First(), nn.Linear(8, 3)), 1, lambda m: m(X)
)
torch_row(
    "convolutions",
    lambda: nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5), nn.Linear(8, 3)), 1,
    lambda m: m(X)
)
torch_row("adaptive softmax", lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], 2.0), 1 + 2 * 2,
          lambda m: m.log_prob(X[0]))
torch_row("weight norm", lambda: parametrizations.weight_norm(nn.Linear(8, 6)), 1, lambda m: m(X))
torch_row(
    "spectral norm",
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Tanh()), 1,
    lambda m: m(X)
)
torch_row("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(8, 8)), 1, lambda m: m(X))
torch_row("parametrized", lambda: symmetric(nn.Linear(8, 8)), 1, lambda m: m(X))


class First(nn.Module):
    def forward(self, x: Any) -> Any:
        return x[0]


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


def symmetric(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Symmetric())
