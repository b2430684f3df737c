"""Which linear calls of a flow serve attention, make feed-forward blocks, or give the logits."""

import functools

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
        self.outputs, self.mlp, downs = self._outputs(), 0, 0
        for bit, call in flow.calls.items():
            ups = self._ups(bit, call)
            if ups:
                self.mlp |= ups & ~(flow.weighing | flow.selecting) | bit
                downs |= bit
        self._stream = self.outputs | downs  # what is added to the residual stream
        self.query = self.key = self.value = self.unsure = 0
        for attention in flow.attentions.values():
            value = self._projections(attention.value)
            self.query |= self._projections(attention.query)
            self.key |= self._beside(self._projections(attention.key), value)
            self.value |= value
            self.unsure |= self._projections(attention.unsure)
        for attention in flow.attentions.values():
            self._add_latents(attention)

    def roles_of(self, bit: int) -> set[str]:
        """The roles of one call."""
        masks = {QUERY: self.query, KEY: self.key, VALUE: self.value, OUTPUT: self.outputs,
                 MLP: self.mlp}
        own = {role for role, mask in masks.items() if bit & mask}
        if not own and bit & self.flow.logits and not bit & self._read:
            own = {HEAD}
        return own

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
                if self._inputs(beside) <= self._inputs(attentions):
                    found |= bit
        return found

    def _ups(self, bit: int, down: LinearCall) -> int:
        """The calls whose results, row by row, make what a call reads that adds to a residual.

        They all read one value, and the residual comes from where that came from.
        """
        ups = down.reads
        if not ups or ups & ~self._calls or not down.is_row_wise or (ups | bit) & self.outputs:
            return 0
        inputs = self._inputs(ups)
        if len(inputs) != 1:
            return 0
        [source] = inputs
        for one, other in self.flow.sums[down.sums_before:]:
            for term, rest in ((one, other), (other, one)):
                if term & bit and not term & ups and not rest & bit and rest & source & ~term:
                    return ups
        return 0

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
        """The calls for key that read what one for value does; all, if none does."""
        inputs = self._inputs(value)
        return sum(bit for bit in bits(key) if self.flow.calls[bit].reads in inputs) or key

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
                for role in ("query", "key", "value"):
                    part = self._projections(getattr(attention, role))
                    if latent in self._inputs(part):
                        setattr(self, role, getattr(self, role) | latent)

    def _only_read_by(self, latent: int, projections: int, attention: Attention) -> bool:
        for bit, call in self.flow.calls.items():
            if call.reads & latent and not bit & (projections | self.flow.selecting):
                return False
        return all(other is attention or not _operands(other) & latent
                   for other in self.flow.attentions.values())


def bits(mask: int) -> list[int]:
    """The bits that are set in a mask."""
    found: list[int] = []
    while mask:
        low = mask & -mask
        found.append(low)
        mask ^= low
    return found


def _operands(attention: Attention) -> int:
    return attention.query | attention.key | attention.value | attention.unsure
