"""Whether adapters do nothing before training and each something after: lorafx and PEFT alike."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import lorafx

RANK = 4
SEED = 0


@dataclasses.dataclass
class Adapted:
    """What one library did with a model; `error` says what it raised; None is what is not known.

    The fields from `sites` to `breaks` are lorafx's own.
    """

    layers: int | None = None
    sites: int | None = None
    regions: int | None = None
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    breaks: dict[str, str] = dataclasses.field(default_factory=dict)
    identity: dict[str, bool] = dataclasses.field(default_factory=dict)
    silent: list[str] = dataclasses.field(default_factory=list)
    without_gradient: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    unnamed: list[str] = dataclasses.field(default_factory=list)
    finished: bool = False
    error: str = ""

    def identical(self) -> bool | None:
        """Whether the output before training was the original's, in all modes compared."""
        return all(self.identity.values()) if self.identity else None

    def no_silent(self) -> bool | None:
        """Whether every adapter at a weight in use changed the output and got a gradient."""
        if not self.identity or not self.finished:
            return None
        return not (self.silent or self.without_gradient or self.unnamed)

    def problems(self) -> list[str]:
        """What failed, one sentence each."""
        found = [f"raised {self.error}"] if self.error else []
        found += [f"not identical in {mode}" for mode, same in self.identity.items() if not same]
        for names, what in ((self.silent, "silent"), (self.without_gradient, "without a gradient"),
                            (self.unnamed, "neither adapted nor named")):
            if names:
                found.append(f"{len(names)} {what}, such as {names[0]}")
        return found


@dataclasses.dataclass
class Layer:
    """An adapted layer: name, A (rank, in), B (out, rank), the original's weight, and its rows."""

    name: str
    A: nn.Parameter
    B: nn.Parameter
    weight: nn.Parameter
    rows: slice = dataclasses.field(default_factory=lambda: slice(None))

    @contextlib.contextmanager
    def random(self) -> Iterator[None]:
        """B is random inside, N(0, 1 / rank), and zero again after."""
        with torch.no_grad():
            self.B.normal_(0, self.B.shape[-1] ** -0.5)
            yield
            self.B.zero_()

    def unchanged(self, model: nn.Module, inputs: Any, expected: Sequence[Tensor]) -> bool:
        """Whether the output is the expected one although B is random."""
        with self.random():
            return same(outputs(model, inputs), expected)


def tensors(value: Any) -> Iterator[Tensor]:
    """All floating point tensors in an output, however deep, but for those of caches."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in tensors(item))


def outputs(model: nn.Module, inputs: Mapping[str, Any], mode: str = "eval",
            grad: bool = False) -> list[Tensor]:
    """What the model computes, from the same seed every time."""
    transformers.set_seed(SEED)
    model.train(mode == "train")
    with torch.set_grad_enabled(grad):
        return list(tensors(model(**copy.deepcopy(dict(inputs)))))


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two outputs are equal bit for bit; NaN equals NaN."""
    if [tensor.shape for tensor in one] != [tensor.shape for tensor in other]:
        return False
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(one, other))


def differ(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two outputs differ by more than rounding: by 1e-6 of a tensor's largest value."""
    return any(a.shape != b.shape or bool(((a - b).abs() > 1e-6 * a.abs().max()).any())
               for a, b in zip(one, other) if a.numel())


def check_layers(base: nn.Module, model: nn.Module, layers: Sequence[Layer],
                 fold: Callable[[], nn.Module], inputs: Any, found: Adapted) -> None:
    """Which adapters are silent, which get no gradient, and which weights the model does not use.

    `fold` makes a plain model whose weights hold W + s B A.
    """
    expected = outputs(base, inputs)
    quiet = [layer for layer in layers if layer.unchanged(model, inputs, expected)]
    with contextlib.ExitStack() as stack:
        for layer in quiet:
            stack.enter_context(layer.random())
        any_used = bool(quiet) and differ(outputs(fold(), inputs), expected)
    for layer in quiet:
        with layer.random():
            used = any_used and differ(outputs(fold(), inputs), expected)
        (found.silent if used else found.unused).append(layer.name)
    try:
        reference = gradients_of(base, inputs, [(layer.weight, layer.rows) for layer in layers])
    except RuntimeError:
        return  # the model itself writes into what backward needs
    gradients = gradients_of(model, inputs, [(layer.B, slice(None)) for layer in layers])
    for layer, given, own in zip(layers, gradients, reference):
        if own and not given and layer.name not in (*found.silent, *found.unused):
            found.without_gradient.append(layer.name)


def gradients_of(model: nn.Module, inputs: Any,
                 wanted: Sequence[tuple[nn.Parameter, slice]]) -> list[bool]:
    """Whether these rows get a gradient that is not zero, of a random function of the outputs."""
    parameters = [parameter for parameter, _ in wanted]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        generator = torch.Generator().manual_seed(SEED)
        found = [tensor for tensor in outputs(model, inputs, grad=True)
                 if tensor.requires_grad and not tensor.is_complex()]
        loss: Any = 0
        for tensor in found:
            loss = loss + (tensor * torch.randn(tensor.shape, generator=generator)).sum()
        gradients: Sequence[Tensor | None] = [None] * len(parameters)
        if isinstance(loss, Tensor):
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return [gradient is not None and bool((gradient[rows] != 0).any())
            for gradient, (_, rows) in zip(gradients, wanted)]


def check(base: nn.Module, model: nn.Module, layers: Sequence[Layer], fold: Callable[[], nn.Module],
          inputs: Any, modes: Sequence[str], found: Adapted) -> None:
    """All checks of a library's model against the frozen original; `inputs` None: it does not run.

    `modes` are those of eval and train in which the original gives the same output twice. With
    gradients the original may be frozen or train the adapted weights: ATen picks kernels by what
    requires a gradient.
    """
    found.layers = len(layers)
    trained = copy.deepcopy(base)
    with torch.no_grad():
        for layer in layers:
            layer.A.normal_(0, layer.A.shape[-1] ** -0.5)
    if inputs is None or "eval" not in modes:
        return
    for mode in modes:
        found.identity[mode] = same(outputs(model, inputs, mode), outputs(base, inputs, mode))
    check_layers(base, model, layers, fold, inputs, found)
    if "train" in modes:
        names = {id(weight): name for name, weight in base.named_parameters()}
        for layer in layers:
            trained.get_parameter(names[id(layer.weight)]).requires_grad_(True)
        result = outputs(model, inputs, "train", grad=True)
        found.identity["train with gradients"] = any(
            same(result, outputs(original, inputs, "train", grad=True))
            for original in (base, trained))


def check_lorafx(base: nn.Module, inputs: Any, modes: Sequence[str], found: Adapted) -> None:
    """Inject into every linear call, count, and check."""
    try:
        sites = lorafx.sites(base)
    except lorafx.NoSiteError:
        sites = []
    found.sites = len(sites)
    if not sites:
        found.layers = 0
        return
    model = lorafx.inject(base, RANK, targets="linear")
    summary = lorafx.summary(model)
    found.skipped, found.breaks = dict(summary.skipped), dict(summary.breaks)
    found.regions = sum(isinstance(module, fx.GraphModule) for module in model.modules())
    weights = dict(base.named_parameters(remove_duplicate=False))
    factors = dict(lorafx.named_parameters(model))
    layers = []
    for site in sites:
        name = site.name.partition("[")[0]
        weight = weights[name] if name in weights else weights[f"{name}.weight".lstrip(".")]
        rows = slice(None) if site.rows is None else slice(site.rows[0], sum(site.rows))
        branch = branch_of(site.name, factors)
        A, B = factors[f"{branch}.default.A"], factors[f"{branch}.default.B"]
        layers.append(Layer(site.name, A, B, weight, rows))
    check(base, model, layers, lambda: lorafx.merge(model, untie=True), inputs, modes, found)
    found.layers = len(summary.sites)
    if found.identity:
        named = {name for site in sites for name in site.names} | found.skipped.keys()
        found.unnamed = [path for path, module in base.named_modules()
                         if isinstance(module, (nn.Linear, Conv1D)) and path not in named
                         and uses(base, module.weight, inputs)]


def branch_of(site: str, factors: Mapping[str, Tensor]) -> str:
    """The path of the branch at a site, such as "layers.0.lora" or "attention.lora_in_proj[q]"."""
    name, bracket, block = site.partition("[")
    owner, _, attribute = name.rpartition(".")
    for path in (f"{name}.lora{bracket}{block}", f"{owner}.lora_{attribute}{bracket}{block}",
                 f"lora_{attribute}{bracket}{block}", "lora"):
        if f"{path}.default.A" in factors:
            return path
    raise KeyError(f"no branch at {site}")


def uses(model: nn.Module, weight: nn.Parameter, inputs: Any) -> bool:
    """Whether the output changes when a weight does."""
    expected, whole = outputs(model, inputs), weight.clone()
    with torch.no_grad():
        weight += torch.randn_like(weight)
        changed = not same(outputs(model, inputs), expected)
        weight.copy_(whole)
    return changed


def check_peft(base: nn.Module, inputs: Any, modes: Sequence[str], found: Adapted) -> None:
    """The same with PEFT's all-linear, which adapts stacked experts too."""
    if not any(isinstance(module, (nn.Linear, Conv1D)) for module in base.modules()):
        found.layers = 0
        return
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    layers = []
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            path = path.replace(".base_layer", "")
            name = getattr(module, "parameter_name", "weight")
            weight = base.get_submodule(path).get_parameter(name)
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            layers.append(Layer(path if name == "weight" else f"{path}.{name}", A, B, weight))

    def fold() -> nn.Module:
        return copy.deepcopy(model).merge_and_unload()

    check(base, model, layers, fold, inputs, modes, found)


def randomise(model: nn.Module) -> None:
    """Freeze all; matrices N(0, 1 / in), small vectors N(0, 0.1^2): no zero hides an adapter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.numel():
                continue
            if parameter.dim() > 1:
                parameter.normal_(0, (parameter.numel() / parameter.shape[0]) ** -0.5)
            elif parameter.abs().max() < 0.1:
                parameter.normal_(0, 0.1)
        model.requires_grad_(False)
