"""What is known of a checkpoint before its data is read: names, shapes, dtypes, what is tied."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TensorInfo(NamedTuple):
    """The shape of a tensor of a checkpoint, and its dtype, None where torch has none like it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Ties:
    """What a Hugging Face config says of its head and embedding: whether they are one tensor.

    `tied` is None if that is unsaid; `vocabularies` are their rows. `one` says that this is one
    pair: an encoder-decoder, and a model of several with vocabularies, may tie others by the same
    word, under names that no file has.
    """

    tied: bool | None
    vocabularies: frozenset[int]
    one: bool

    @staticmethod
    def of(config: Mapping[str, Any]) -> "Ties":
        """From the content of config.json, nested configs too."""
        flags, rows = [], []
        encoder_decoder = False
        for values in _nested(config):
            if "tie_word_embeddings" in values:
                flags.append(values["tie_word_embeddings"])
            if isinstance(values.get("vocab_size"), int):
                rows.append(values["vocab_size"])
            encoder_decoder = encoder_decoder or bool(values.get("is_encoder_decoder"))
        one = len(rows) == 1 and not encoder_decoder
        return Ties(any(flags) if flags else None, frozenset(rows), one)


def _nested(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, what to call it in errors, and whether two tensors of it are equal.

    Without `ties` no tensor is tied to one that it does not hold. `config` is the content of the
    config.json beside it, if there is one.
    """

    label: str
    tensors: Mapping[str, TensorInfo]
    equal: Callable[[str, str], bool]
    ties: Ties | None = None
    config: Mapping[str, Any] | None = None

    def of_shape(self, shape: tuple[int, ...]) -> list[str]:
        """The names of all tensors of a shape."""
        return [name for name, tensor in self.tensors.items() if tensor.shape == shape]

    def duplicates_of(self, name: str) -> list[str]:
        """The others that are equal to a tensor: one that is tied may stand there twice."""
        alike = self.of_shape(self.tensors[name].shape)
        return [other for other in alike if other != name and self.equal(name, other)]


class Readable(NamedTuple):
    """A checkpoint and how its data is read.

    `rows` gives `length` rows of a tensor seen with a shape, from `start` on; they hold until it is
    called again.
    """

    checkpoint: Checkpoint
    rows: Callable[[str, Sequence[int], int, int], Tensor]
