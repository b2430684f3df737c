"""What Python decides is not baked into a graph: it is refused, and models follow the original."""

import copy
import cProfile
import pickle
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lorafx
import tests.support.untraceable_statements  # noqa: F401 (adds its rows to the table)
from lorafx._graph.region_graph import RegionGraph
from lorafx._graph.trace import _Tracer, trace
from lorafx._graph.watch import Unsound
from lorafx._model.program import read_program as read
from tests.support.oracle import frozen
from tests.support.traceable import TRACEABLE, sizes
from tests.support.untraceable import UNTRACEABLE, build, rows
from tests.support.untraceable_decisions import reads_the_mode
from tests.support.untraceable_surroundings import prints


def run(model: nn.Module, arguments: Any) -> Any:
    torch.manual_seed(1)
    result = model(*copy.deepcopy(arguments))
    return list(result) if isinstance(result, types.GeneratorType) else result


class TestUntraceable:
    @pytest.mark.parametrize("forward, reason, calls, change", UNTRACEABLE)
    def test_refused_and_followed(self, forward: Any, reason: str, calls: Any, change: Any) -> None:
        model = build(forward)
        with pytest.raises(Unsound, match=reason):
            trace(model)
        injected, base = lorafx.inject(model, targets="fc"), frozen(model)
        for training in (True, False):
            for arguments in calls:
                for grad in (True, False):
                    with torch.set_grad_enabled(grad):
                        both = [run(m.train(training), arguments) for m in (injected, base)]
                    torch.testing.assert_close(*both, rtol=0, atol=0)
            if change is not None:
                change(model)
        assert "" in lorafx.summary(injected).breaks

    def test_nothing_runs_that_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(Unsound, match="print"):
            trace(build(prints))
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("question", [bool, hash, str, repr, len, format, list, range, float])
    def test_a_symbolic_value_answers_no_question(self, question: Any) -> None:
        tracer = _Tracer(RegionGraph())
        with pytest.raises((Unsound, TypeError)):
            question(tracer.create_proxy("placeholder", "x", (), {}))

    def test_at_least_forty(self) -> None:
        assert len(UNTRACEABLE) >= 55


class TestTraceable:
    @pytest.mark.parametrize("forward, calls, change", TRACEABLE)
    def test_becomes_a_region(self, forward: Any, calls: Any, change: Any) -> None:
        model = build(forward)
        injected, base = lorafx.inject(model, targets="w"), frozen(model)
        assert isinstance(injected, torch.fx.GraphModule) and "self.lora_w" in injected.code
        for twin in (injected, copy.deepcopy(injected)):
            expected = copy.deepcopy(base)
            for training in (True, False):
                for arguments in calls:
                    both = [run(m.train(training), arguments) for m in (twin, expected)]
                    torch.testing.assert_close(*both, rtol=0, atol=0)
                if change is not None:
                    change(twin), change(expected)
        injected.graph.lint()

    def test_unpacking_checks_the_count(self) -> None:
        injected = lorafx.inject(build(sizes), targets="w")
        with pytest.raises(ValueError, match="too many values to unpack"):
            injected(rows(2, 2, 2))
        with pytest.raises(ValueError, match="not enough values to unpack"):
            injected(rows(2))

    def test_a_graph_survives_pickling(self) -> None:
        graph = trace(build(sizes))
        assert (
            pickle.loads(pickle.dumps(graph)).python_code("self").src
            == graph.python_code("self").src
        )
        assert copy.deepcopy(graph).python_code("self").src == graph.python_code("self").src

    def test_profilers_and_function_modes_do_not_matter(self) -> None:
        with cProfile.Profile(), torch.device("meta"), FlopCounterMode(display=False):
            model = lorafx.inject(nn.Sequential(nn.Linear(3, 3)))
        assert isinstance(model[0], torch.fx.GraphModule)

    def test_a_profiler_is_restored(self) -> None:
        def profiler(*_: Any) -> None:
            pass

        sys.setprofile(profiler)
        try:
            trace(nn.Linear(3, 3))
            with pytest.raises(Unsound):
                trace(build(reads_the_mode))
            assert sys.getprofile() is profiler
        finally:
            sys.setprofile(None)


class Shadowed(nn.Linear):
    meta = "taken"


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo: Any) -> "OwnCopy":
        return OwnCopy(self.in_features, self.out_features)


@pytest.mark.parametrize("model, reason", [
    (Shadowed(3, 3), "Shadowed defines 'meta' itself"),
    (OwnCopy(3, 3), "OwnCopy defines '__deepcopy__' itself"),
])
def test_a_class_that_cannot_be_a_region_is_a_break(model: nn.Module, reason: str) -> None:
    assert reason in read(model).breaks[""]


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return F.linear(x, self.w.transpose(dim0=0, dim1=1))


def helper(x, scales=[1.0, 2.0]):  # noqa: B006 (a default that may change is the point)
    return x * scales[0]


class Defaults(Keywords):
    def forward(self, x):
        return helper(F.linear(x, self.w))


class Signed(Keywords):
    def forward(self, x):
        return F.linear(x, self.w)

    forward.__signature__ = "(self, x, y=None)"


class Named(Keywords):
    @property
    def matrix(self):
        return self.w

    def forward(self, x):
        for _ in range(1):
            x = F.linear(x, self.matrix)
        return x


def test_what_else_cannot_be_traced():
    assert not trace(Keywords()).find_nodes(op="placeholder")[0].users == {}
    for cls, reason in (
        (Defaults, "is given `scales`, a list"),
        (Signed, "declares another signature"),
    ):
        with pytest.raises(Unsound, match=reason):
            trace(cls())
    patched = Keywords()
    patched.forward = lambda x: x
    with pytest.raises(Unsound, match="this instance has a forward of its own"):
        trace(patched)
