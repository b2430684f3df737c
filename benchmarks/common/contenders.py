"""The contenders of the speed benchmarks: ways to add s (x A^T) B^T to the same layers of one base.

All share the frozen base's tensors and hold the same values of A and B; a method of adapting is a
row of `CONTENDERS`.
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lorafx

BASE, NOISE = "frozen base", "frozen base again"
PEFT, PEFT_WIDE = "PEFT", "PEFT, float32 adapters"
PATCHED, SINGLE, LORAFX = "patched forward", "lorafx, group=False", "lorafx"
KEPT = "lorafx, recompute=False"
LORAFX_NARROW = "lorafx, dtype of the base"


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What is added: scale * B A, with `values` {layer: (A (rank, in), B (out, rank))}."""

    rank: int
    scale: float
    values: Mapping[str, tuple[Tensor, Tensor]]


def draw(base: nn.Module, names: list[str], rank: int, seed: int = 0) -> Adapters:
    """Random A and B, no B zero, in the base's dtype; scale * B A is a third of W.

    That is a third of the size that nn.Linear draws its weights with: an adapter that is left out,
    or scaled wrongly, cannot pass for rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name in names:
        weight: Any = base.get_submodule(name).weight
        out_features, in_features = weight.shape
        A = torch.randn(rank, in_features, generator=generator) / in_features ** 0.5
        B = torch.randn(out_features, rank, generator=generator) / (10 * rank ** 0.5)
        values[name] = (A.to(weight), B.to(weight))
    return Adapters(rank, 2.0, values)


Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # {layer: (A, B)}


@dataclasses.dataclass
class Contender:
    """One adapted model, its Parameters A and B by layer, and the seconds that adapting took."""

    name: str
    model: nn.Module
    pairs: Pairs
    seconds: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All A and B."""
        return [parameter for pair in self.pairs.values() for parameter in pair]


def frozen_base(base: nn.Module, adapters: Adapters) -> tuple[nn.Module, Pairs]:
    """The base as it is: dX flows through every layer, since the model's input needs a gradient."""
    return base, {}


def peft_model(base: nn.Module, adapters: Adapters,
               wide: bool = False) -> tuple[nn.Module, Pairs]:
    """PEFT, with A and B in the base's dtype, or, if `wide`, as by default in float32."""
    config = peft.LoraConfig(r=adapters.rank, lora_alpha=adapters.scale * adapters.rank,
                             target_modules=list(adapters.values))
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=wide)
    pairs = {}
    for name in adapters.values:
        layer: Any = model.base_model.model.get_submodule(name)
        pairs[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return model, pairs


class LowRank(nn.Module):
    """scale * (x A^T) B^T, the scale on the narrow side."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(*A.mT.shape, bias=False), nn.Linear(*B.mT.shape, bias=False)
        self.A.weight, self.B.weight = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return self.B(self.scale * self.A(x))


def patched(base: nn.Module, adapters: Adapters) -> tuple[nn.Module, Pairs]:
    """Each layer's forward replaced, as MiniMind does, by the original plus a branch."""
    pairs = {}
    for name, (A, B) in adapters.values.items():
        layer: Any = base.get_submodule(name)
        layer.lora = LowRank(A, B, adapters.scale)

        def forward(x: Tensor, original: Callable[..., Tensor] = layer.forward,
                    lora: nn.Module = layer.lora) -> Tensor:
            return original(x) + lora(x)

        layer.forward = forward
        pairs[name] = (layer.lora.A.weight, layer.lora.B.weight)
    return base, pairs


def injected(base: nn.Module, adapters: Adapters, **options: Any) -> tuple[nn.Module, Pairs]:
    """lorafx, with its defaults: A and B are float32 or wider."""
    model = lorafx.inject(base, adapters.rank, alpha=adapters.scale * adapters.rank,
                          targets=list(adapters.values), **options)
    factors: dict[str, Any] = dict(lorafx.named_parameters(model))
    pairs = {}
    for name in adapters.values:
        pairs[name] = factors[f"{name}.lora.default.A"], factors[f"{name}.lora.default.B"]
    return model, pairs


def peft_wide(base: nn.Module, adapters: Adapters) -> tuple[nn.Module, Pairs]:
    """PEFT, with A and B in float32."""
    return peft_model(base, adapters, wide=True)


def injected_single(base: nn.Module, adapters: Adapters) -> tuple[nn.Module, Pairs]:
    """lorafx, without joining the branches that read one value."""
    return injected(base, adapters, group=False)


def injected_kept(base: nn.Module, adapters: Adapters) -> tuple[nn.Module, Pairs]:
    """lorafx, keeping the inputs of linear calls, as all others do."""
    return injected(base, adapters, recompute=False)


def injected_narrow(base: nn.Module, adapters: Adapters) -> tuple[nn.Module, Pairs]:
    """lorafx, with A and B in the base's dtype."""
    return injected(base, adapters, dtype=next(base.parameters()).dtype)


Method = Callable[[nn.Module, Adapters], tuple[nn.Module, Pairs]]
CONTENDERS: dict[str, Method] = {
    BASE: frozen_base,
    NOISE: frozen_base,
    PEFT: peft_model,
    PEFT_WIDE: peft_wide,
    PATCHED: patched,
    SINGLE: injected_single,
    KEPT: injected_kept,
    LORAFX: injected,
    LORAFX_NARROW: injected_narrow,
}
# Who is compared with whom: each by its defaults, then, under a narrow base, A and B of one dtype.
PAIRS = ((LORAFX, PEFT), (KEPT, PEFT), (LORAFX, PEFT_WIDE), (LORAFX_NARROW, PEFT))


def names_for(dtype: torch.dtype) -> list[str]:
    """The contenders at a base's dtype: adapters in float32 differ only where that is narrower."""
    if dtype.itemsize < 4:
        return list(CONTENDERS)
    return [name for name in CONTENDERS if name not in (PEFT_WIDE, LORAFX_NARROW)]


def make_contender(name: str, method: Method, base: nn.Module, adapters: Adapters) -> Contender:
    """What a method makes of a copy of the base, on the same Parameters, with these A and B."""
    fresh = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    began = time.perf_counter()
    model, pairs = method(fresh, adapters)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        for layer, pair in pairs.items():
            for parameter, value in zip(pair, adapters.values[layer]):
                parameter.copy_(value)
    return Contender(name, model.train(), pairs, seconds)


def compiled(contender: Contender, device: torch.device, backend: str) -> Contender:
    """The same, compiled as its users would; on a GPU with CUDA graphs.

    Each contender's recompilations are its own: all but lorafx share the code of their forwards.
    """
    options: dict[str, Any] = {"triton.cudagraphs": True} if device.type == "cuda" else {}
    if contender.name in (LORAFX, LORAFX_NARROW, KEPT):
        options |= lorafx.compile_options()
    model: Any = torch.compile(contender.model, backend=backend, isolate_recompiles=True,
                               options=options if backend == "inductor" else None)
    return dataclasses.replace(contender, model=model)
