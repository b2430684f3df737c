"""What a recording run notes of the dataflow between linear calls, and how a value carries it.

A value's *sources* are the linear calls, attentions and inputs from which it was computed through
no other linear call or attention. They are bits of an integer.
"""

import dataclasses
import enum
from collections import defaultdict
from collections.abc import Sequence


class Logits(enum.IntEnum):
    """Whether a value is the result of linear calls, maybe scaled, shifted, capped or picked."""

    NO = 0
    BOUNDED = 1  # a bounded function of it: a cap, if a number multiplies that, else a feature
    YES = 2


class Axis(enum.Enum):
    """An axis of scores left @ right."""

    ROWS = "of left's rows"
    COLUMNS = "of right's columns"
    LOST = "not known"


@dataclasses.dataclass(frozen=True)
class Scores:
    """A product left @ right of two activations: their sources, and where its axes are now.

    A stride tells an axis in the value that carries this; None if it was lost.
    """

    left: int
    right: int
    row_stride: int | None
    column_stride: int | None
    softmax: Axis | None = None  # over which a softmax went, if one did

    def axis(self, stride: int | None) -> Axis:
        """The axis of this stride."""
        if stride is None or self.row_stride == self.column_stride:
            return Axis.LOST
        axes = {self.row_stride: Axis.ROWS, self.column_stride: Axis.COLUMNS}
        return axes.get(stride, Axis.LOST)


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of a tensor that was computed from an input, or from the weights of sites.

    Attributes:
        sources: bits of `Flow`.
        rows: the number of rows of the linear calls from which only functions of single rows led
            here; 0 if rows were mixed or lost.
        stacks: how many matrices of a stack of weights multiplied so many rows each.
        weights: the sites from whose weights alone it was computed; none of an activation.
    """

    sources: int = 0
    rows: int = 0
    stacks: int = 1
    scores: tuple[Scores, ...] = ()
    logits: Logits = Logits.NO
    weights: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class LinearCall:
    """A linear call that ran: of these sites, which read a value of these sources.

    Attributes:
        is_row_wise: whether each row read is a function of one row of each source's result.
        is_linear: whether it reads the result of linear calls, maybe scaled, shifted or picked.
        sums_before: how many sums ran before it.
    """

    sites: frozenset[str]
    reads: int
    is_row_wise: bool
    is_linear: bool
    sums_before: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(query key^T) value, by the sources of the three; `unsure`: query or key."""

    query: int
    key: int
    value: int
    unsure: int = 0


@dataclasses.dataclass
class Flow:
    """Linear calls and attentions in the order in which they ran, each a bit; a bit more an input.

    Attributes:
        calls, attentions: {bit: what ran}.
        sums: the sources of the terms of each sum, as a residual connection is one.
        weighing: what goes through a softmax, but for that of an attention.
        selecting: what goes through a selection of the largest, as a router's scores do.
        multiplied: what went into a product of two activations.
        logits: what the model returned as logits.
    """

    calls: dict[int, LinearCall] = dataclasses.field(default_factory=dict)
    attentions: dict[int, Attention] = dataclasses.field(default_factory=dict)
    sums: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    weighing: int = 0
    selecting: int = 0
    multiplied: int = 0
    logits: int = 0
    _bits: int = 0

    def bit(self) -> int:
        """A new source."""
        self._bits += 1
        return 1 << (self._bits - 1)

    def linear_call(
        self, sites: frozenset[str], read: Value, is_row_wise: bool, rows: int, stacks: int
    ) -> Value:
        """The value of x W^T for weights of these sites, x being so many rows that were read."""
        bit, is_linear = self.bit(), read.logits is Logits.YES
        self.calls[bit] = LinearCall(sites, read.sources, is_row_wise, is_linear, len(self.sums))
        return Value(bit, rows, stacks, logits=Logits.YES)

    def attention(self, attention: Attention) -> Value:
        """The value of softmax(query key^T) value."""
        bit = self.bit()
        self.attentions[bit] = attention
        return Value(bit)


def union(values: Sequence[Value]) -> Value:
    """A value that was computed from these, by a function of which nothing else is known."""
    sources = 0
    scores: dict[Scores, None] = {}
    for value in values:
        sources |= value.sources
        scores |= dict.fromkeys(value.scores)
    return Value(sources, scores=tuple(scores))


def attention_of(weights: Sequence[Scores], contracted: int | None, value: int) -> Attention:
    """The attention that multiplies these scores, after a softmax, and a value of these sources.

    The keys are along the axis that the product contracts, and the softmax is mostly over them.
    Where one value is both, as of a fused projection, there is nothing to tell apart.
    """
    by_contraction: dict[tuple[int, int], set[Axis]] = defaultdict(set)
    by_softmax: dict[tuple[int, int], set[Axis]] = defaultdict(set)
    for scores in weights:
        by_contraction[scores.left, scores.right].add(scores.axis(contracted))
        by_softmax[scores.left, scores.right].add(scores.softmax or Axis.LOST)
    query = key = unsure = 0
    for (left, right), axes in by_contraction.items():
        known = axes - {Axis.LOST} or by_softmax[left, right]
        if known == {Axis.COLUMNS} or left == right:
            query, key = query | left, key | right
        elif known == {Axis.ROWS}:
            query, key = query | right, key | left
        else:
            unsure |= left | right
    return Attention(query, key, value, unsure)
