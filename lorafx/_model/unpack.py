"""Folding into weights that are stored packed or quantised: W + s B A, plain or packed again."""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .._adapter.config import FLOATS
from .._graph.modules import Place, users_modules
from .._kernels.addend import Addend
from .._kernels.weights import whole
from .packings import packing_of
from .quantised import is_packed, packed_again, stand_in, tensors_of, weight_and_bias
from .quantised_tensors import dense, quantised_again, tensor_packing_of


def is_quantised(place: Place) -> bool:
    """True if W is stored packed by its layer, or quantised by the class of its tensor."""
    weight = place.module._parameters.get(place.attribute)
    return is_packed(place.module) or tensor_packing_of(weight) is not None


class Unpacking:
    """Puts W + sum s L R in the place of quantised weights of a model that nothing else uses.

    A layer that packs its weight becomes a plain nn.Linear, or with `requantize` another of its
    kind; `errors` then has, by site, the norm of what quantising changed over that of the addend.
    """

    def __init__(self, model: nn.Module, requantize: bool) -> None:
        self.model, self.requantize = model, requantize
        self.errors: dict[str, float] = {}

    def fold(self, name: str, places: Sequence[Place], addends: Sequence[Addend]) -> None:
        """Fold addends into the weight at these places, of the site of this name."""
        owner, attribute = places[0]
        addends = [addend.detached for addend in addends]
        if not is_packed(owner):
            weight = owner._parameters[attribute]
            assert weight is not None
            new = nn.Parameter(self._folded_tensor(name, weight, addends), weight.requires_grad)
            for place in places:
                place.module._parameters[place.attribute] = new
            return
        W, _ = weight_and_bias(owner)
        total = whole(W, addends)
        shared: nn.Parameter | None = None
        for layer, _ in places:
            if self.requantize:
                made = packed_again(layer, name, total)
                self._note(name, W, total, weight_and_bias(made)[0])
            else:
                made = self._plain_layer(layer, total)
                shared = made._parameters["weight"] if shared is None else shared
                made._parameters["weight"] = shared
            self._replace(layer, made)

    def foretold(
        self, name: str, place: Place, addends: Sequence[Addend], dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        """W, and what `fold` would store of W + sum s L R for a base cast to this dtype, if any."""
        owner, attribute = place
        if is_packed(owner):
            W, _ = weight_and_bias(owner)
            total = whole(W, addends)
            if self.requantize:
                return W, weight_and_bias(packed_again(owner, name, total))[0]
            return W, total.to(dtype or self._dtype_of_plain(owner))
        weight = owner._parameters[attribute]
        assert weight is not None
        W = dense(weight)
        if self.requantize:
            total = whole(W.to(torch.promote_types(W.dtype, torch.float32)), addends)
            return W, dense(quantised_again(weight, name, total))
        W = W if dtype is None else W.to(dtype)
        return W, whole(W, addends)

    @cached_property
    def _dtype_around(self) -> torch.dtype | None:
        """The dtype of most weights of the model that are not quantised, or None without any.

        A packed layer casts its input and its output, a plain one must have the dtype of its input.
        """
        counts: Counter[torch.dtype] = Counter()
        for module in users_modules(self.model).values():
            if not is_packed(module):
                for tensor in tensors_of(module):
                    if tensor is not None and tensor.dtype in FLOATS:
                        counts[tensor.dtype] += tensor.numel()
        return counts.most_common(1)[0][0] if counts else None

    def _dtype_of_plain(self, layer: Any) -> torch.dtype:
        """The dtype of the nn.Linear that a packed layer becomes."""
        return self._dtype_around or stand_in(layer).dtype

    def _folded_tensor(self, name: str, weight: Tensor, addends: Sequence[Addend]) -> Tensor:
        W = dense(weight)
        wide = W.to(torch.promote_types(W.dtype, torch.float32))
        total = whole(wide, addends)
        if not self.requantize:
            return total.to(W.dtype)
        new = quantised_again(weight, name, total)
        self._note(name, wide, total, dense(new))
        return new

    def _note(self, name: str, W: Tensor, total: Tensor, stored: Tensor) -> None:
        changed = torch.linalg.vector_norm(stored.double() - total.double())
        added = torch.linalg.vector_norm(total.double() - W.double())
        self.errors[name] = float(changed / added) if added else 0.0

    def _plain_layer(self, layer: Any, W: Tensor) -> nn.Linear:
        """The nn.Linear that computes what a packed layer does with this W."""
        out, width = W.shape
        row = packing_of(layer)
        bias = weight_and_bias(layer)[1] if row is None else row.bias(layer)
        dtype = self._dtype_of_plain(layer)
        made = nn.Linear(width, out, bias=bias is not None, device="meta").train(layer.training)
        made.weight = nn.Parameter(W.to(dtype), requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        for name in _HOOKS:
            vars(made)[name] = vars(layer)[name]
        return made

    def _replace(self, layer: nn.Module, made: nn.Module) -> None:
        if layer is self.model:
            self.model = made
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if child is layer:
                    parent._modules[name] = made


def declare_plain(model: nn.Module, names: Collection[str]) -> None:
    """Let a model of transformers that says it is quantised say that these layers no longer are.

    Else what it saves could not be loaded.
    """
    modules = users_modules(model)
    for path, module in modules.items():
        quantizer, config = vars(module).get("hf_quantizer"), vars(module).get("config")
        if quantizer is None or config is None:
            continue
        prefix = f"{path}." if path else ""
        below = [found for name, found in modules.items() if f"{name}.".startswith(prefix)]
        if not any(is_quantised(Place(m, name)) for m in below for name in m._parameters):
            for name in _SAYS_QUANTISED & vars(module).keys():
                del vars(module)[name]
            del config.quantization_config
            continue
        plain = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        left_plain = [*getattr(quantizer, "modules_to_not_convert", ()), *plain]
        for name in _LEFT_PLAIN & vars(config.quantization_config).keys():
            setattr(config.quantization_config, name, left_plain)


# What transformers sets on a model that it quantised, and where it says what it left alone.
_SAYS_QUANTISED = {"hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit",
                   "is_loaded_in_8bit", "is_4bit_serializable", "is_8bit_serializable"}
_LEFT_PLAIN = {"llm_int8_skip_modules", "modules_to_not_convert"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
