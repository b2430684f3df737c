"""Models made on the meta device, in processes."""

from tests.support.torchrun import torchrun


def test_set_ups_of_meta() -> None:
    assert torchrun("tests.sharded.meta", 2)
