"""The cases: each a tiny model, adapted by PEFT and by lorafx with values of the same size."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrizations import weight_norm

import lorafx
from common import models
from common.counting import held_bytes, saved
from facts_parts.models import WIDTH, Attention, Projections, TiedHead, TwoNames, UsesWeight

RANK, ALPHA = 4, 8
SCALE = ALPHA / RANK


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: `measure` returns what PEFT gives and what lorafx gives, in words."""

    name: str
    measured: str
    measure: Callable[[], tuple[str, str]]


def seeded() -> None:
    """Begin a case with the same random numbers as every other."""
    torch.manual_seed(0)


def by_peft(base: nn.Module, *targets: str, std: float = 0.1) -> Any:
    """PEFT's model of a copy of the base, B not zero."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
    model = peft.get_peft_model(copy.deepcopy(base), config)
    stir(dict(model.named_parameters()), ".lora_", std)
    return model.eval()


def by_lorafx(base: nn.Module, *targets: str, std: float = 0.1) -> Any:
    """lorafx's model, B not zero."""
    model = lorafx.inject(base, RANK, alpha=ALPHA, targets=list(targets))
    stir(dict(lorafx.named_parameters(model)), "", std)
    return model.eval()


def stir(parameters: Mapping[str, Tensor], part: str, std: float = 0.1) -> None:
    """Draw all parameters whose name has this part from N(0, std^2)."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            if part in name:
                parameter.normal_(std=std)


def delta(model: nn.Module, *ends: str) -> Tensor:
    """s B A of the one pair of parameters whose names end so: (out, in)."""
    A, B = (next(parameter for name, parameter in model.named_parameters() if name.endswith(end))
            for end in ends)
    return SCALE * (B.double() @ A.double()).detach()


PEFT_ENDS, LORAFX_ENDS = (".lora_A.default.weight", ".lora_B.default.weight"), (".A", ".B")


def error(y: Tensor, true: Tensor, base: Tensor) -> str:
    """|y - true| / |true - base| in per cent."""
    return f"{100 * float((y - true).norm() / (true - base).norm()):.1f} %"


def share(wrong: Tensor) -> str:
    """The share of entries that are True."""
    return f"{100 * wrong.float().mean().item():.1f} %"


@torch.no_grad()
def output_error(base: nn.Module, weight: str, model: nn.Module, ends: tuple[str, str],
                 x: Tensor) -> str:
    """The error of a model's output; the truth is a copy of the base with W + s B A for W."""
    whole = copy.deepcopy(base)
    whole.get_parameter(weight).add_(delta(model, *ends))
    return error(model(x), whole(x), base(x))


def both(base: nn.Module, target: str, weight: str, x: Tensor) -> tuple[str, str]:
    """The errors of both outputs, where one weight is adapted."""
    base.eval()
    return (output_error(base, weight, by_peft(base, target), PEFT_ENDS, x),
            output_error(base, weight, by_lorafx(base, target), LORAFX_ENDS, x))


def uses_weight() -> tuple[str, str]:
    """F.linear(x, self.layer.weight): PEFT replaces the layer, which is never called."""
    seeded()
    return both(UsesWeight(), "layer", "layer.weight", torch.randn(5, WIDTH))


def two_names() -> tuple[str, str]:
    """PEFT replaces the layer under its first name only."""
    seeded()
    return both(TwoNames(), "first", "first.weight", torch.randn(5, WIDTH))


def encoder() -> tuple[str, str]:
    """In eval, torch's encoder gives the layers' weights to one fused kernel."""
    seeded()
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True)
    return both(nn.TransformerEncoder(layer, 1), "linear1", "layers.0.linear1.weight",
                torch.randn(2, 5, WIDTH))


@torch.no_grad()
def attention() -> tuple[str, str]:
    """out_proj alone: PEFT, which adapts all or nothing, has a B of zero for the others."""
    seeded()
    base, x = Attention().eval(), torch.randn(2, 5, WIDTH)
    theirs, ours = by_peft(base, "attention"), by_lorafx(base, "out_proj")
    theirs.base_model.model.attention.lora_B["default"].weight.zero_()
    ends, weight = tuple(f".out_proj{end}" for end in PEFT_ENDS), "attention.out_proj.weight"
    return (output_error(base, weight, theirs, ends, x),
            output_error(base, weight, ours, LORAFX_ENDS, x))


@torch.no_grad()
def tied_head() -> tuple[str, str]:
    """Merged beside unmerged: what changes the head changes the embedding too."""
    seeded()
    base, tokens = TiedHead().eval(), torch.arange(10)
    theirs, ours = by_peft(base, "head"), by_lorafx(base, "head")
    before = theirs(tokens)
    first = error(theirs.merge_and_unload()(tokens), before, base(tokens))
    second = error(lorafx.merge(ours, untie=True)(tokens), ours(tokens), base(tokens))
    return first, second


@torch.no_grad()
def normed() -> tuple[str, str]:
    """Merged beside unmerged, where the weight is computed from its direction and its norm."""
    seeded()
    base, x = nn.Sequential(weight_norm(nn.Linear(WIDTH, WIDTH))), torch.randn(5, WIDTH)
    ours = by_lorafx(base, "0")
    return raised(lambda: by_peft(base, "0")(x)), error(lorafx.merge(ours)(x), ours(x), base(x))


def raised(call: Callable[[], Any]) -> str:
    """The name of what a call raises, or that it raises nothing."""
    try:
        call()
    except Exception as problem:
        return type(problem).__name__
    return "accepted"


@torch.no_grad()
def weighted_sum() -> tuple[str, str]:
    """0.7 of one adapter and 0.3 of another as one adapter, each library by its defaults."""
    seeded()
    base, x = nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.randn(5, WIDTH)
    weights = {"default": 0.7, "other": 0.3}
    theirs, ours = by_peft(base, "0"), by_lorafx(base, "0")
    theirs.add_adapter("other", peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]))
    stir(dict(theirs.named_parameters()), ".other.")
    theirs.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    lorafx.add(ours, "other", rank=RANK, alpha=ALPHA)
    stir(dict(lorafx.named_parameters(ours, "other")), "")
    lorafx.compose(ours, weights, adapter="sum")
    found = []
    for model, activate in ((theirs, theirs.set_adapter),
                            (ours, lambda name: lorafx.activate(ours, name))):
        true = base(x)
        for name, weight in weights.items():
            activate(name)
            true = true + weight * (model(x) - base(x))
        activate("sum")
        found.append(error(model(x), true, base(x)))
    return found[0], found[1]


@torch.no_grad()
def narrow_merge() -> tuple[str, str]:
    """Entries of a merged weight that are not W + s B A rounded to the nearest bfloat16."""
    seeded()
    base = nn.Sequential(nn.Linear(256, 256)).bfloat16()
    theirs, ours = by_peft(base, "0", std=0.02), by_lorafx(base, "0", std=0.02)
    found = []
    for model, ends in ((theirs, PEFT_ENDS), (ours, LORAFX_ENDS)):
        found.append((base[0].weight.double() + delta(model, *ends)).bfloat16())
    merged = theirs.merge_and_unload(safe_merge=True)[0].weight, lorafx.merge(ours)[0].weight
    return share(merged[0] != found[0]), share(merged[1] != found[1])


@torch.no_grad()
def there_and_back() -> tuple[str, str]:
    """Entries of a bfloat16 weight that are others after merging and taking it back."""
    seeded()
    base = nn.Sequential(nn.Linear(256, 256)).bfloat16()
    theirs, ours = by_peft(base, "0", std=0.02), by_lorafx(base, "0", std=0.02)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    lorafx.merge(ours)
    back = theirs.base_model.model[0].base_layer.weight, lorafx.eject(ours)[0].weight
    return share(back[0] != base[0].weight), share(back[1] != base[0].weight)


def saved_bytes() -> tuple[str, str]:
    """What q, k and v of one x save for backward beyond the frozen base, in sizes of x."""
    seeded()
    base = Projections(256).bfloat16().requires_grad_(False)
    x = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for model in (by_peft(base, "q", "k", "v"), by_lorafx(base, "q", "k", "v")):
        with saved(model) as sizes:
            kept = model.train()(x)
        found.append(f"{sum(sizes.values()) / x.nbytes:.1f} x")
        del kept
    return found[0], found[1]


def training_memory(build: Callable[[int, int], nn.Module], at_peak: bool) -> tuple[str, str]:
    """Bytes of torch's allocator in a training step, over those of the frozen base's step.

    Of two layers of width 256 with gradients through all of it; every linear layer is adapted.
    """
    seeded()
    base = build(256, 2).requires_grad_(False)
    names = models.targets(base, "linear")
    x, labels = torch.randn(4, 128, 256, requires_grad=True), torch.zeros(4, 128).long()
    found = []
    for model in (base, by_peft(base, *names), by_lorafx(base, *names)):
        step(model, x, labels)  # the first has more to do
        if at_peak:
            found.append(held_bytes(lambda: step(model, x, labels), x.device).most)
        else:
            found.append(held_bytes(lambda: models.loss_of(model(x), labels), x.device).after)
    return f"{found[1] / found[0]:.2f} x", f"{found[2] / found[0]:.2f} x"


def step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Forward and backward; no gradient is left."""
    models.loss_of(model(x), labels).backward()
    for tensor in (x, *model.parameters()):
        tensor.grad = None


def traced() -> tuple[str, str]:
    """torch.fx.symbolic_trace of the adapted model."""
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    models = by_peft(base, "0"), by_lorafx(base, "0")
    theirs, ours = (raised(partial(fx.symbolic_trace, model)) for model in models)
    return theirs, ours


def misspelt() -> tuple[str, str]:
    """A list of targets of which one matches nothing."""
    base = Projections()
    return raised(lambda: by_peft(base, "q", "vv")), raised(lambda: by_lorafx(base, "q", "vv"))


CASES = (
    Case("F.linear(x, self.layer.weight)", "error of the output", uses_weight),
    Case("one layer under two names", "error of the output", two_names),
    Case("nn.TransformerEncoder in eval", "error of the output", encoder),
    Case("out_proj of nn.MultiheadAttention", "error of the output", attention),
    Case("head tied to the embedding", "error when merged", tied_head),
    Case("layer under weight_norm", "error when merged", normed),
    Case("0.7 a + 0.3 b as one adapter, by default", "error of the output", weighted_sum),
    Case("bfloat16, safe_merge=True", "weights not rounded to nearest", narrow_merge),
    Case("bfloat16, merged and unmerged", "weights that changed", there_and_back),
    Case("bfloat16, q, k, v of one x", "saved for backward, in sizes of x", saved_bytes),
    *[Case(f"linears of {name} layers, {when}", "bytes of training, over the base's",
           partial(training_memory, build, at_peak))
      for name, build in (("Llama", models.llama), ("BERT", models.encoder))
      for at_peak, when in ((False, "before backward"), (True, "at the peak"))],
    Case("torch.fx.symbolic_trace of the model", "raised", traced),
    Case("a target that matches nothing, in a list", "raised", misspelt),
)
