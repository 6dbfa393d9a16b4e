"""Opens the model, the data and the prompts that the runs of a command share.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` and `python eval.py` use it.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

import clip
import data
import lipsum
from support import devices, layouts, weights
from support.errors import InputError, read_lines, unknown
from support.layouts import minidomain
from support.run.options import Execution, Sources
from support.run.processes import gathered


@dataclass(frozen=True, eq=False)
class Model:
    """The zero-shot CLIP of a command, on the devices, and its prompts."""

    clip: clip.CLIP
    tokenizer: Tokenizer
    templates: tuple[str, ...]
    content: dict[str, int]  # checksums of prompts, and of weights and image preparation
    tau: Float[Array, ""]
    moments: dict[int, Float[np.ndarray, "dim dim"]] = field(default_factory=dict)

    @property
    def text(self) -> clip.TextTower:
        """The text tower in host memory, for what one device of each process computes once."""
        return devices.fetch(self.clip.text)

    def second_moment(self, length: int = 8) -> Float[np.ndarray, "dim dim"]:
        """Returns C2 over 10,000 random texts of `length` tokens, or of as many as fit.

        The paper's energy gap is over texts of 8.
        """
        length = min(length, self.clip.config.context_length - 2)
        if length not in self.moments:
            moment = lipsum.text_second_moment(self.text, None, length)
            self.moments[length] = devices.fetch(moment)
        return self.moments[length]

    def read_guidance(self, path: Path) -> Int[np.ndarray, "pool tokens"]:
        """Returns the texts of a file, one per line, tokenized and cut to the longest.

        Raises InputError naming a line that is empty or too long.
        """
        rows = []
        lines = read_lines(path, f"--guidance {path}", "give one text per line")
        for number, line in enumerate(lines, start=1):
            place = f"--guidance {path} line {number}"
            if not clip.clean_text(line):
                raise InputError(f"{place} is empty: write a text or delete the line")
            try:
                rows.append(clip.tokenize(self.tokenizer, [line], self.clip.config))
            except InputError as error:
                raise InputError(f"{place}: {error}") from error
        return clip.without_padding(np.concatenate(rows), self.clip.config)


@dataclass(frozen=True, eq=False)
class Setup:
    """What all runs on one reference share: the model, its heads, the data, the devices.

    Training and selection have the classes `seen`, indices into `classes`: all, except in
    generalised zero-shot.
    """

    sources: Sources
    execution: Execution
    model: Model
    data: data.Data
    classes: tuple[str, ...]
    seen: Int[np.ndarray, " seen"]
    zero_shot: lipsum.Classifier
    context_head: Float[Array, "dim templates"]
    mesh: Mesh
    batch_size: int  # to evaluate with

    @property
    def content(self) -> dict[str, int]:
        """Checksums by option: files may change under their names, or have several names."""
        return self.model.content | {"class_names": zlib.crc32(repr(self.classes).encode())}

    def restrict_to_seen(self, classifier: lipsum.Classifier) -> lipsum.Classifier:
        """Returns the classifier over the classes of training and selection."""
        if len(self.seen) == len(self.classes):
            return classifier
        return lipsum.Classifier(classifier.vision, classifier.head[:, self.seen])

    def extend_to_all(self, classifier: lipsum.Classifier) -> lipsum.Classifier:
        """Returns the classifier over all classes.

        If some are unseen, its head is the fixed zero-shot one.
        """
        if len(self.seen) == len(self.classes):
            return classifier
        return lipsum.Classifier(classifier.vision, self.zero_shot.head)


Images = tuple[data.Data, tuple[str, ...], Int[np.ndarray, " seen"]]


def open_setups(
    sources: Sequence[Sources],
    execution: Execution,
    batch_size: int,
    images_of: Sequence[Images] = (),
) -> list[Setup]:
    """Loads and checks the data of every reference, and then the model that they share.

    `batch_size` is the largest to train with. `images_of` are other data, which were read before.
    Raises InputError before any long work.
    """
    batch_size = devices.evaluation_batch_size(batch_size, execution.accumulate)
    mesh = devices.device_mesh(batch_size)
    templates = read_templates(sources[0].templates)
    images_of = images_of or [read_data(each, execution) for each in sources]
    # This may download, so it comes after the data, whose root may be wrong.
    model = load_model(sources[0], execution, templates, mesh)
    setups = []
    for each, (images, classes, seen) in zip(sources, images_of, strict=True):
        features = clip.prompt_features(model.clip, model.tokenizer, classes, templates)
        # Training knows no unseen class.
        heads = clip.zero_shot_head(features), clip.context_head(features[:, seen])
        head, context_head = devices.place(heads, mesh, execution.fsdp)
        zero_shot = lipsum.Classifier(model.clip.vision, head)
        setups.append(
            Setup(
                sources=each,
                execution=execution,
                model=model,
                data=images,
                classes=classes,
                seen=seen,
                zero_shot=zero_shot,
                context_head=context_head,
                mesh=mesh,
                batch_size=batch_size,
            )
        )
    return setups


def read_data(sources: Sources, execution: Execution) -> Images:
    """Returns the checked splits, the names of all classes, and the indices of the seen ones."""
    images = layouts.read(
        sources.data,
        execution.data_root,
        sources.reference,
        sources.shifts,
        sources.select_on,
        execution.split_roots,
        sources.class_names,
        sources.keep_underscores,
    )
    classes = images.train.classes
    seen = seen_classes(classes, sources.unseen)
    if sources.unseen:
        train, selection = (
            data.keep_classes(split, seen) for split in (images.train, images.selection)
        )
        images = data.Data(train, selection, images.reports)
    splits = [images.train, images.selection, *images.reports.values()]
    data.check_images(splits, execution.workers)
    digests = []
    if jax.process_count() > 1:  # in one process there is nothing to compare
        digests = gathered([data.digest(split) for split in splits])
    if others := [number for number, each in enumerate(digests) if each != digests[0]]:
        problem = f"process {others[0]} finds other images than process 0"
        raise InputError(f"{problem}: give all the same files under {execution.data_root}")
    return images, classes, seen


def checksum(model: clip.CLIP) -> int:
    """Returns the CRC-32 of image preparation and weights.

    Finished runs have it in their files: it is that of all blocks in one stack.
    """
    result = zlib.crc32(repr(model.config.preparation).encode())
    leaves = clip.named_leaves(model)
    for name, leaf in leaves.items():
        if ".last." not in name:
            result = zlib.crc32(np.asarray(leaf).data, result)
        if clip.is_stacked(name):
            last = leaves[name.replace(".blocks.", ".last.")]
            result = zlib.crc32(np.asarray(last).data, result)
    return result


def load_model(
    sources: Sources, execution: Execution, templates: Sequence[str], mesh: Mesh
) -> Model:
    """Loads the model and places it on the devices."""
    model, tokenizer = weights.load(sources.model)
    content = {
        "model": checksum(model),
        "templates": zlib.crc32(repr(tuple(templates)).encode()),
    }
    placed, tau = devices.place((model, jnp.exp(model.logit_scale)), mesh, execution.fsdp)
    return Model(placed, tokenizer, tuple(templates), content, tau)


# OpenAI's prompts for ImageNet, from notebooks/Prompt_Engineering_for_ImageNet.ipynb of openai/CLIP
# (MIT licence).
OPENAI_PROMPTS = Path(__file__).parents[2] / "assets" / "openai-prompts.txt"


def read_templates(templates: str | None) -> list[str]:
    """Returns OpenAI's prompts, those of a file, the given prompt, or minidomain's.

    Raises InputError for one without `{}`.
    """
    if templates is None:
        return list(minidomain.TEMPLATES)
    if templates == "openai":
        return read_lines(OPENAI_PROMPTS)
    if "{}" in templates:
        return [templates]
    name = f"--templates {templates!r} is neither openai nor a prompt with {{}}, and as a file it"
    lines = read_lines(Path(templates), name, "give one of the three")
    prompts = [line for line in map(str.strip, lines) if line]
    source = [line for line in prompts if line[0] in "'\"[" and line.rstrip(",")[-1] in "'\"]"]
    bare = [prompt for prompt in prompts if "{}" not in prompt]
    if not prompts:
        problem = "is empty: write one prompt per line"
    elif source:
        problem = f"has Python source: write the prompt alone, without quotes: {source[0]}"
    elif bare:
        problem = f"has {bare[0]!r} without {{}} for the class: add it"
    else:
        return prompts
    raise InputError(f"--templates {templates} {problem}")


def seen_classes(classes: Sequence[str], unseen: Sequence[str]) -> Int[np.ndarray, " seen"]:
    """Returns the indices of the classes that are not `unseen`.

    Raises InputError for an unknown one, or if fewer than two stay.
    """
    known = {name.replace("_", " "): name for name in classes}
    for name in unseen:
        if name.replace("_", " ") not in known:
            raise unknown("class", name, classes)
    held_back = {known[name.replace("_", " ")] for name in unseen}
    seen = [index for index, name in enumerate(classes) if name not in held_back]
    if len(seen) < 2:
        problem = f"--unseen holds back {len(held_back)} of {len(classes)} classes"
        advice = "leave two or more to train on"
        if len(classes) < 2:
            problem = f"the data have one class, {classes[0]}"
            advice = "give two or more, perhaps the folder above is meant"
        raise InputError(f"{problem}: {advice}")
    return np.array(seen, np.int32)
