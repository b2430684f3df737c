"""Which linear calls of a flow serve attention, make feed-forward blocks, or give the logits."""

import functools
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .flow import Attention, Flow, LinearCall


QUERY, KEY, VALUE = "attention.query", "attention.key", "attention.value"
OUTPUT, MLP, HEAD = "attention.output", "mlp", "head"
ROLES = (QUERY, KEY, VALUE, OUTPUT, MLP, HEAD)


class RoleCalls:
    """What a flow says of the calls in it, each a bit."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self._inputs_of: dict[int, set[int]] = {}  # what was found, by attention
        self._calls, self._attentions = sum(flow.calls), sum(flow.attentions)
        self._choosing = flow.weighing | flow.selecting
        self.outputs, self.mlp, ends = self._outputs(), 0, 0
        self.outputs |= self._second_outputs()
        others: list[_Block] = []
        for bit, call in flow.calls.items():
            blocks = self._blocks(bit, call)
            found = [block for block in blocks
                     if self._adds_to(block, block.source | self._began(block.source))]
            for block in found[:1]:
                self.mlp |= block.calls & ~self._choosing | bit
                ends |= bit
            if not found:
                others += blocks
        self._stream = self.outputs | ends  # what is added to the residual stream
        self.query = self.key = self.value = self.unsure = 0
        for attention in flow.attentions.values():
            value = self._projections(attention.value)
            self.query |= self._projections(attention.query)
            self.key |= self._beside(self._projections(attention.key), value)
            self.value |= value
            if not attention.unsure & self._stream:
                self.unsure |= attention.unsure & self._calls & ~flow.weighing
        for attention in flow.attentions.values():
            self._add_latents(attention)
        self.open = self._open(others)

    def roles_of(self, bit: int) -> set[str]:
        """The roles of one call."""
        masks = {QUERY: self.query, KEY: self.key, VALUE: self.value, OUTPUT: self.outputs,
                 MLP: self.mlp}
        own = {role for role, mask in masks.items() if bit & mask}
        if not own and bit & self.flow.logits and not bit & self._read:
            own = {HEAD}
        return own

    def why_none(self, bit: int) -> str:
        """Why a call without a role is decided to have none."""
        if bit & self._choosing:
            return "its result chooses among others, as a router's does"
        reads = self.flow.calls[bit].reads
        if not reads & (self._calls | self._attentions):
            return "it reads constants or what the model is given, and no attention or block of it"
        return "it is in no attention, in no block whose result is added to what it began with, " \
               "and no head"

    @functools.cached_property
    def _read(self) -> int:
        """What linear calls, attentions and products read."""
        read = self.flow.multiplied
        for call in self.flow.calls.values():
            read |= call.reads
        for attention in self.flow.attentions.values():
            read |= _operands(attention)
        return read

    def _inputs(self, sources: int) -> set[int]:
        """What the linear calls among these sources read, and those of attentions among them."""
        read = {self.flow.calls[bit].reads for bit in bits(sources & self._calls)}
        for bit in bits(sources & self._attentions):
            if bit not in self._inputs_of:
                self._inputs_of[bit] = self._inputs(_operands(self.flow.attentions[bit]))
            read |= self._inputs_of[bit]
        return read

    def _outputs(self) -> int:
        """The calls that read attention's result, maybe gated by what reads its input."""
        found = 0
        for bit, call in self.flow.calls.items():
            attentions = call.reads & self._attentions
            beside = call.reads & ~attentions
            if attentions and not beside & ~self._calls:
                known = _union(self._inputs(attentions))
                for one in bits(attentions):
                    known |= _operands(self.flow.attentions[one])
                if not _union(self._inputs(beside)) & ~known:
                    found |= bit
        return found

    def _second_outputs(self) -> int:
        """The calls that are outputs with the one that they read, before the sum."""
        found = 0
        for bit, call in self.flow.calls.items():
            began = self._began(call.reads) if call.is_linear else 0
            if began and self._adds_to(_Block(call.reads | bit, bit, began), began):
                found |= bit
        return found

    def _began(self, sources: int) -> int:
        """What attention began with, if these sources are all outputs of it."""
        if sources & ~self.outputs:
            return 0
        return _union(self._inputs(_union(self._inputs(sources)) & self._attentions))

    def _blocks(self, bit: int, end: LinearCall) -> list["_Block"]:
        """What may be a feed-forward block, or one in a narrow width with the calls around it.

        What is routed is put together in ways that need not keep rows in sight.
        """
        found = []
        ups, source = self._ups(bit, end)
        if ups:
            found.append(_Block(ups | bit, bit, source))
        downs = end.reads & ~self._choosing
        if not downs or downs & ~self._calls or (downs | bit) & self.outputs:
            return found
        if not end.is_row_wise and downs == end.reads:
            return found
        inner, sources = 0, set()
        for down in bits(downs):
            ups, source = self._ups(down, self.flow.calls[down])
            if not ups:
                return found
            inner |= ups
            sources.add(source)
        if len(sources) == 1:
            are_row_wise = all(self.flow.calls[up].is_row_wise for up in bits(inner))
            calls, first = inner | downs | bit, self.flow.calls.get(source)
            if first is not None and are_row_wise and not source & self.outputs:
                calls, source = calls | source, first.reads
            found.append(_Block(calls, bit, source))
        return found

    def _ups(self, bit: int, down: LinearCall) -> tuple[int, int]:
        """The calls whose results, row by row, are all that a call reads, and the value they read.

        With those of a first factor, which only they read, beside others that read that value.
        No calls, if they read several.
        """
        ups = down.reads
        if not ups or ups & ~self._calls or not down.is_row_wise or (ups | bit) & self.outputs:
            return 0, 0
        inputs = self._inputs(ups)
        for read in inputs & self.flow.calls.keys():
            if self.flow.calls[read].reads in inputs and self._only_read_by(read, ups):
                ups, inputs = ups | read, inputs - {read}
        return (ups, inputs.pop()) if len(inputs) == 1 else (0, 0)

    def _adds_to(self, block: "_Block", wanted: int) -> bool:
        """True if the result of a block is added to what comes from one of these sources."""
        within = block.calls & ~block.end
        for one, other in self.flow.sums[self.flow.calls[block.end].sums_before:]:
            for term, rest in ((one, other), (other, one)):
                if term & block.end and not term & within and not rest & block.end:
                    if rest & wanted & ~term:
                        return True
        return False

    def _open(self, blocks: Sequence["_Block"]) -> int:
        """The calls of blocks of no role whose result is added to what all of it comes through.

        That is not what they began with, as where a recurrence is before a block in one layer.
        """
        known = self.outputs | self.mlp | self.query | self.key | self.value | self._choosing
        found = 0
        for block in blocks:
            if not block.calls & known and self._adds_to(block, self._through(block.source)):
                found |= block.calls
        return found

    @functools.cached_property
    def _ways(self) -> dict[int, int]:
        """Each call and attention, and all that each way to it goes through."""
        reads = {bit: call.reads for bit, call in self.flow.calls.items()}
        for bit, attention in self.flow.attentions.items():
            reads[bit] = _operands(attention)
        ways: dict[int, int] = {}
        for bit in sorted(reads):  # as they ran
            ways[bit] = bit | _common(ways.get(source, source) for source in bits(reads[bit]))
        return ways

    def _through(self, sources: int) -> int:
        return _common(self._ways.get(source, source) for source in bits(sources))

    def _projections(self, sources: int) -> int:
        """The linear calls that give an attention these sources, none if it reads the stream.

        Beside calls that read what was computed, those that read constants give positions.
        """
        if sources & self._stream:
            return 0
        calls = bits(sources & self._calls & ~self.flow.weighing)
        reading = [bit for bit in calls if self.flow.calls[bit].reads]
        return sum(reading or calls)

    def _beside(self, key: int, value: int) -> int:
        """The calls for key that read what one for value does, or so their first factor; or all."""
        inputs = self._inputs(value)
        found = 0
        for bit in bits(key):
            reads = self.flow.calls[bit].reads
            factor = self.flow.calls.get(reads)
            if reads in inputs or factor is not None and factor.reads in inputs:
                found |= bit
        return found or key

    def _add_latents(self, attention: Attention) -> None:
        """Add the calls that only projections of this attention read, as those of low rank do.

        Another projection, or another such call, reads what they read.
        """
        projections = self._projections(_operands(attention))
        latents = 0
        for bit in bits(projections):
            reads = self.flow.calls[bit].reads
            if reads in self.flow.calls and self._only_read_by(reads, projections, attention):
                latents |= reads
        for latent in bits(latents):
            others = self._inputs((projections | latents) & ~latent) - {latent}
            if self.flow.calls[latent].reads in others:
                for role in ("query", "key", "value", "unsure"):
                    part = self._projections(getattr(attention, role))
                    if latent in self._inputs(part):
                        setattr(self, role, getattr(self, role) | latent)

    def _only_read_by(
        self, latent: int, readers: int, attention: Attention | None = None
    ) -> bool:
        """True if only these calls, one attention, and what selects tokens for it read a result."""
        for bit, call in self.flow.calls.items():
            if call.reads & latent and not bit & (readers | self.flow.selecting):
                return False
        return all(other is attention or not _operands(other) & latent
                   for other in self.flow.attentions.values())


class _Block(NamedTuple):
    """Calls that may be a feed-forward block, its last, and the sources of what it began with."""

    calls: int
    end: int
    source: int


def bits(mask: int) -> list[int]:
    """The bits that are set in a mask."""
    found: list[int] = []
    while mask:
        low = mask & -mask
        found.append(low)
        mask ^= low
    return found


def _union(masks: Iterable[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def _common(masks: Iterable[int]) -> int:
    """The bits that all masks have; none, if there are no masks."""
    found = list(masks)
    return functools.reduce(operator.and_, found) if found else 0


def _operands(attention: Attention) -> int:
    return attention.query | attention.key | attention.value | attention.unsure
