"""An adapter replaced while the model runs: each forward has the old one or the new, never both."""

import functools
import pickle
import re
import sys
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import lorafx
from lorafx._model import known, replacing
from lorafx._model.branches import branches
from lorafx._model.factors import Factors
from lorafx._model.record import injection, trained_modules
from tests.support.oracle import randomise

X = torch.randn(3, 8, dtype=torch.float64)


class Tower(nn.Module):
    """Python that calls one layer after another; `between` is called in the middle."""

    def __init__(self, depth=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.between = nn.Identity()

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if number == 2:
                x = self.between(x)
        return self.norm(x)


OTHERS = {
    "as it was": dict(rank=2),
    "another rank": dict(rank=5, alpha=9),
    "other sites": dict(rank=3, targets=["layers.0", "layers.5"]),
    "more": dict(rank=1, trainable=["norm", "layers.4.bias"]),
    "nothing but a module": dict(rank=1, targets=["layers.1"], trainable="norm"),
}


def made(depth=6, seed=0, **config):
    torch.manual_seed(0)
    model = lorafx.inject(Tower(depth).double(), adapter="a", dtype=torch.float64,
                          **({"rank": 2} | config))
    return randomise(model, seed=seed)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """{one of OTHERS: a file with an adapter "a" as that is}, and what a model gives with it."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for seed, (name, config) in enumerate(OTHERS.items()):
        model = made(seed=seed, **config)
        found[name] = folder / f"{seed}.safetensors"
        lorafx.save(model, found[name])
    return found


@functools.cache
def of(path):
    """What a model gives that never had another adapter."""
    return lorafx.load(lorafx.eject(made()), path)(X).detach()


@pytest.fixture(params=[("as it was", "other sites"), ("more", "another rank"),
                        ("another rank", "nothing but a module")],
                ids=" to ".join)
def files(request, file_of):
    """An adapter "a", and another to put in its place."""
    return [file_of[name] for name in request.param]


def using(path):
    """A model that has this adapter "a", active, and another."""
    model = lorafx.load(lorafx.eject(made()), path)
    lorafx.add(model, "b", rank=1, dtype=torch.float64)
    return model


def elsewhere(do):
    """What it gives in another thread."""
    found = []
    thread = threading.Thread(target=lambda: found.append(do()))
    thread.start()
    thread.join()
    return found[0]


def meanwhile(model, do):
    """What a forward gives in the middle of which something is done in another thread."""
    handle = model.between.register_forward_hook(lambda *_: elsewhere(do) and None)
    try:
        return model(X)
    finally:
        handle.remove()


def load(model, path, **more):
    lorafx.load(model, path, adapter="a", replace=True, **more)


def test_replaced(files):
    """Whatever the ranks, sites and modules trained whole: nothing of the old one is left."""
    model = using(files[0])
    lorafx.activate(model, {"a": 1.0, "b": 0.5})  # b adds nothing yet
    for path in (files[1], files[0], files[0]):
        load(model, path)
        alone = using(path)
        torch.testing.assert_close(model(X), of(path))
        assert lorafx.adapters(model) == ["a", "b"]
        ours = dict(lorafx.named_parameters(model, "a"))
        for name, tensor in lorafx.named_parameters(alone):
            assert torch.equal(ours.pop(name), tensor) and tensor.requires_grad
        keys = [{key for key in m.state_dict() if ".b." not in key} for m in (model, alone)]
        assert not ours and keys[0] == keys[1]
        assert not any(module._modules == {} for *_, module in trained_modules(model))


def test_where_branches_stand_the_model_is_not_read_anew(file_of, monkeypatch):
    model = pickle.loads(pickle.dumps(using(file_of["another rank"])))
    expected = [of(file_of[name]) for name in ("as it was", "other sites")]
    monkeypatch.setattr(known, "read_program", None)
    load(model, file_of["as it was"])
    assert torch.equal(model(X), expected[0])
    lorafx.load(model, file_of["other sites"], adapter="c")
    lorafx.activate(model, "c")
    assert torch.equal(model(X), expected[1])
    for path in (file_of["more"], file_of["as it was"]):
        with pytest.raises(TypeError, match="not callable"):
            load(model, path)
        model.layers[4] = nn.Linear(8, 8).double()  # no branch stands there
    monkeypatch.undo()
    model.layers[4] = nn.Linear(8, 9).double()
    with pytest.raises(lorafx.MismatchError, match="'layers.4', but this model 8 to 9 features"):
        load(model, file_of["as it was"])


def test_what_is_active_stays(files):
    model = using(files[0])
    lorafx.activate(model, "b")
    expected = model(X)
    load(model, files[1])
    assert torch.equal(model(X), expected)
    assert not any(p.requires_grad for p in lorafx.parameters(model, "a"))
    lorafx.activate(model, "a")
    assert torch.equal(model(X), of(files[1]))


@pytest.mark.parametrize("verb", [
    load,
    lambda model, _: lorafx.activate(model, {"a": 0.5, "b": 2.0}),
    lambda model, _: lorafx.remove(model, "a"),
    lambda model, _: lorafx.rename(model, "a", "c"),
])
def test_a_forward_uses_to_its_end_what_it_began_with(files, verb):
    model = using(files[0])
    found = meanwhile(model, lambda: verb(model, files[1]))
    assert torch.equal(found, of(files[0]))
    found.sum().backward()
    if verb is load:
        assert torch.equal(model(X), of(files[1]))


def test_a_context_uses_to_its_end_what_it_began_with(files):
    model = using(files[0])
    with lorafx.using(model, "a"):
        load(model, files[1])
        assert torch.equal(model(X), of(files[0]))
        assert torch.equal(elsewhere(lambda: model(X).detach()), of(files[1]))
        with lorafx.using(model, "a"):
            assert torch.equal(model(X), of(files[1]))
            load(model, files[0])
            assert torch.equal(model(X), of(files[1]))
        assert torch.equal(model(X), of(files[0]))
    assert torch.equal(model(X), of(files[0]))


def test_at_each_line_of_the_swap(files):
    """Another thread's forward, wherever the one that swaps may be interrupted."""
    model = using(files[0])
    wanted, seen = [of(path) for path in files], []

    def look(frame, event, _):
        if frame.f_code.co_filename == replacing.__file__:
            if event == "line":
                seen.append(elsewhere(lambda: model(X).detach()))
            return look

    sys.settrace(look)
    try:
        load(model, files[1])
    finally:
        sys.settrace(None)
    which = [[torch.equal(y, old_or_new) for old_or_new in wanted].index(True) for y in seen]
    assert which == sorted(which) and {*which} == {0, 1} and len(which) > 30


def test_gradients_are_of_what_was_used(files):
    """Also in what runs again in the backward pass."""
    for again in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        model = using(files[0])
        old = dict(lorafx.named_parameters(model))
        wanted = torch.autograd.grad(model(X).square().sum(), [*old.values()])
        y = again(model, X.clone().requires_grad_())
        load(model, files[1])
        y.square().sum().backward()
        for parameter, gradient in zip(old.values(), wanted):
            torch.testing.assert_close(parameter.grad, gradient)
        assert all(parameter.grad is None for parameter in lorafx.parameters(model))


def test_a_checkpointed_function_uses_to_its_end_what_it_began_with(files):
    model = using(files[0])

    def twice(x):
        y = model(x)
        load(model, files[1])
        return y + model(x)

    old = [*lorafx.parameters(model)]
    wanted = torch.autograd.grad(2 * model(X).sum(), old)
    y = checkpoint(twice, X.clone().requires_grad_(), use_reentrant=False)
    assert torch.equal(y, 2 * of(files[0])) and torch.equal(model(X), of(files[1]))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), old), wanted)


def test_a_replica_of_data_parallel_uses_what_the_caller_does(file_of):
    """It runs in a thread of its own, of another context."""
    model = randomise(using(file_of["as it was"]))
    lorafx.activate(model, "b")
    expected = model(X)
    lorafx.activate(model, "a")
    with lorafx.using(model, "b"):
        twin = model._replicate_for_data_parallel()
        assert torch.equal(elsewhere(lambda: twin(X)), expected)
        assert not torch.allclose(elsewhere(lambda: model(X)), expected)
    with lorafx.using(model, "a"):
        load(model, file_of["more"])
        with pytest.raises(lorafx.AdapterError, match="'a' has been replaced since"):
            model._replicate_for_data_parallel()


@pytest.fixture
def quick():
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def under_load(model, changes, times, call=None):
    """How often forwards of three threads gave what the model gives after one of two changes.

    The changes are done by turns, so many times in all; nothing else may come out.
    """
    call = model if call is None else call
    wanted = []
    for change in changes:
        change()
        with torch.no_grad():
            wanted.append(call(X))
    assert not torch.allclose(*wanted)
    counts, errors, done = [0, 0], [], threading.Event()

    def serve():
        try:
            with torch.no_grad():
                while not done.is_set():
                    y = call(X)
                    counts[[torch.equal(y, one) for one in wanted].index(True)] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(times):
            changes[number % 2]()
            after = sum(counts) + 4  # by then one has begun
            while number % 9 == 0 and not errors and sum(counts) < after:
                done.wait(1e-4)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors, errors
    return counts


def two_by_turns(depth):
    """A model, and what puts two adapters of several ranks in one place of it by turns."""
    model = made(depth)
    wholes = []
    for seed, rank in enumerate((2, 5)):
        lorafx.add(model, "new", rank=rank, dtype=torch.float64)
        randomise(model, seed=seed + 1)
        new = replacing.taken(model, "new")
        for module in new.modules.values():
            module.requires_grad_(True)
        wholes.append(new)
    return model, [functools.partial(replacing.put, model, "a", whole) for whole in wholes]


def test_a_thousand_swaps_under_load(quick):
    model, changes = two_by_turns(depth=12)
    assert min(under_load(model, changes, 1000)) > 10


def test_an_interruption_while_it_is_looked_up():
    model, changes = two_by_turns(depth=1)
    changes[0]()
    selection, [branch] = injection(model).choice.default, branches(model).values()

    class Interrupted(dict):
        def __contains__(self, adapter):
            found = super().__contains__(adapter)
            changes[1]()
            return found

    selection.retired, old = Interrupted(), branch._modules["a"]
    assert selection.held(branch, "a") is old is not branch._modules["a"]


@pytest.mark.parametrize("verb", [lorafx.save, lorafx.compose, lorafx.merge])
def test_what_reads_an_adapter_finds_one(file_of, tmp_path, monkeypatch, verb):
    """Another thread replaces it between two sites of it, unless that waits."""
    old, new, path = file_of["as it was"], file_of["another rank"], tmp_path / "a.safetensors"
    model, tensors, calls = using(old), Factors.tensors, []
    lock, here = injection(model).choice.lock, threading.current_thread()

    def swap():
        if lock.acquire(blocking=False):
            lock.release()
            load(model, new)

    def interrupted(factors):
        if threading.current_thread() is here:
            calls.append(factors)
            if len(calls) == 3:
                elsewhere(swap)
        return tensors(factors)

    monkeypatch.setattr(Factors, "tensors", interrupted)
    if verb is lorafx.save:
        lorafx.save(model, path, adapter="a")
        model = lorafx.load(lorafx.eject(model), path)
    elif verb is lorafx.compose:
        lorafx.compose(model, {"a": 1.0}, "c")
        lorafx.activate(model, "c")
    else:
        model = lorafx.merge(model, "a")
    assert len(calls) > 3
    torch.testing.assert_close(model(X), of(old))


def test_files_are_loaded_under_load(file_of):
    model = using(file_of["more"])
    changes = [functools.partial(load, model, file_of[name]) for name in ("more", "other sites")]
    assert min(under_load(model, changes, 20)) > 1


def test_others_are_activated_under_load(quick):
    model = made(24)
    lorafx.add(model, "b", rank=5, dtype=torch.float64)
    randomise(model)
    changes = [functools.partial(lorafx.activate, model, {"a": weight}) for weight in (1.0, -2.0)]
    changes[1] = functools.partial(lorafx.activate, model, ["a", "b"])
    assert min(under_load(model, changes, 100)) > 1


def test_compiled(quick):
    model, changes = two_by_turns(depth=6)
    counter = CompileCounter()
    # fullgraph=True fails now and then in several threads, whatever the model (torch 2.13)
    call = torch.compile(model, backend=counter)
    assert min(under_load(model, changes, 40, call)) > 1
    sites = ["layers.0", "layers.5"]
    lorafx.add(model, "b", rank=3, targets=sites, dtype=torch.float64)
    randomise(model)
    changes = [functools.partial(lorafx.activate, model, name) for name in "ab"]
    assert min(under_load(model, changes, 40, call)) > 1
    assert counter.frame_count == 1


def test_what_does_not_fit_changes_nothing(file_of, tmp_path):
    model = using(file_of["more"])
    lorafx.add(model, "c", trainable="norm", dtype=torch.float64)
    lorafx.activate(model, {"b": 1.0, "c": 1.0})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    expected = model(X)
    wide = lorafx.inject(nn.Sequential(nn.Linear(9, 9)), adapter="b")
    lorafx.save(wide, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file_of["more"].read_bytes()[:-1])
    fails = [
        (tmp_path / "other.safetensors", lorafx.MismatchError, "maps 9 to 9 features"),
        (tmp_path / "cut.safetensors", lorafx.FormatError, "cut.safetensors"),
        (tmp_path / "none.safetensors", lorafx.FormatError, "none.safetensors"),
        (file_of["more"], lorafx.AdapterError, "and 'c', which is active too, both train 'norm."),
    ]
    for path, kind, message in fails:
        with pytest.raises(kind, match=re.escape(message)):
            lorafx.load(model, path, adapter="b", replace=True)
        assert torch.equal(model(X), expected) and lorafx.adapters(model) == ["a", "b", "c"]
        assert [type(module) for module in model.modules()] == classes
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(lorafx.AdapterError, match="has an adapter 'b' already"):
        lorafx.load(model, file_of["as it was"], adapter="b")


def test_a_compiled_model_of_torchs_own_class(quick):
    base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).double()
    model = lorafx.inject(base, rank=2, adapter="a", dtype=torch.float64)
    lorafx.add(model, "b", rank=3)
    randomise(model)
    changes = [lambda: lorafx.activate(model, "a"), lambda: lorafx.activate(model, "b")]
    under_load(model, changes, 100, torch.compile(model, backend="eager"))


def test_without_one_to_replace(file_of):
    path = file_of["as it was"]
    model = lorafx.load(lorafx.eject(made()), path, replace=True)
    assert torch.equal(model(X), of(path))
    with pytest.raises(lorafx.AdapterError, match="no adapter 'd'"):
        lorafx.load(model, path, adapter="d", replace=True)
    assert lorafx.adapters(model) == ["a"]
