"""accelerate and transformers' Trainer, in processes."""

from tests.support.torchrun import torchrun


def test_set_ups_of_huggingface() -> None:
    assert torchrun("tests.sharded.huggingface", 2)
