"""Dummy inputs for any model of transformers, made by the names of its forward's arguments."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
FIRST_SPECIAL = 100  # ids from here on stand for special tokens
BATCH, LENGTH, IMAGE, SAMPLES, STEPS = 2, 12, 64, 4000, 64
SIDE = 4  # patches along each side of an image that is given as patches
FORMS = 4
# Arguments that some models refuse: the second kind of attempt leaves them out.
OPTIONAL = ("attention_mask", "image_sizes", "pixel_attention_mask", "input_features_mask")
# Arguments that are another way of giving the main input, or a second one beside it.
SECOND = ("inputs_embeds", "pixel_values_videos")
# (the argument that holds features, the method that makes them, the name of the token that stands
# for one in the text)
FEATURES = (("pixel_values", "get_image_features", "image"),
            ("input_features", "get_audio_features", "audio"))


def attempts(model: PreTrainedModel) -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """(what they are, a function that makes them) for inputs to try, the most complete first.

    Arguments are taken all, or without masks and sizes, or only the main ones; images and sounds
    have several forms.
    """
    arguments = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    least = [*([main] if isinstance(main, str) else main),
             *(name for name, argument in arguments.items() if argument.default is argument.empty)]
    least += [name for name in ("decoder_input_ids",) if name in arguments]
    known = [name for name in arguments if name in MAKERS and (name not in SECOND or name in least)]
    patches_first = any("grid" in name or name == "spatial_shapes" for name in arguments)
    forms = (1, 0, 2, 3) if patches_first else range(FORMS)
    unmasked = [name for name in known if name not in OPTIONAL]
    for how, names in (("all", known), ("without masks", unmasked), ("main", least),
                       ("main and mask", [*least, "attention_mask"])):
        for form in forms:
            yield f"{how}, form {form}", partial(Inputs(model, form).make, names)


class Inputs:
    """Makes the inputs of a model; `form`, from 0 to 3, is the shape of its images and sounds."""

    def __init__(self, model: PreTrainedModel, form: int) -> None:
        self.model, self.form = model, form
        self.arguments = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(0)

    def values(self, *names: str, default: int) -> list[int]:
        """The first of these fields that the config, or one below it, has as a number or numbers;
        breadth first."""
        waiting = [self.model.config]
        for config in waiting:
            for name in names:
                with contextlib.suppress(Exception):
                    found = getattr(config, name)
                    found = list(found) if isinstance(found, (list, tuple)) else [found]
                    if found and isinstance(found[0], int):
                        return found
            waiting += [below for key in config.sub_configs_defaults
                        if isinstance(below := getattr(config, key, None), PreTrainedConfig)]
        return [default]

    def value(self, *names: str, default: int) -> int:
        """The same, as one number."""
        return self.values(*names, default=default)[0]

    def normal(self, *shape: int) -> Tensor:
        """Random numbers from N(0, 1)."""
        return torch.randn(shape, generator=self.generator)

    def tokens(self) -> Tensor:
        """Text (batch, length), none of it special."""
        end = min(FIRST_SPECIAL, self.value("vocab_size", default=VOCABULARY))
        return torch.randint(min(5, end - 1), end, (BATCH, LENGTH), generator=self.generator)

    def channels(self) -> int:
        """The number of an image's channels."""
        return self.value("num_channels", "in_channels", "in_chans", default=3)

    def images(self) -> Tensor:
        """Images (batch, channels, height, width), patches, or videos with the frames before or
        after the channels."""
        if self.form == 1:
            rows = self.patches()
            if any("grid" in name for name in self.arguments):
                return rows
            return rows.view(BATCH, SIDE * SIDE, -1)
        sides = (2 * self.values("image_size", "img_size", default=IMAGE))[:2]
        frames = self.value("num_frames", "frames_per_clip", default=2)
        return self.normal(BATCH, *((self.channels(),), (), (frames, self.channels()),
                                    (self.channels(), frames))[self.form], *sides)

    def patches(self) -> Tensor:
        """Images as rows of patches (patches, channels x frames x side x side)."""
        frames = self.value("temporal_patch_size", "patch_temporal", default=1)
        side = self.value("patch_size", default=16)
        return self.normal(BATCH * SIDE * SIDE, self.channels() * frames * side ** 2)

    def frames(self) -> int:
        """The number of a spectrogram's frames."""
        return 2 * self.value("max_source_positions", default=52)

    def spectrograms(self) -> Tensor:
        """Sounds (batch, mel bins, frames), or with the last two exchanged."""
        bins = self.value("input_feat_per_channel", "num_mel_bins", "input_feat_size",
                          "feature_size", "n_mels", "feature_projection_input_dim", default=128)
        shape = (bins, self.frames())
        return self.normal(BATCH, *(shape if self.form % 2 == 0 else reversed(shape)))

    def waves(self) -> Tensor:
        """Sounds (batch, samples), (batch, channels, samples), or spectrograms (batch, frames, mel
        bins)."""
        if self.form == 0:
            return self.normal(BATCH, SAMPLES)
        if self.form == 1:
            return self.normal(BATCH, self.value("audio_channels", default=1), SAMPLES)
        return self.normal(BATCH, self.value("max_length", default=100),
                           self.value("num_mel_bins", default=80))

    def series(self) -> Tensor:
        """Series (batch, steps) with the lags that the first prediction looks back, or (batch,
        steps, channels)."""
        steps = self.value("context_length", default=STEPS)
        channels = self.value("num_input_channels", default=1)
        return self.normal(BATCH, *((steps + 7,), (steps, channels), (STEPS,), (STEPS,))[self.form])

    def make(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The inputs for these arguments, as far as MAKERS knows them."""
        made = {name: MAKERS[name](self) for name in names if name in MAKERS}
        for feature, method, token in FEATURES:
            special = self.value(f"{token}_token_id", f"{token}_token_index", default=-1)
            owners = [module for module in self.model.modules() if hasattr(module, method)]
            if {"input_ids", feature} <= made.keys() and special >= 0 and owners:
                self.place(made, getattr(owners[0], method), special)
        return made

    def place(self, made: dict[str, Tensor], function: Callable[..., Any], special: int) -> None:
        """Put as many tokens that stand for features into the text as this method of the model
        makes features."""
        arguments = inspect.signature(function).parameters
        given = {name: MAKERS[name](self) for name, argument in arguments.items()
                 if argument.default is argument.empty and name in MAKERS}
        given |= {name: value for name, value in made.items() if name in arguments}
        with torch.no_grad():
            found = function(**given)
        found = getattr(found, "pooler_output", found)
        parts = found if isinstance(found, (list, tuple)) else [found]
        count = sum(part.numel() // part.shape[-1] for part in parts) // BATCH
        text = made["input_ids"].where(made["input_ids"] != special, special + 1)
        middle = torch.full((BATCH, count), special)
        made["input_ids"] = torch.cat([text[:, :2], middle, text[:, 2:]], 1)
        if "attention_mask" in made:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
        if "mm_token_type_ids" in made:
            made["mm_token_type_ids"] = (made["input_ids"] == special).long()


Maker = Callable[[Inputs], Tensor]


def ones(*shape: int) -> Maker:
    """A maker of ones (batch, *shape), such as masks."""
    return lambda inputs: torch.ones(BATCH, *shape, dtype=torch.long)


def normal(*shape: int | tuple[str, int]) -> Maker:
    """A maker of random numbers (batch, *shape); a pair is a field of the config and what to take
    where it is not."""
    def make(inputs: Inputs) -> Tensor:
        sizes = []
        for size in shape:
            if not isinstance(size, int):
                size = inputs.value(size[0], default=size[1])
            sizes.append(size)
        return inputs.normal(BATCH, *sizes)

    return make


def grid(*sizes: int) -> Maker:
    """A maker of the numbers of patches (batch, axes)."""
    return lambda inputs: torch.tensor([sizes] * BATCH)


def context(inputs: Inputs) -> int:
    """The steps of a series that a model looks at, with the lags before them."""
    return inputs.value("context_length", default=STEPS) + 7


def pixel_positions(inputs: Inputs) -> Tensor:
    """The place of each patch in the image (batch, patches, 2)."""
    return torch.cartesian_prod(*[torch.arange(SIDE)] * 2).expand(BATCH, PATCHES, 2)


def task_inputs(inputs: Inputs) -> Tensor:
    """The tokens of a task's name (batch, length)."""
    return torch.ones(BATCH, inputs.value("task_seq_len", default=LENGTH), dtype=torch.long)


def boxes(inputs: Inputs) -> Tensor:
    """Where each token stands on the page (batch, length, 4)."""
    return torch.tensor([1, 2, 8, 9]).expand(BATCH, LENGTH, 4) + torch.arange(LENGTH)[:, None]


HIDDEN = ("hidden_size", 32)
PATCHES = SIDE * SIDE
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("input_ids", "decoder_input_ids", "qformer_input_ids"), Inputs.tokens),
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "prompt_pixel_values", "prompt_masks"),
                    Inputs.images),
    **dict.fromkeys(("input_features", "audio_mel"), Inputs.spectrograms),
    **dict.fromkeys(("inputs_embeds", "noise_embeds", "context_hidden_states", "action_embeds"),
                    normal(LENGTH, HIDDEN)),
    **dict.fromkeys(("grid_thw", "image_grid_thw"), grid(1, SIDE, SIDE)),
    **dict.fromkeys(("image_grid_hw", "spatial_shapes"), grid(SIDE, SIDE)),
    **dict.fromkeys(("merge_sizes", "image_merge_sizes"), ones()),
    **dict.fromkeys(("rewards", "returns_to_go"), normal(5, 1)),
    **dict.fromkeys(("input_features_mask", "feature_attention_mask"),
                    lambda inputs: torch.ones(BATCH, inputs.frames(), dtype=torch.long)),
    "attention_mask": ones(LENGTH),
    "mm_token_type_ids": lambda inputs: torch.zeros(BATCH, LENGTH, dtype=torch.long),
    "image_sizes": grid(IMAGE, IMAGE),
    "pixel_attention_mask": ones(PATCHES),
    "pixel_position_ids": pixel_positions,
    "hidden_states": Inputs.patches,
    "audio_mel_mask": lambda inputs: torch.zeros(BATCH, inputs.frames(), dtype=torch.bool),
    "input_values": Inputs.waves,
    "query_embeds": normal(("num_query_tokens", 8), HIDDEN),
    "latents": normal(HIDDEN, LENGTH),
    "inputs": normal(LENGTH, ("d_model", 32)),
    "past_values": Inputs.series,
    "past_observed_mask": lambda inputs: torch.ones(BATCH, context(inputs)),
    "past_time_features": lambda inputs: torch.zeros(BATCH, context(inputs), 0),
    "past_values_padding": lambda inputs: torch.zeros(BATCH, STEPS),
    "freq": lambda inputs: torch.zeros(BATCH, 1, dtype=torch.long),
    "states": normal(5, ("state_dim", 17)),
    "actions": normal(5, ("act_dim", 4)),
    "timesteps": lambda inputs: torch.arange(5).expand(BATCH, 5),
    "visual_feats": normal(3, ("visual_feat_dim", 2048)),
    "visual_pos": normal(3, 4),
    "task_inputs": task_inputs,
    "bbox": boxes,
}
