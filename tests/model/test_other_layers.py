"""Layers that are not linear are called what they are when refused, and are not graph breaks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorafx


class OwnConvolution(nn.Conv2d):
    """A convolution of another name."""


class Scored(nn.Conv1d):
    """A convolution whose own forward makes a linear call too, and decides something."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.score = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.linear(x, self.score)
        return super().forward(x)


class Projecting(nn.Conv1d):
    """A convolution in which torch's forward calls a method of its own, with linear calls."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.down = nn.Parameter(torch.randn(4, 4))

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.linear(x, self.down).mT, weight, bias).mT


class TiedToIt(nn.Module):
    """A linear layer on a matrix that such a convolution uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Projecting()
        self.head = nn.Linear(4, 4)
        self.head.weight = self.conv.down

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


class Table(nn.Module):
    """A matrix of which a graph break looks up rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(5, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, index: Tensor) -> Tensor:
        if index.ndim:
            return self.head(self.rows[index])
        return self.head(self.rows[0])


LAYERS = {
    "Conv1d": (nn.Conv1d(4, 4, 1), "a convolution (Conv1d)"),
    "Conv2d": (nn.Conv2d(4, 4, 1), "a convolution (Conv2d)"),
    "Conv3d": (nn.Conv3d(4, 4, 1), "a convolution (Conv3d)"),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 4, 1), "a convolution (ConvTranspose2d)"),
    "a subclass": (OwnConvolution(4, 4, 1), "a convolution (OwnConvolution)"),
    "Embedding": (nn.Embedding(4, 4), "an embedding (Embedding)"),
    "EmbeddingBag": (nn.EmbeddingBag(4, 4), "an embedding (EmbeddingBag)"),
    "LSTM": (nn.LSTM(4, 4), "a recurrent layer (LSTM)"),
    "GRU": (nn.GRU(4, 4), "a recurrent layer (GRU)"),
    "RNN": (nn.RNN(4, 4), "a recurrent layer (RNN)"),
    "LSTMCell": (nn.LSTMCell(4, 4), "a recurrent layer (LSTMCell)"),
    "Bilinear": (nn.Bilinear(4, 4, 4), "a bilinear layer (Bilinear)"),
}


@pytest.mark.parametrize("layer, words", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_called_what_it_is(layer: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    reason = f"{words}, which lorafx does not adapt yet"
    with pytest.raises(lorafx.NoSiteError) as raised:
        lorafx.inject(model, targets="1")
    assert f"'1' cannot be adapted: {reason}." in str(raised.value)
    found = lorafx.summary(lorafx.inject(model))
    matrices = {f"1.{name}".removesuffix(".weight"): reason
                for name, parameter in layer.named_parameters() if parameter.ndim > 1}
    assert dict(found.skipped) == matrices
    assert "1" not in found.breaks


def test_alone_it_is_called_so_too() -> None:
    with pytest.raises(lorafx.NoSiteError, match="recurrent layer"):
        lorafx.inject(nn.LSTM(4, 4))


def test_an_embedding_that_is_a_head_too_is_adapted() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)

        def forward(self, index: Tensor) -> Tensor:
            return F.linear(self.table(index), self.table.weight)

    assert [site.name for site in lorafx.sites(Tied())] == ["table"]


def test_a_subclass_with_a_forward_of_its_own_is_a_graph_break() -> None:
    model = nn.Sequential(Scored())
    assert [site.name for site in lorafx.sites(model)] == ["0.score"]
    found = lorafx.summary(lorafx.inject(model, targets="linear"))
    assert "Scored: forward branches" in found.breaks["0"]
    assert found.skipped["0"] == "a convolution (Scored), which lorafx does not adapt yet"


def test_a_matrix_that_a_graph_break_reads_is_said_to_be_of_one() -> None:
    found = lorafx.summary(lorafx.inject(Table()))
    assert found.skipped["rows"].startswith(
        "no linear call on it was found, and its module is a graph break: "
        "Table: forward branches or loops"
    )


def test_a_method_that_torchs_forward_calls_may_make_linear_calls() -> None:
    base, x = TiedToIt(), torch.randn(2, 3, 4)
    assert [(site.name, site.aliases) for site in lorafx.sites(base)] == [("conv.down", ("head",))]
    model = lorafx.inject(base, rank=2)
    assert "conv" in lorafx.summary(model).breaks
    with torch.no_grad():
        for parameter in lorafx.parameters(model):
            parameter.normal_()
    A, B = lorafx.parameters(model)
    down = base.conv.down + B @ A
    both = {"conv.down": down, "head.weight": down}
    expected = torch.func.functional_call(base, both, x)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(lorafx.merge(model)(x), expected)
    lorafx.add(model, "other", rank=1)
    assert len(list(lorafx.parameters(model, "other"))) == 2
