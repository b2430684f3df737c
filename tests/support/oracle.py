"""What an injected model must compute, without lorafx: W + sum w s B A in W's place."""

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import lorafx


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every A and B of an injected model random values: a zero B would hide most errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in lorafx.adapters(model):
            for parameter in lorafx.parameters(model, adapter):
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value / (1, *parameter.shape)[-1] ** 0.5)
    return model


Factors = dict[str, list[tuple[Tensor, Tensor, float]]]  # {site: [(A, B, scale)]}


def oracle(base: nn.Module, sites: list[Any], factors: Factors, *args: Any) -> Any:
    """base(*args) with each site's delta added to its weight, under all names; differentiable."""
    tensors = dict(base.named_parameters(remove_duplicate=False))
    replaced: dict[str, Tensor] = {}
    for site in sites:
        for name in site.names:
            key = name if name in tensors else f"{name}.weight".lstrip(".")
            delta = sum(scale * B @ A for A, B, scale in factors[site.name])
            replaced[key] = tensors[key] + (
                delta.mT if site.transposed and factors[site.name] else delta
            )
    return functional_call(base, replaced, args, tie_weights=False)


class Oracle:
    """A base's copy with W + sum s B A, and the gradients of A and B by the chain rule."""

    def __init__(self, base: nn.Module, sites: list[Any], factors: Factors) -> None:
        self.model = copy.deepcopy(base).requires_grad_()
        self.outputs: Any = None
        self.uses: list[tuple[nn.Parameter, Any, Tensor, Tensor, float]] = []
        made: dict[Any, nn.Parameter] = {}
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        for site in sites:
            names = [name.partition("[")[0] for name in site.names]
            keys = tuple(
                name if name in tensors else f"{name}.weight".lstrip(".") for name in names
            )
            weight = made.setdefault(keys, nn.Parameter(tensors[keys[0]].detach().clone()))
            for key in keys:
                owner, _, attribute = key.rpartition(".")
                self.model.get_submodule(owner).register_parameter(attribute, weight)
            for A, B, scale in factors[site.name]:
                block = _block(site, weight.data)
                block += (scale * B @ A).detach()
                self.uses.append((weight, site, A, B, scale))

    def gradients(self) -> list[Tensor]:
        """Of A and B, in the order of sites, from the gradients of W."""
        found = []
        for weight, site, A, B, scale in self.uses:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            block = _block(site, gradient)
            found += [scale * B.mT @ block, scale * block @ A.mT]
        return [tensor.detach() for tensor in found]


def _block(site: Any, weight: Tensor) -> Tensor:
    """The part of a weight that a site is, as (out, in): q, k or v is a third of the rows."""
    matrix = weight.mT if site.transposed else weight
    if site.name.endswith("]"):
        return matrix.chunk(3)["qkv".index(site.name[-2])]
    return matrix


def factors_of(model: nn.Module, weights: dict[str, float]) -> Factors:
    """{site: [(A, B, weight * scale)]}, from the state_dict's names and the modules' scales."""
    found: Factors = {}
    for path, module in model.named_modules():
        owner, _, adapter = path.rpartition(".")
        if isinstance(getattr(module, "A", None), nn.Parameter) and adapter in weights:
            parent, _, name = owner.rpartition(".")
            attribute, bracket, block = name.partition("[")
            site = (
                parent
                if attribute == "lora"
                else ".".join(filter(None, (parent, attribute.removeprefix("lora_"))))
            )
            site += bracket + block
            found.setdefault(site, []).append((module.A, module.B, weights[adapter] * module.scale))
    return found


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def fingerprint(model: nn.Module) -> Any:
    """All that must not change in the caller's model: bits, flags, identities, keys, classes."""
    def digest(tensor: Tensor) -> str:
        return hashlib.sha256(
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()

    tensors = [
        (name, digest(t), id(t), t.requires_grad, t.dtype, t.grad is None)
        for name, t in tensors_of(model)
    ]
    modules = [(path, type(m), m.training, sorted(vars(m)), list(m._modules), len(m._forward_hooks))
               for path, m in model.named_modules(remove_duplicate=False)]
    return tensors, modules, list(model.state_dict())


def frozen(model: nn.Module) -> nn.Module:
    """A deep copy that requires no grad, to compare with (ATen picks kernels by the flag)."""
    return copy.deepcopy(model).requires_grad_(False)
