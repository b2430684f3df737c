"""FSDP2 over packed weights, in two processes: what one process computes."""

from tests.support.torchrun import torchrun


def test_set_ups_of_packed_layers_in_two_processes() -> None:
    found = torchrun(
        "tests.sharded.quantised", 2, "four_bits", "groups_of_buffers", "saved_from_all")
    assert len(found) == 3
