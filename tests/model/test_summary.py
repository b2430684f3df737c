"""What a summary says of each site: where, with what and how much, against values by hand."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lorafx
from lorafx._graph import modules as graph_modules
from tests.support.models import Block
from tests.support.oracle import randomise


class Gated(nn.Module):
    """Straight-line code, in which gate and up share x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """A graph break around a region and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Gated(), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = self.mlp(x)
        return self.head(x)


def test_where_a_site_is_and_what_is_joined_with_it():
    rows = {row.name: row for row in lorafx.summary(lorafx.inject(Net(), targets="linear")).sites}
    assert {name: row.place for name, row in rows.items()} == {
        "mlp.gate": "region Gated", "mlp.up": "region Gated", "mlp.down": "region Gated",
        "head": "break Net"}
    joined = {name: row.joined for name, row in rows.items() if row.joined}
    assert joined == {"mlp.gate": ("mlp.up",), "mlp.up": ("mlp.gate",)}
    alone = lorafx.summary(lorafx.inject(Net(), targets="linear", group=False))
    assert not any(row.joined for row in alone.sites) and "joined with" not in alone.columns()


def test_blocks_of_one_weight_are_joined_in_a_graph_of_functions():
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 6))
            self.b = nn.Parameter(torch.randn(3, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([F.linear(x, self.a), F.linear(x, self.b)], -1)

    model = lorafx.inject(Projections(), targets=["a[0:2]", "a[2:4]", "b"])
    joined = {row.name: row.joined for row in lorafx.summary(model).sites}
    assert joined == {"a[0:2]": ("a[2:4]", "b"), "a[2:4]": ("a[0:2]", "b"),
                      "b": ("a[0:2]", "a[2:4]")}


def test_the_norm_is_that_of_all_active_adapters_over_w():
    base = Net().double()
    model = randomise(lorafx.inject(base, rank=2, alpha=3, targets="linear"))
    lorafx.add(model, "other", rank=3, targets="linear")
    randomise(model)
    lorafx.activate(model, {"default": 0.5, "other": -2.0})
    merged = lorafx.merge(model)
    for row in lorafx.summary(model).sites:
        W = base.get_parameter(f"{row.name}.weight").detach()
        delta = merged.get_parameter(f"{row.name}.weight").detach() - W
        assert row.relative_norm == pytest.approx(float(delta.norm() / W.norm()), rel=1e-10)
        assert row.parameters == (2 + 3) * (row.in_features + row.out_features)
    lorafx.activate(model, [])
    assert {row.relative_norm for row in lorafx.summary(model).sites} == {0.0}


def test_the_norm_of_rows_experts_and_transposed_weights():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused = nn.Linear(6, 8, dtype=torch.float64)
            self.other = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))  # (in, out)
            self.experts = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.fused(x) @ self.other
            return torch.stack([F.linear(x, weight) for weight in self.experts])

    base = Odd()
    model = randomise(lorafx.inject(base, rank=2, targets=["fused[2:5]", "other", "experts"]))
    merged = lorafx.merge(model)
    whole = {
        "fused[2:5]": (base.fused.weight[2:5], merged.fused.weight[2:5]),
        "other": (base.other, merged.other), "experts": (base.experts, merged.experts)}
    rows = lorafx.summary(model).sites
    assert {row.name: row.size for row in rows} == {
        "fused[2:5]": "3 x 6", "other": "5 x 8", "experts": "3 x 4 x 5"}
    for row in rows:
        before, after = (tensor.detach() for tensor in whole[row.name])
        assert row.relative_norm == pytest.approx(float((after - before).norm() / before.norm()))


def test_a_norm_that_is_not_known_leaves_its_column_out():
    with torch.device("meta"):
        empty = lorafx.inject(nn.Linear(4, 4))
    for found in (lorafx.summary(empty), lorafx.summary(lorafx.inject(Block()), norms=False)):
        assert all(row.relative_norm is None for row in found.sites)
        assert "|sBA| / |W|" not in found.columns() and "|sBA|" not in str(found)
    weight = nn.Linear(4, 4)
    nn.init.zeros_(weight.weight)
    assert lorafx.summary(lorafx.inject(weight)).sites[0].relative_norm == 0
    assert lorafx.summary(randomise(lorafx.inject(weight))).sites[0].relative_norm == float("inf")


def test_text_and_page_have_the_same_cells_and_numbers_stand_to_the_right():
    model = randomise(lorafx.inject(Net(), rank=2, targets="linear"))
    found = lorafx.summary(model)
    assert found.columns() == ("site", "out x in", "rank", "scale", "parameters", "in",
                               "joined with", "|sBA| / |W|")
    page = found._repr_html_()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells == [cell for row in found.rows() for cell in row]
    assert found.rows()[0][:6] == ("mlp.gate", "7 x 5", "default 2", "1", "24", "region Gated")
    lines = str(found).splitlines()[2:]
    assert {len(line) for line in lines} == {len(lines[0])}  # the last column is flush
    assert page.count('<th style="text-align: right">') == 2


def test_what_is_trained_whole_is_named_beside_the_sites():
    model = lorafx.inject(Net(), rank=2, targets="up", trainable=["head", "mlp.down.bias"])
    lorafx.add(model, "other", rank=2, targets="up", trainable="head")
    found = lorafx.summary(model)
    assert found.trained == {"mlp.down.bias": ["default"], "head.weight": ["default", "other"],
                             "head.bias": ["default", "other"]}
    assert found.headline().startswith("1 site adapted, 3 tensors trained whole, active: default")
    assert "\ntrained whole:\n  mlp.down.bias: default\n  head.weight: default, other" in str(found)
    assert "head.weight</td>" in found._repr_html_()
    lorafx.remove(model, "default")
    assert "mlp.down.bias" not in lorafx.summary(model).trained
    assert "trained whole" not in str(lorafx.summary(lorafx.inject(Net(), targets="up")))


def test_columns_stand_below_each_other_in_letters_of_two_places_and_of_none():
    layers = nn.ModuleDict({"注意力": nn.Linear(4, 4), "u\u0308ber": nn.Linear(4, 4)})
    lines = str(lorafx.summary(lorafx.inject(layers, rank=2))).splitlines()
    header, wide, marked = lines[2:5]
    assert wide.index("4 x 4") == header.index("out x in") - 3  # of three letters, two places each
    assert marked.index("4 x 4") == header.index("out x in") + 1


def test_each_cell_of_the_page_says_on_which_side_it_begins():
    page = lorafx.summary(lorafx.inject(Net(), rank=2, targets="linear"))._repr_html_()
    cells = re.findall(r"<t[hd][^>]*>", page)
    assert cells and all("text-align: " in cell for cell in cells)


def test_more_sites_need_no_more_walks_of_the_model(monkeypatch):
    walks = []
    walk = graph_modules.named_modules

    def watched(*args, **kwargs):
        walks.append(args)
        return walk(*args, **kwargs)

    counts = []
    for layers in (2, 9):
        model = lorafx.inject(nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))))
        with monkeypatch.context() as patched:
            patched.setattr(graph_modules, "named_modules", watched)
            lorafx.summary(model)
        counts.append(len(walks))
    assert 0 < counts[0] == counts[1] - counts[0]
