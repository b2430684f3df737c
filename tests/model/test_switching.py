"""Switching makes nothing anew and lets exactly the active adapters train, wherever they are."""

from functools import partial

import pytest
import torch
from common.counting import held_bytes
from torch import nn

import lorafx
from tests.support.oracle import randomise

CPU, X = torch.device("cpu"), torch.randn(3, 5, 8)
SPECS = ["a", "b", {"a": 0.7, "b": -0.3}, []]


@pytest.fixture
def model():
    model = lorafx.inject(
        nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]), rank=2, adapter="a")
    lorafx.add(model, "b", rank=5)
    return randomise(model)


def use(model, spec):
    with lorafx.using(model, spec):
        pass


def disable(model):
    with lorafx.disabled(model):
        pass


@pytest.mark.parametrize("way", ["activate", "using", "disabled"])
def test_the_verb_allocates_no_tensor(model, way):
    for spec in SPECS:
        verb = {"activate": partial(lorafx.activate, model, spec),
                "using": partial(use, model, spec), "disabled": partial(disable, model)}[way]
        verb()
        assert held_bytes(verb, CPU) == (0, 0)


@pytest.mark.parametrize("gradients", [False, True])
def test_the_first_compiled_forward_allocates_what_the_second_does(model, gradients):
    call = torch.compile(model, backend="eager", fullgraph=True)

    def held():
        with torch.set_grad_enabled(gradients):
            return held_bytes(partial(call, X), CPU)

    for spec in (*SPECS, *SPECS):
        lorafx.activate(model, spec)
        held()
    for spec in SPECS:
        lorafx.activate(model, spec)
        assert held() == held(), spec
        with lorafx.disabled(model):
            assert held() == held()


def test_each_adapter_has_addresses_of_its_own_that_compilers_take_for_static(model):
    marks = []

    def backend(graph, inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            if "_stack_" in node.name:
                marks.append(node.meta["tensor_dict"].get("_dynamo_static_input_type"))
        return graph

    call = torch.compile(model, backend=backend, fullgraph=True)
    found = []
    for spec in SPECS * 2:
        lorafx.activate(model, spec)
        call(X)
        found.append([tensor.data_ptr() for tensor in model[0].lora.stack[:3]])
    assert found[:4] == found[4:] and len({tuple(addresses) for addresses in found}) == 4
    assert found[0][0] == model[0].lora.a.A.data_ptr()
    assert marks == ["unguarded"] * 12  # A, B and the gate of four branches


def test_a_name_that_is_another_adapter_now_is_that(model):
    call = torch.compile(model, backend="eager", fullgraph=True)
    for spec in SPECS:
        lorafx.activate(model, spec)
        call(X)
    lorafx.rename(model, "a", "c")
    lorafx.add(model, "a", rank=3)
    randomise(model, seed=1)
    for spec in SPECS:
        lorafx.activate(model, spec)
        found = call(X)
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(found, model(X))


def test_exactly_what_is_active_trains(model):
    shared = model[0]
    model.append(shared)
    for spec in (*SPECS, "a"):
        for parameter in lorafx.parameters(model, "b"):  # who wrote into a flag is overruled
            parameter.requires_grad_(not parameter.requires_grad)
        lorafx.activate(model, spec)
        for adapter in ("a", "b"):
            flags = {tensor.requires_grad for tensor in lorafx.parameters(model, adapter)}
            assert flags == {adapter in spec}
        assert not any(layer.frozen_weight.requires_grad for layer in model)
