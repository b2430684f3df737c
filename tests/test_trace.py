"""What Python decides is never baked into a graph: traps are refused, and injected models follow the original."""

import copy
import cProfile
import pickle
import sys
import types
from typing import Any

import pytest
import torch
from oracle import frozen
from sounds import SOUND, sizes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from traps import TRAPS, build, prints, reads_the_mode, rows

import lorafx
from lorafx._graph import RegionGraph
from lorafx._program import read
from lorafx._trace import _Tracer, trace
from lorafx._watch import Unsound


def run(model: nn.Module, arguments: Any) -> Any:
    torch.manual_seed(1)
    result = model(*copy.deepcopy(arguments))
    return list(result) if isinstance(result, types.GeneratorType) else result


class TestTraps:
    @pytest.mark.parametrize("forward, reason, calls, change", TRAPS)
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
        assert len(TRAPS) >= 55


class TestSound:
    @pytest.mark.parametrize("forward, calls, change", SOUND)
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
        assert pickle.loads(pickle.dumps(graph)).python_code("self").src == graph.python_code("self").src
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
