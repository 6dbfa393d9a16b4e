"""Reads models as OpenAI, Hugging Face and open_clip publish them, and writes Hugging Face folders.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model NAME_FILE_OR_FOLDER` uses it.
`clip.NAMES` maps the entries of the formats to a `clip.CLIP`; open_clip's entries have OpenAI's names. The sizes come
from the configuration beside the weights. What no file specifies is assumed, and the command says so.
"""

import dataclasses
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import clip
from support import errors
from support.errors import InputError, read_json, read_lines, unknown
from support.weights import hub
from support.weights.archives import read_safetensors, read_torch_archive

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # beside OpenAI's files
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
TINY = Path(__file__).parents[2] / "assets" / "tiny-clip"
_TOWER_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)  # as in clip.Transformer


def openai_config(state: Mapping[str, np.ndarray], source: str) -> clip.Config:
    """Returns the sizes that the shapes of OpenAI's entries imply. OpenAI's attention heads have width 64.

    Raises InputError if an entry that implies a size is missing or empty, or has the wrong number of axes.
    """
    tables = [
        "visual.positional_embedding",
        "token_embedding.weight",
        "positional_embedding",
        "text_projection",
    ]
    first_layers = [
        "visual.transformer.resblocks.0.mlp.c_fc.weight",
        "transformer.resblocks.0.mlp.c_fc.weight",
    ]
    ranks = {"visual.conv1.weight": 4} | dict.fromkeys(tables + first_layers, 2)
    wrong = [f"lacks {name}" for name in ranks if name not in state]
    shapes = {name: state[name].shape for name in ranks if name in state}
    wrong += [
        f"{name} has shape {shape}"
        for name, shape in shapes.items()
        if len(shape) != ranks[name] or 0 in shape
    ]
    if wrong:
        raise InputError(
            f"weights {source} are not a CLIP with a vision transformer, give one: {'; '.join(wrong)}"
        )

    def tower(prefix: str) -> clip.Transformer:
        mlp_width, width = shapes[f"{prefix}resblocks.0.mlp.c_fc.weight"]
        if width % 64:
            raise InputError(
                f"weights {source}: width {width} is no multiple of 64, the width of OpenAI's attention heads: give "
                "the model as a Hugging Face folder, whose config.json specifies the heads"
            )
        layers = {
            name.split(".")[prefix.count(".") + 1]
            for name in state
            if name.startswith(f"{prefix}resblocks.")
        }
        return clip.Transformer(width, len(layers), width // 64, mlp_width)

    patch_size = shapes["visual.conv1.weight"][-1]
    vocabulary_size = shapes["token_embedding.weight"][0]
    return clip.Config(
        image_size=patch_size * math.isqrt(shapes["visual.positional_embedding"][0] - 1),
        patch_size=patch_size,
        vision=tower("visual.transformer."),
        text=tower("transformer."),
        embedding_size=shapes["text_projection"][1],
        context_length=shapes["positional_embedding"][0],
        vocabulary_size=vocabulary_size,
        start_token=vocabulary_size - 2,
        end_token=vocabulary_size - 1,
    )


# What `transformers` takes for keys that a config.json lacks: the sizes of ViT-B/32.
_B32 = clip.PRESETS["ViT-B/32"]
_DEFAULTS = {
    kind: dict(zip(_TOWER_KEYS, vars(sizes).values(), strict=True))
    | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    for kind, sizes in (("vision_config", _B32.vision), ("text_config", _B32.text))
}
_DEFAULTS["vision_config"] |= {"image_size": _B32.image_size, "patch_size": _B32.patch_size}
_DEFAULTS["text_config"] |= {
    "max_position_embeddings": _B32.context_length, "vocab_size": _B32.vocabulary_size,
    "bos_token_id": _B32.start_token, "eos_token_id": _B32.end_token,
}  # fmt: skip


def hugging_face_config(path: Path) -> clip.Config:
    """Returns the sizes in a Hugging Face `config.json`. Keys that it lacks have the defaults of `transformers`.

    Raises InputError if a key has a wrong value, or if the model is not a CLIP.
    """
    content = read_json(path)
    try:
        if (kind := content.get("model_type", "clip")) != "clip":
            raise InputError(
                f"{path} describes a {kind}, not a CLIP with an image and a text tower: give a CLIP"
            )
        sections = []
        for name, defaults in _DEFAULTS.items():
            section = defaults | ({} if content.get(name) is None else content[name])
            if old := content.get(f"{name}_dict"):  # in files of 2022, it prevails
                section |= defaults | old
            sections.append(section)
        vision, text = sections
        pairs = [(part["hidden_act"], part["layer_norm_eps"]) for part in (vision, text)]
        activation, epsilon = pairs[0]
        if pairs[0] != pairs[1] or activation not in clip.ACTIVATIONS or type(epsilon) is not float:
            raise InputError(
                f"{path}: both towers must have one layer_norm_eps and one hidden_act, of "
                f"{', '.join(clip.ACTIVATIONS)}: choose another model"
            )
        tokens = text["bos_token_id"], text["eos_token_id"]
        vocabulary_size = positive(path, text, "vocab_size")
        if tokens[1] == 2:  # the first published configurations say 2 and mean the highest id
            tokens = vocabulary_size - 2, vocabulary_size - 1
        if not all(type(token) is int and 0 <= token < vocabulary_size for token in tokens):
            raise InputError(
                f"{path}: bos_token_id, eos_token_id {tokens} are not in the vocabulary: restore the file"
            )
        return clip.Config(
            image_size=positive(path, vision, "image_size"),
            patch_size=positive(path, vision, "patch_size"),
            vision=tower(path, vision),
            text=tower(path, text),
            embedding_size=positive(
                path, {"projection_dim": _B32.embedding_size} | content, "projection_dim"
            ),
            context_length=positive(path, text, "max_position_embeddings"),
            vocabulary_size=vocabulary_size,
            start_token=tokens[0],
            end_token=tokens[1],
            activation=activation,
            layer_norm_epsilon=epsilon,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is not the configuration of a CLIP ({error!r}): restore the file"
        ) from error


def positive(path: Path, section: Mapping[str, Any], key: str) -> int:
    """A size in a configuration. Raises InputError if it is not a positive whole number."""
    if type(section[key]) is not int or section[key] < 1:
        raise InputError(
            f"{path}: {key} is {section[key]!r}, not a positive whole number: restore the file"
        )
    return section[key]


def tower(
    path: Path, section: Mapping[str, Any], keys: Sequence[str] = _TOWER_KEYS
) -> clip.Transformer:
    """The sizes of a tower, under the given keys. Raises InputError if they do not fit each other."""
    width, layers, heads, mlp_width = (positive(path, section, key) for key in keys)
    if width % heads:
        raise InputError(
            f"{path}: {keys[0]} {width} is no multiple of its {heads} heads: restore the file"
        )
    return clip.Transformer(width, layers, heads, mlp_width)


# open_clip's defaults, and the keys that change nothing here: settings of its training, and of its own code.
_OPEN_CLIP_VISION = {
    "image_size": 224, "layers": 12, "width": 768, "patch_size": 16, "head_width": 64, "mlp_ratio": 4.0,
}  # fmt: skip
_OPEN_CLIP_TEXT = {
    "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
}  # fmt: skip
_OPEN_CLIP_TOWER = ("width", "layers", "heads", "mlp_width")
_OPEN_CLIP_INERT = {
    "patch_dropout", "output_tokens", "hf_tokenizer_name", "tokenizer_kwargs", "init_logit_scale", "custom_text",
}  # fmt: skip
_OPEN_CLIP_USUAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
}


def open_clip_config(path: Path) -> clip.Config:
    """Returns the sizes in an `open_clip_config.json`. Raises InputError for models that `clip.CLIP` is not."""
    content = read_json(path)
    try:
        whole = content.get("model_cfg", content)
        vision, text = _OPEN_CLIP_VISION | whole["vision_cfg"], _OPEN_CLIP_TEXT | whole["text_cfg"]
        known = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "preprocess_cfg"}
        for section, names in (
            (whole, known),
            (vision, _OPEN_CLIP_VISION),
            (text, _OPEN_CLIP_TEXT),
        ):
            for name, value in section.items():
                if (
                    value
                    and name not in {*names, *_OPEN_CLIP_INERT}
                    and value not in _OPEN_CLIP_USUAL.get(name, ())
                ):
                    raise InputError(
                        f"{path}: models with {name} {value!r} are not supported: choose another"
                    )
        if text.get("hf_tokenizer_name") and not (path.parent / "tokenizer.json").exists():
            raise InputError(
                f"{path}: the tokenizer {text['hf_tokenizer_name']} is not there: put its tokenizer.json beside"
            )
        vision["heads"] = positive(path, vision, "width") // positive(path, vision, "head_width")
        for section in (vision, text):
            section["mlp_width"] = int(positive(path, section, "width") * section["mlp_ratio"])
        vocabulary_size = positive(path, text, "vocab_size")
        return clip.Config(
            image_size=positive(path, vision, "image_size"),
            patch_size=positive(path, vision, "patch_size"),
            vision=tower(path, vision, _OPEN_CLIP_TOWER),
            text=tower(path, text, _OPEN_CLIP_TOWER),
            embedding_size=positive(path, whole, "embed_dim"),
            context_length=positive(path, text, "context_length"),
            vocabulary_size=vocabulary_size,
            start_token=vocabulary_size - 2,
            end_token=vocabulary_size - 1,
            activation="quick_gelu" if whole.get("quick_gelu") else "gelu",
        )
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} is not the configuration of an open_clip model ({error!r}): restore it"
        ) from error


# Where each format keeps the statistics of the images, with the names of mean and deviation.
_STATISTICS = {
    "preprocessor_config.json": ((), "image_mean", "image_std"),
    "processor_config.json": (("image_processor",), "image_mean", "image_std"),
    "open_clip_config.json": (("preprocess_cfg",), "mean", "std"),
}


def with_image_statistics(config: clip.Config, folder: Path) -> clip.Config:
    """The configuration with the mean and deviation that a folder's files specify, if they do.

    Raises InputError if they are not three numbers each, or if the processor does not standardise images.
    """
    for name, (sections, *keys) in _STATISTICS.items():
        path = folder / name
        content = read_json(path) if path.exists() else {}
        for section in sections:
            content = content.get(section) if isinstance(content, dict) else None
        if not isinstance(content, dict) or not any(key in content for key in keys):
            continue
        values = [content.get(key) or [] for key in keys]
        numbers = [
            isinstance(each, list) and len(each) == 3 and all(type(x) in (int, float) for x in each)
            for each in values
        ]
        if not all(numbers) or min(values[1]) <= 0 or not np.all(np.isfinite(values)):
            raise InputError(
                f"{path}: {' and '.join(keys)} are {values}, not three numbers each: restore the file"
            )
        if content.get("do_normalize") is False or content.get("do_rescale") is False:
            raise InputError(
                f"{path}: its model takes images that are not standardised, which is not supported: choose another"
            )
        return dataclasses.replace(
            config, image_mean=tuple(values[0]), image_deviation=tuple(values[1])
        )
    return config


def read_weights(folder: Path, single: str, archive: str) -> dict[str, np.ndarray]:
    """Reads a folder's safetensors file `single`, the shards that its index names, or the PyTorch file `archive`."""
    index = folder / f"{single}.index.json"
    if (folder / single).exists() or not (index.exists() or (folder / archive).exists()):
        return read_safetensors(folder / single)
    if not index.exists():
        return read_torch_archive(folder / archive)
    try:
        shards = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} does not name the shards ({error!r}): restore the file"
        ) from error
    return {name: array for shard in shards for name, array in read_safetensors(shard).items()}


# An entry of every vision tower, by which a state dict is found among the other content of a checkpoint.
_LANDMARKS = {
    "hugging_face": "vision_model.embeddings.class_embedding",
    "openai": "visual.class_embedding",
}


def unwrapped(state: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], str]:
    """The state dict in a checkpoint, without what its training put in front of the names, and the style of its names.

    Raises InputError if the checkpoint contains several models.
    """
    found = [
        (name.removesuffix(landmark), style)
        for style, landmark in _LANDMARKS.items()
        for name in state
        if name == landmark or name.endswith(f".{landmark}")
    ]
    if len(found) > 1:
        places = ", ".join(sorted(prefix or "its top" for prefix, _ in found))
        raise InputError(
            f"weights {source} hold {len(found)} models, at {places}: save the one to use alone"
        )
    prefix, style = found[0] if found else ("", "openai")
    inner = {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
    # Some models of open_clip keep their text tower apart.
    if style == "openai" and "text.token_embedding.weight" in inner:
        inner = {name.removeprefix("text."): array for name, array in inner.items()}
    if found and not any(name.startswith(("text_model.", "token_embedding.")) for name in inner):
        raise InputError(f"weights {source} have no text tower: give a CLIP with both")
    return inner, style


def hugging_face_json(config: clip.Config) -> dict[str, Any]:
    """The content of a `config.json`, which `hugging_face_config` reads."""

    def tower(kind: str, sizes: clip.Transformer) -> dict[str, Any]:
        return {
            "model_type": f"clip_{kind}_model",
            **dict(zip(_TOWER_KEYS, vars(sizes).values(), strict=True)),
            "hidden_act": config.activation,
            "layer_norm_eps": config.layer_norm_epsilon,
            "projection_dim": config.embedding_size,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embedding_size,
        "vision_config": tower("vision", config.vision)
        | {"image_size": config.image_size, "patch_size": config.patch_size, "num_channels": 3},
        "text_config": tower("text", config.text)
        | {
            "max_position_embeddings": config.context_length,
            "vocab_size": config.vocabulary_size,
            "bos_token_id": config.start_token,
            "eos_token_id": config.end_token,
            "pad_token_id": 0,
        },
    }


def save(folder: Path, model: clip.CLIP, tokenizer: Tokenizer, dtype: Any = np.float32) -> None:
    """Writes a folder that `load` and PyTorch `transformers` (`CLIPModel`, `CLIPProcessor`) can open."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes an array's buffer as it is, so a transposed array must be made contiguous first.
    state = clip.to_state_dict(model, "hugging_face")
    arrays = {name: np.asarray(leaf, dtype, order="C") for name, leaf in state.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})

    files = {
        "config.json": hugging_face_json(config),
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": config.image_size},
            "resample": 3,
            "crop_size": {"height": config.image_size, "width": config.image_size},
            **dict.fromkeys(
                ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"),
                True,
            ),
            "image_mean": config.image_mean,
            "image_std": config.image_deviation,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config.context_length,
            "bos_token": clip.START_TEXT,
            **dict.fromkeys(("eos_token", "pad_token", "unk_token"), clip.END_TEXT),
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def byte_symbols() -> list[str]:
    """Returns the 256 printable symbols that stand for bytes, in the vocabulary's order (as in GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [
        chr(256 + index) for index in range(256 - len(printable))
    ]


def openai_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of OpenAI's vocabulary file, which has one header line, then 48,894 merges.

    Raises InputError if the file is missing or is not such a file.
    """
    count = 49152 - 256 - 2
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            pairs = [line.split() for line in file.read().split("\n")[1 : 1 + count]]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(
            f"vocabulary {path} cannot be read ({error}): put OpenAI's {VOCABULARY_FILE} there"
        ) from error
    symbols = byte_symbols()
    words = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *map("".join, pairs),
        clip.START_TEXT,
        clip.END_TEXT,
    ]
    vocabulary = {word: index for index, word in enumerate(words)}
    known = all(len(pair) == 2 and vocabulary.keys() >= set(pair) for pair in pairs)
    if len(vocabulary) < 256 + 256 + count + 2 or not known:
        raise InputError(
            f"vocabulary {path} does not contain {count} merges: put OpenAI's {VOCABULARY_FILE} there"
        )
    return clip.bpe_tokenizer(vocabulary, [(first, second) for first, second in pairs])


def hugging_face_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer in `tokenizer.json`, else in `vocab.json` and `merges.txt`, or raises InputError."""
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            path = folder / "merges.txt"
            merges = [
                (first, second)
                for first, second in (line.split() for line in read_lines(path)[1:] if line)
            ]
            path = folder / "vocab.json"
            vocabulary = read_json(path)
            if not isinstance(vocabulary, dict) or not all(
                type(index) is int for index in vocabulary.values()
            ):
                raise ValueError("it does not map tokens to whole numbers")
            tokenizer = clip.bpe_tokenizer(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"tokenizer {path} cannot be read ({error!s:.200}): copy the model's own there"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def with_special_tokens(config: clip.Config, tokenizer: Tokenizer, source: str) -> clip.Config:
    """The configuration with the tokenizer's start token. Raises InputError if their end tokens differ."""
    try:
        special = tokenizer.encode("").ids
    except BaseException as error:  # the library panics at a damaged post-processor
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"the tokenizer of {source} cannot encode ({error!s:.200}): copy the model's own there"
        ) from error
    if len(special) != 2:
        return config
    if special[1] != config.end_token:
        raise InputError(
            f"the tokenizer of {source} ends texts with token {special[1]}, its configuration says {config.end_token}: "
            "restore the model's own files"
        )
    return dataclasses.replace(config, start_token=special[0])


def from_folder(path: Path) -> tuple[dict[str, np.ndarray], str, clip.Config]:
    """State dict, style of its names, and configuration of a folder in the format of Hugging Face or of open_clip."""
    if (path / "config.json").exists() or not (path / "open_clip_config.json").exists():
        config = hugging_face_config(path / "config.json")
        state = read_weights(path, "model.safetensors", "pytorch_model.bin")
    else:
        config = open_clip_config(path / "open_clip_config.json")
        state = read_weights(path, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return *unwrapped(state, str(path)), config


def from_file(path: Path) -> tuple[dict[str, np.ndarray], str, clip.Config]:
    """State dict, style of its names, and configuration of a `.pt`, `.bin` or `.safetensors` file.

    The configuration beside the file specifies activation and heads. Without one they are OpenAI's, with a warning if
    the file is not OpenAI's.
    """
    state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_archive(path)
    state, style = unwrapped(state, str(path))
    if style == "hugging_face":
        return state, style, hugging_face_config(path.parent / "config.json")
    beside = path.parent / "open_clip_config.json"
    if beside.exists():
        return state, style, open_clip_config(beside)
    config = openai_config(state, str(path))
    if "input_resolution" not in state:  # which OpenAI's own files have
        heads = f"{config.vision.heads} and {config.text.heads} heads"
        errors.warn(
            f"{path} does not specify activation and heads, taken: quick_gelu (not gelu), {heads} of width 64"
        )
    return state, style, config


def load(name: str) -> tuple[clip.CLIP, Tokenizer]:
    """Returns model and tokenizer of a preset, a folder or a file, else of a repository on the Hugging Face hub.

    Raises InputError if a file is missing or damaged, or if the files do not belong together.
    """
    path = TINY if name == "tiny" else Path(name)
    if name in hub.OPENAI:
        path = hub.from_hub(hub.OPENAI[name])
    elif (
        not path.exists()
        and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
        and path.suffix not in WEIGHT_SUFFIXES
    ):
        path = hub.from_hub(name)
    elif not path.exists() and not {"/", os.sep, "."} & set(name):
        raise unknown("model preset", name, ["tiny", *hub.OPENAI])
    state, style, config = from_folder(path) if path.is_dir() else from_file(path)
    folder = path if path.is_dir() else path.parent
    config = with_image_statistics(config, folder)
    if (
        style == "hugging_face"
        or (folder / "tokenizer.json").exists()
        or (folder / "merges.txt").exists()
    ):
        tokenizer = hugging_face_tokenizer(folder)
    elif (folder / VOCABULARY_FILE).exists():
        tokenizer = openai_tokenizer(folder / VOCABULARY_FILE)
    else:
        tokenizer = hugging_face_tokenizer(hub.from_hub(hub.OPENAI["ViT-B/32"], hub.TOKENIZER))
    if tokenizer.get_vocab_size() > config.vocabulary_size:
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.get_vocab_size()} tokens, the text tower embeds only "
            f"{config.vocabulary_size}: put the model's own tokenizer files beside it"
        )
    config = with_special_tokens(config, tokenizer, str(path))
    return clip.from_state_dict(state, config, style, str(path)), tokenizer
