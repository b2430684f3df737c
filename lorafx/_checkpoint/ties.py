"""Tensors that are one to the model: a head and an embedding, which a file holds once or twice."""

from .._adapter.names import dotted
from .._errors import TiedWeightError
from .checkpoint import Checkpoint
from .locate import Location


def tied_names(key: str, checkpoint: Checkpoint) -> list[str]:
    """Return a tensor's name and that of a head or embedding that is tied to it and there too."""
    shape, ties = checkpoint.tensors[key].shape, checkpoint.ties
    if ties is None or not ties.tied or len(shape) != 2 or shape[0] not in ties.vocabularies:
        return [key]
    return [key, *checkpoint.duplicates_of(key)]


def unties(location: Location, site: str, checkpoint: Checkpoint, untie: bool) -> bool:
    """True if folding into a tensor unties it from another.

    Raises:
        TiedWeightError: that is not wanted, or cannot be.
    """
    key, source = location
    shape, ties, base = checkpoint.tensors[source].shape, checkpoint.ties, checkpoint.label
    if ties is None or ties.tied is False:
        return False
    if key == source:
        if shape[0] not in ties.vocabularies:
            return False
        if ties.tied is None and checkpoint.of_shape(shape) != [key]:
            return False
    others = [source] if key != source else checkpoint.duplicates_of(key)
    if not others:
        known = "is" if ties.tied else "may be"
        raise TiedWeightError(
            f"The weight of '{site}' {known} tied to another that {base} does not hold, or has the "
            "shape of such a one by chance; folding an adapter into it would change that too: fold "
            f"it in memory, by lorafx.merge, or, if {base} holds both its head and its embedding, "
            "set tie_word_embeddings to false in its config.json.")
    tied = (f"The weight of '{site}' is tied to '{others[0]}' in {base}, so that folding an "
            "adapter into it would change that too")
    biases = {dotted(name.rpartition(".")[0], "bias") for name in (key, *others)}
    more = [name for name in checkpoint.of_shape(shape[:1]) if name not in biases]
    if not ties.one or more:
        why = f"may tie '{more[0]}' too" if more else "may tie more in such a model"
        raise TiedWeightError(f"{tied}; --untie cannot help, as tie_word_embeddings {why}: fold "
                              "the adapter in memory, by lorafx.merge.")
    if not untie:
        raise TiedWeightError(f"{tied}: --untie gives it a tensor of its own and sets "
                              "tie_word_embeddings to false in the new config.json.")
    return True
