"""The layout of layers: against least squares by another way, and what must hold of any graph."""

import itertools
import random

import pytest
import torch

from lorafx._pictures.layered import ACROSS, Edge, apart, place


@pytest.mark.parametrize("seed", range(5))
def test_positions_are_the_least_squares_ones(seed):
    """Against min |x - wanted|^2, x[i+1] >= x[i] + gap, with each set of tight pairs tried."""
    numbers = random.Random(seed)
    wanted = torch.tensor([numbers.uniform(0, 200) for _ in range(6)], dtype=torch.float64)
    widths = [numbers.uniform(5, 60) for _ in range(6)]
    gaps = torch.tensor([width + ACROSS for width in widths[:-1]], dtype=torch.float64)
    best, least = wanted, float("inf")
    for tight in itertools.product((False, True), repeat=5):
        x, start = wanted.clone(), 0
        for end in range(1, 7):
            if end == 6 or not tight[end - 1]:
                offsets = torch.cat([torch.zeros(1), gaps[start:end - 1]]).cumsum(0)
                x[start:end] = (wanted[start:end] - offsets).mean() + offsets
                start = end
        distance = float((x - wanted).square().sum())
        if (x.diff() >= gaps - 1e-9).all() and distance < least:
            best, least = x, distance
    assert apart(wanted.tolist(), widths) == pytest.approx(best.tolist(), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_node_overlaps_and_every_edge_goes_down(seed):
    numbers = random.Random(seed)
    count = numbers.randint(1, 14)
    sizes = [(numbers.uniform(10, 90), numbers.uniform(10, 50)) for _ in range(count)]
    edges = []
    for target in range(1, count):
        for source in numbers.sample(range(target), min(target, numbers.randint(0, 3))):
            ports = [numbers.uniform(0, sizes[end][0]) for end in (source, target)]
            edges.append(Edge(source, target, *ports))
    placed = place(sizes, edges)
    boxes = [(x, y, x + width, y + height)
             for (x, y), (width, height) in zip(placed.corners, sizes)]
    for (left, top, right, bottom), other in itertools.combinations(boxes, 2):
        assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    assert all(-1e-9 <= x and right <= placed.width + 1e-9 and 0 <= top and
               bottom <= placed.height + 1e-9 for x, top, right, bottom in boxes)
    for edge, route in zip(edges, placed.routes):
        first, last = boxes[edge.source], boxes[edge.target]
        assert route[0] == pytest.approx((first[0] + edge.source_port, first[3]))
        assert route[-1] == pytest.approx((last[0] + edge.target_port, last[1]))
        assert all(before[1] <= after[1] for before, after in zip(route, route[1:]))


def test_an_order_without_crossings_is_found():
    edges = [Edge(0, 5, 5, 5), Edge(1, 4, 5, 5), Edge(2, 3, 5, 5)]  # all cross as they are given
    placed = place([(10.0, 10.0)] * 6, edges)
    above = sorted(range(3), key=lambda node: placed.corners[node])
    below = sorted(range(3, 6), key=lambda node: placed.corners[node])
    assert [5 - node for node in above] == below
    assert all(route[0][0] == pytest.approx(route[-1][0]) for route in placed.routes)
