"""What transformers' operations do to weights W, done to pairs: of s B A the same comes out."""

import torch
from hypothesis import given, strategies as st
from torch import Tensor
from transformers.core_model_loading import (
    Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter, WeightRenaming)

from lorafx._adapter.adapter import Adapter, Pair
from lorafx._adapter.config import LoRAConfig
from lorafx._adapter.conversions import ConversionTable, as_stored, of_today

RANKS = st.integers(1, 3)
STACKED = [MergeModulelist(dim=0), Concatenate(dim=1)]
CONVERTERS = {
    "experts": (["experts.*.gate.weight", "experts.*.up.weight"], ["experts.gate_up"], STACKED),
    "down": (["experts.*.down.weight"], ["experts.down"], [MergeModulelist(dim=0)]),
    "turned": (["experts.*.down.weight"], ["experts.down"],
               [MergeModulelist(dim=0), Transpose(1, 2)]),
    "joined and turned": (["experts.*.gate.weight", "experts.*.up.weight"], ["experts.gate_up"],
                          [*STACKED, Transpose(1, 2)]),
    "joined": (["q.weight", "k.weight", "v.weight"], ["qkv.weight"], [Concatenate(dim=0)]),
    "joined across": (["q.weight", "k.weight"], ["qk.weight"], [Concatenate(dim=1)]),
    "split": (["qkv.weight"], ["q.weight", "k.weight", "v.weight"], [Chunk(dim=0)]),
    "split across": (["qkv.weight"], ["q.weight", "k.weight", "v.weight"], [Chunk(dim=1)]),
}


def delta(pair: Pair) -> Tensor:
    return pair.scale * pair.B @ pair.A


def pair_of(draw, shape: tuple[int, int]) -> Pair:
    rank, generator = draw(RANKS), torch.Generator().manual_seed(draw(st.integers(0, 9)))
    A, B = (torch.randn(*size, dtype=torch.float64, generator=generator)
            for size in ((rank, shape[1]), (shape[0], rank)))
    return Pair(A, B, draw(st.sampled_from([1.0, 0.5, 2.0])))


def table(kind: str) -> ConversionTable:
    sources, targets, operations = CONVERTERS[kind]
    return ConversionTable(
        [WeightRenaming("old.", "new.")],
        [WeightConverter(list(sources), list(targets), list(operations))])


@given(kind=st.sampled_from(list(CONVERTERS)), count=st.integers(1, 12), data=st.data())
def test_pairs_and_weights_become_the_same(kind: str, count: int, data: st.DataObject) -> None:
    """And back, where a checkpoint has experts one by one."""
    sources, targets, _ = CONVERTERS[kind]
    pairs: dict[str, Pair] = {}
    for source in sources:
        for number in range(count if "*" in source else 1):
            name = "old.layer." + source.replace("*", str(number)).removesuffix(".weight")
            pairs[name] = pair_of(data.draw, (6, 9))
    made = of_today(adapter_of(pairs), table(kind), AnyName())
    wanted = converted(kind, pairs)
    assert made.pairs.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(delta(made.pairs[name]), weight, rtol=1e-10, atol=1e-10)
        assert made.stored[name].shape == weight.shape and not made.stored[name].transposed
    if kind in ("experts", "down"):
        back = as_stored(made, table(kind), [f"{name}.weight" for name in pairs])
        assert back.pairs.keys() == pairs.keys()
        for name, pair in pairs.items():
            torch.testing.assert_close(
                delta(back.pairs[name]), delta(pair), rtol=1e-10, atol=1e-10)


def adapter_of(pairs: dict[str, Pair]) -> Adapter:
    return Adapter("default", LoRAConfig(targets=list(pairs)), pairs)


class AnyName(set[str]):
    def __contains__(self, name: object) -> bool:
        return True


def converted(kind: str, pairs: dict[str, Pair]) -> dict[str, Tensor]:
    """What transformers makes of the weights s B A, by their sites."""
    converter, name = table(kind).converters[0], ""
    for site, pair in pairs.items():
        name, pattern = converter.rename_source_key(f"{site}.weight".replace("old.", "new."))
        converter.add_tensor(name, site, pattern, delta(pair))
    found = converter.convert(name)
    weights = {}
    for key, tensor in found.items():
        weights[key.removesuffix(".weight")] = tensor[0] if isinstance(tensor, list) else tensor
    return weights


def test_what_is_not_known_is_left_as_it_is() -> None:
    pairs = {f"experts.{number}.gate": Pair(torch.ones(1, 3), torch.ones(2, 1), 1.0)
             for number in range(2)}
    adapter = adapter_of(pairs)
    assert of_today(adapter, table("experts"), AnyName()) is adapter  # there is no up
    assert of_today(adapter, table("down"), {"experts.down"}) is adapter
    other = ConversionTable([], [WeightConverter(
        ["experts.*.gate.weight"], ["experts.gate"], [MergeModulelist(dim=1)])])
    assert of_today(adapter, other, AnyName()) is adapter
    narrow = adapter_of(pairs | {"experts.1.gate": Pair(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
    gate = ConversionTable([], [WeightConverter(
        ["experts.*.gate.weight"], ["experts.gate"], [MergeModulelist(dim=0)])])
    assert of_today(narrow, gate, AnyName()) is narrow
    assert set(of_today(adapter, gate, AnyName()).pairs) == {"experts.gate"}
    tensors = [f"experts.{number}.gate.weight" for number in range(3)]
    stacked = of_today(adapter, gate, AnyName())
    assert as_stored(stacked, gate, tensors) is stacked  # of three experts, not of two
