"""`lorafx show --plot`: what its pictures hold, against D = s B A formed as a whole."""

import base64
import dataclasses
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import nn

import lorafx
from lorafx._cli.drawing import _families
from lorafx._cli.figures import facts_of, panels_of
from lorafx._cli.grid import grid_of
from lorafx._formats.table import read_adapter
from tests.support.command_line import contents, error, main
from tests.support.oracle import randomise


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.Sequential(*(Layer() for _ in range(3))), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x))


@pytest.fixture
def base(here: None) -> nn.Module:
    """base.safetensors, and adapters a of all its sites, b of some."""
    net = Net()
    safetensors.torch.save_file(net.state_dict(), "base.safetensors")
    for name, targets in (("a", "linear"), ("b", ["up", "head"])):
        model = lorafx.inject(net, rank=3, alpha=2, targets=targets, adapter=name)
        lorafx.save(randomise(model), f"{name}.safetensors")
    return net


def deltas(name: str) -> dict[str, torch.Tensor]:
    pairs = read_adapter(f"{name}.safetensors")[0].pairs
    return {site: pair.scale * pair.B.double() @ pair.A.double() for site, pair in pairs.items()}


def table_of(page: str) -> dict[str, dict[str, str]]:
    """{site: {column: cell}} of a report."""
    head, *rows = re.findall(r"<tr>(.*?)</tr>", page)
    names = re.findall(r"<th[^>]*>(.*?)</th>", head)
    found = {}
    for row in rows:
        cells = dict(zip(names, re.findall(r"<td[^>]*>(.*?)</td>", row), strict=True))
        found[cells["site"]] = cells
    return found


def pictures_of(page: str) -> dict[str, ElementTree.Element]:
    """{title: SVG} of a report."""
    found = {}
    for title, data in re.findall(r'<img alt="([^"]*)".*?src="data:image/svg\+xml;base64,([^"]*)"',
                                  page):
        found[title] = ElementTree.fromstring(base64.b64decode(data))
    return found


def test_a_page_of_two_adapters_and_their_base(base, capsys):
    arguments = "show a.safetensors b.safetensors --base base.safetensors --plot report.html"
    assert main(arguments.split()) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"report.html: 7 sites, \d+ % of the rank used, \|sBA\| / \|W\| from \S+ "
                        r"to \S+, cosine \S+ in the mean of 4 common, 3 in one adapter only\n",
                        said)
    page = Path("report.html").read_text()
    rows, first, second = table_of(page), deltas("a"), deltas("b")
    assert rows.keys() == first.keys()
    for site, cells in rows.items():
        values = torch.linalg.svdvals(first[site])[:3]
        shares = values / values.sum()
        assert cells["rank"] == "3"
        assert float(cells["effective rank"]) == pytest.approx(
            float((-(shares * shares.log()).sum()).exp()), abs=0.006)
        size, W = first[site].norm(), base.get_parameter(f"{site}.weight").detach().double()
        assert float(cells["|sBA|"]) == pytest.approx(float(size), rel=1e-3)
        assert float(cells["|sBA| / |W|"]) == pytest.approx(float(size / W.norm()), rel=1e-3)
        shown = list(map(float, cells["singular values"].split()))
        assert shown == pytest.approx(values.tolist(), rel=1e-2)
        if site in second:
            inner = (first[site] * second[site]).sum() / (size * second[site].norm())
            assert float(cells["cosine"]) == pytest.approx(float(inner), rel=1e-3)
        else:
            assert cells["cosine"] == ""
    assert list(pictures_of(page)) == [
        "Change of each weight, |sBA| / |W|", "Effective rank", "Singular values",
        "Cosine between the two adapters"]
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page)


def test_a_page_without_a_base_says_so_and_is_the_same_each_time(base, capsys):
    assert main(["show", "b.safetensors", "--plot", "new/report.html"]) == 0
    page = Path("new/report.html").read_bytes()
    assert main(["show", "b.safetensors", "--plot", "new/report.html"]) == 0
    assert page == Path("new/report.html").read_bytes()
    text = page.decode()
    assert list(pictures_of(text)) == [
        "Change of each weight, |sBA|", "Effective rank", "Singular values"]
    assert "Without --base" in text and "cosine" not in table_of(text)["head"]
    assert "|sBA| / |W|" not in capsys.readouterr().out


def test_heat_maps_and_lines_hold_the_numbers(base):
    adapters = [read_adapter(f"{name}.safetensors")[0] for name in "ab"]
    facts = facts_of(adapters[0], None, adapters[1])
    change, effective, spectra, cosines = panels_of(facts, compared=True)
    first = deltas("a")
    for panel, number in ((change, lambda site: site.norm), (cosines, lambda site: site.cosine),
                          (effective, lambda site: site.effective / 3)):
        figure = Figure()
        panel.draw(figure)
        axes = figure.axes[0]
        image = axes.images[0].get_array()
        kinds = [label.get_text() for label in axes.get_yticklabels()]
        layers = [label.get_text() for label in axes.get_xticklabels()]
        assert (kinds, layers) == (["up", "down", "head"], ["0", "1", "2", "none"])
        for site in facts:
            *_, layer, kind = ["none", *site.name.split(".")]
            shown = image.data[kinds.index(kind), layers.index(layer)]
            if number(site) is None:
                assert image.mask[kinds.index(kind), layers.index(layer)]
            else:
                assert float(shown) == pytest.approx(number(site))
    figure = Figure()
    spectra.draw(figure)
    lines = {axes.get_title(): axes.get_lines() for axes in figure.axes}
    assert {kind: len(lines[kind]) for kind in ("up", "down", "head")} == {
        "up": 3, "down": 3, "head": 1}
    values = torch.linalg.svdvals(first["layers.1.down"])[:3]
    assert lines["down"][1].get_ydata() == pytest.approx((values / values[0]).tolist())


def test_a_png_is_one_picture(base, capsys):
    assert main(["show", "a.safetensors", "b.safetensors", "--plot", "report.png"]) == 0
    content = Path("report.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1300 < width < 1500 and height > width


def test_an_adapter_that_adds_nothing_is_drawn_too(here, capsys):
    lorafx.save(lorafx.inject(Net(), rank=2), "zero.safetensors")
    assert main("show zero.safetensors zero.safetensors --plot zero.html".split()) == 0
    [cells] = table_of(Path("zero.html").read_text()).values()
    assert (cells["|sBA|"], cells["effective rank"]) == ("0", "0.00")
    assert "0 % of the rank used" in capsys.readouterr().out


def test_layers_and_kinds():
    names = ["model.layers.0.attn.q", "model.layers.10.attn.q", "model.layers.0.mlp.up"]
    grid = grid_of(names)
    assert (grid.kinds, grid.layers) == (["attn.q", "mlp.up"], ["0", "10"])
    assert grid.cells == dict(zip(names, [(0, 0), (0, 1), (1, 0)]))
    unet = ["down.0.attn.1.to_out.0", "down.1.attn.0.to_out.0", "mid.attn.0.to_q"]
    grid = grid_of(unet)
    assert grid.kinds == ["to_out.0", "to_q"]
    assert grid.layers == ["down.0.attn.1", "down.1.attn.0", "mid.attn.0"]
    flat = grid_of(["0", "2", "net.4", ""])
    assert (flat.kinds, flat.layers) == (["*", "net.*", "(the model)"],
                                         ["0", "2", "net.4", "none"])
    assert grid_of([f"net.{number}" for number in range(9)]).layers == list("012345678")
    assert grid_of(["unet.down.0.a.1.q", "unet.down.0.a.2.q"]).layers == ["0.1", "0.2"]


class Odd(nn.Module):
    """Names too long for a label, in letters that matplotlib's own font lacks, and many kinds."""

    def __init__(self) -> None:
        super().__init__()
        long = "a_name_of_very_many_letters_" * 5
        self.layers = nn.ModuleDict({long + "1": nn.Linear(5, 5), long + "2": nn.Linear(5, 5)})
        self.注意力 = nn.Linear(5, 5)
        for number in range(102):
            setattr(self, f"kind{number:03}", nn.Linear(5, 5))
        nn.init.zeros_(self.kind001.weight)
        nn.init.constant_(self.kind002.weight, float("nan"))


def test_odd_names_many_kinds_and_odd_weights(here, capsys, recwarn):
    net = Odd()
    safetensors.torch.save_file(net.state_dict(), "base.safetensors")
    model = randomise(lorafx.inject(net, rank=1, trainable="kind101"))
    with torch.no_grad():
        model.kind003.lora.default.B.zero_()
    lorafx.save(model, "odd.safetensors")
    assert main("show odd.safetensors --base base.safetensors --plot odd.html".split()) == 0
    said = capsys.readouterr().out
    assert "104 sites" in said and said.endswith(", 2 tensors trained whole, not shown\n")
    assert "nan" not in said and "inf" not in said
    assert not [str(warning.message) for warning in recwarn]
    page = Path("odd.html").read_text()
    assert "Hatched: no number, as W is 0 there, or something is NaN" in page
    assert "Only the first 12 of 104 kinds" in page and "What adds nothing has no" in page
    heights = [int(height) for height in re.findall(r' height="(\d+)"', page)]
    assert len(heights) == 3 and max(heights) < 3500


def test_labels_are_cut_in_their_middle_and_layers_are_told_apart(here):
    lorafx.save(randomise(lorafx.inject(Odd(), rank=1)), "odd.safetensors")
    change, _, spectra = panels_of(facts_of(read_adapter("odd.safetensors")[0], None, None), False)
    figure = Figure()
    change.draw(figure)
    kinds = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(kinds) <= 100 and max(map(len, kinds)) <= 36 and len(set(kinds)) == len(kinds)
    figure = Figure()
    spectra.draw(figure)
    assert max(len(axes.get_title()) for axes in figure.axes) <= 24
    ticks = figure.axes[0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)  # of rank 1
    layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    lorafx.save(randomise(lorafx.inject(layers, rank=2)), "deep.safetensors")
    _, _, spectra = panels_of(facts_of(read_adapter("deep.safetensors")[0], None, None), False)
    figure = Figure()
    spectra.draw(figure)
    named = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert named == [str(number) for number in range(0, 20, 3)]


def test_fonts_are_those_that_have_the_letters():
    assert _families("plain größe") == ["DejaVu Sans"]
    assert "Last Resort High-Efficiency" not in _families("注意力")


WRONG = {
    "a.safetensors b.safetensors": "in pictures only: add --plot OUT.html, or compare them by 'lor",
    "a.safetensors --base base.safetensors": "--base is for --plot",
    "a.safetensors --plot a.safetensors":
        "argument --plot: 'a.safetensors' is no picture: name a file that ends in .html or .png",
    "a.safetensors --plot report.pdf": "'report.pdf' is no picture",
    "a.safetensors --plot r.html --json": "not allowed with argument",
    "a.safetensors --plot r.html --base gone.safetensors": "gone.safetensors",
    "a.safetensors c.safetensors --plot r.html":
        "have no site in common, such as 'layers.0.up': there is nothing to compare",
    "c.safetensors --plot r.html --base base.safetensors": "'c.safetensors' has 'other', but 'base",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_errors(base, arguments, capsys):
    other = lorafx.inject(nn.ModuleDict({"other": nn.Linear(5, 5)}), adapter="c")
    lorafx.save(randomise(other), "c.safetensors")
    before = contents()
    assert main(["show", *arguments.split()]) == 2
    assert WRONG[arguments] in error(capsys) and contents() == before


def test_an_adapter_of_tensors_trained_whole_only(base, capsys, monkeypatch):
    whole = dataclasses.replace(read_adapter("a.safetensors")[0], pairs={})
    monkeypatch.setattr("lorafx._cli.report.read_adapter", lambda path: (whole, None))
    assert main("show a.safetensors --plot r.html".split()) == 2
    assert "'a.safetensors' has no site to plot" in error(capsys)


def test_matplotlib_is_asked_for_in_one_sentence(base, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    before = contents()
    assert main(["show", "a.safetensors", "--plot", "report.html"]) == 2
    assert error(capsys).endswith("pip install 'lorafx[plot]'.") and contents() == before
