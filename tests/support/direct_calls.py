"""A model of three adapted linear calls, what they give, and how many of them were direct."""

import torch
from torch import nn

import lorafx
from lorafx._model import direct, lower

WIDTHS = (13, 7)


class Gated(nn.Module):
    """Two linear calls of x, which are joined, and one of what they give."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(*WIDTHS), nn.Linear(*WIDTHS, bias=False)
        self.down = nn.Linear(*WIDTHS[::-1])

    def forward(self, x):
        return self.down(self.gate(x).tanh() * self.up(x))


def injected(base_dtype=torch.float32, **options):
    """A model that was called, so that what is asked once has been asked."""
    torch.manual_seed(0)
    model = lorafx.inject(Gated().to(base_dtype), rank=3, alpha=6, targets="linear", **options)
    renew(model)
    model.eval()
    with torch.no_grad():
        model(X["one row"].to(base_dtype))
    return model


def renew(model, seed=1):
    """Other values, written past every version."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lorafx.parameters(model):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def truth(model, x, weights=None):
    """The result of W + sum w s B A in float64, without lorafx."""
    found = Gated().double()
    for name, layer in found.named_children():
        adapted = model.get_submodule(name)
        total = adapted.frozen_weight.double()
        for adapter, weight in (weights or {"default": 1.0}).items():
            factors = adapted.lora.get_submodule(adapter)
            total = total + weight * factors.scale * factors.B.double() @ factors.A.double()
        layer.weight.data.copy_(total)
        if layer.bias is not None:
            layer.bias.data.copy_(adapted.bias)
    with torch.no_grad():
        return found(x.double())


torch.manual_seed(0)
X = {
    "one row": torch.randn(1, 1, 13),
    "a vector": torch.randn(13),
    "rows": torch.randn(2, 5, 13),
    "a matrix": torch.randn(4, 13),
    "transposed rows": torch.randn(2, 13, 5).transpose(1, 2),
    "none": torch.randn(0, 13),
}


class Calls:
    """Counts the calls that were direct."""

    def __init__(self, monkeypatch):
        self.count = 0

        directly = direct.directly

        def counted(*operands):
            result = directly(*operands)
            self.count += len(result)
            return result

        for module in (direct, lower):
            monkeypatch.setattr(module, "directly", counted)

    def since(self, compute):
        before = self.count
        result = compute()
        return result, self.count - before


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
