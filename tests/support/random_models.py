"""Random models: hypothesis draws a list of steps, which are a class's forward as source."""

import dataclasses
import linecache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

WIDTHS = (2, 3, 5, 7, 11)

# A step is a line of forward, with x for the running value and {n} for the layer's number.
# `square` keeps the width.
LINES = {
    "call": "x = self.l{n}(x)",
    "keyword": "x = self.l{n}(input=x)",
    "functional": "x = F.linear(x, self.l{n}.weight, self.l{n}.bias)",
    "functional_keywords": "x = F.linear(weight=self.l{n}.weight, input=x, bias=self.l{n}.bias)",
    "functional_no_bias": "x = F.linear(x, weight=self.l{n}.weight)",
    "parameter": "x = F.linear(x, self.p{n})",
    "product": "x = x @ self.p{n}",
    "matmul": "x = torch.matmul(x, self.l{n}.weight.T)",
    "nested": "x = self.s{n}.inner(x)",
}
SQUARE_LINES = {
    "residual": "x = x + self.l{n}(x)",
    "twice": "x = self.l{n}(self.l{n}(x))",
    "both_ways": "x = self.l{n}(x) + F.linear(x, self.l{n}.weight)",
    "two_names": "x = self.l{n}(x) + self.again{n}(x) / 2",
    "encode_and_decode": "x = x @ self.l{n}.weight + F.linear(x, self.l{n}.weight)",
    "tied": "x = self.l{n}(x) + self.tied{n}(x)",
    "loop": "x = self.s{n}(x)",
}
PLAIN_LINES = {
    "tanh": "x = torch.tanh(x)",
    "scale": "x = x * self.factor",
    "break_on_mode": "x = self.mode(x)",
    "silu": "x = F.silu(x) * x",
}


@dataclasses.dataclass(frozen=True)
class Net:
    """A drawn model and its adapters' expected sites, by name, in the order of registration."""

    source: str
    model: nn.Module
    width: int
    sites: tuple[str, ...]

    def __repr__(self) -> str:
        return self.source


class Loop(nn.Module):
    """A graph break with a linear layer below it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.inner(x)
        return x


class Mode(nn.Module):
    """Python that decides by the mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x / 2


@st.composite
def nets(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Net:
    """A model of up to six steps with at least one linear call, weights drawn from a seed."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    first = width = draw(st.sampled_from(WIDTHS))
    lines, made, sites = [], {}, []
    for n in range(draw(st.integers(2, 6))):
        kind = draw(
            st.sampled_from([*LINES, *SQUARE_LINES, *PLAIN_LINES] if n else [*LINES, *SQUARE_LINES])
        )
        lines.append({**LINES, **SQUARE_LINES, **PLAIN_LINES}[kind].format(n=n))
        if kind in PLAIN_LINES:
            continue
        out = width if kind in SQUARE_LINES else draw(st.sampled_from(WIDTHS))
        layer = nn.Linear(width, out, bias=draw(st.booleans()))
        if kind in ("parameter", "product"):
            made[f"p{n}"] = nn.Parameter(
                torch.randn((out, width) if kind == "parameter" else (width, out)) / width
            )
            sites.append(f"p{n}")
        elif kind in ("nested", "loop"):
            made[f"s{n}"] = Loop(layer)
            sites.append(f"s{n}.inner")
        else:
            made[f"l{n}"] = layer
            sites.append(f"l{n}")
        if kind == "two_names":
            made[f"again{n}"] = layer
        if kind == "tied":
            made[f"tied{n}"] = nn.Linear(width, width)
            made[f"tied{n}"].weight = layer.weight
        width = out
    return _build(lines, made, first, tuple(sites), dtype)


def _build(
    lines: list[str], made: dict[str, Any], width: int, sites: tuple[str, ...], dtype: torch.dtype
) -> Net:
    source = (
        "def forward(self, x):\n" + "".join(f"    {line}\n" for line in lines) + "    return x\n"
    )
    filename = f"<net {abs(hash(source))}>"
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(source, filename, "exec"), names)
    model = type("DrawnNet", (nn.Module,), {"forward": names["forward"], "__module__": __name__})()
    model.factor = 1.5
    model.mode = Mode()
    for name, value in made.items():
        setattr(model, name, value)
    return Net(source, model.to(dtype), width, sites)
