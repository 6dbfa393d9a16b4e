"""Reads models as OpenAI, Hugging Face and open_clip publish them, and writes Hugging Face folders.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model
NAME_FILE_OR_FOLDER` uses it. `clip.NAMES` maps the entries of the formats to a `clip.CLIP`;
open_clip's entries have OpenAI's names. The sizes come from the configuration beside the weights.
What no file specifies is assumed, and the command says so.
"""

import dataclasses
import gzip
import json
import math
import operator
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, pre_tokenizers

import clip
from support.errors import InputError, few, read_json, read_lines, unknown, warn
from support.weights import hub
from support.weights.archives import read_weights, refuse_damaged

TINY = Path(__file__).parents[2] / "assets" / "tiny-clip"
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
OPEN_CLIP = "open_clip_config.json"
VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"  # beside OpenAI's files

Arrays = dict[str, np.ndarray]  # a state dict: weights by name, in PyTorch's layout

# ---------------------------------------------------------------------------------- configurations

# The fields of clip.Config, and the section and key of a config.json that specify each.
_HUGGING_FACE = [
    ("embedding_size", "", "projection_dim"),
    ("image_size", "vision_config", "image_size"),
    ("patch_size", "vision_config", "patch_size"),
    ("context_length", "text_config", "max_position_embeddings"),
    ("vocabulary_size", "text_config", "vocab_size"),
    ("start_token", "text_config", "bos_token_id"),
    ("end_token", "text_config", "eos_token_id"),
    *[
        (field.format(tower), f"{tower}_config", key)
        for tower in ("vision", "text")
        for field, key in [
            ("{}.width", "hidden_size"),
            ("{}.layers", "num_hidden_layers"),
            ("{}.heads", "num_attention_heads"),
            ("{}.mlp_width", "intermediate_size"),
            ("activation", "hidden_act"),
            ("layer_norm_epsilon", "layer_norm_eps"),
        ]
    ],
]
# What the value of a field is, and the test for it. All other fields are sizes.
_SIZE = ("a positive whole number", lambda value: type(value) is int and value > 0)
_TOKEN = ("the id of a token", lambda value: type(value) is int and value >= 0)
_KINDS = {
    "start_token": _TOKEN,
    "end_token": _TOKEN,
    "activation": (" or ".join(clip.ACTIVATIONS), lambda value: value in [*clip.ACTIVATIONS]),
    "layer_norm_epsilon": ("a fraction", lambda value: type(value) is float),
}


def unsupported(
    items: Iterable[tuple[str, Any]], read: Container[str], allowed: Mapping[str, Sequence]
) -> list[str]:
    """Returns a problem per key that is not read, and has no allowed value, nor is off."""
    off = (False, "", [], {})
    return [
        f"{key} {value!r} is not supported"
        for key, value in items
        if key not in read and value is not None and value not in allowed.get(key, off)
    ]


def make_config(values: dict[str, Any], source: str, problems: list[str]) -> clip.Config:
    """Returns the configuration with the given values of fields, such as `vision.width`.

    Raises InputError with `problems`, else with all values of the wrong kind, else with those that
    do not fit each other.
    """
    if not problems:
        for field, value in values.items():
            kind, is_right = _KINDS.get(field, _SIZE)
            if not is_right(value):
                problems.append(f"{field} is {value!r}, not {kind}")
    if not problems:
        for tower in ("vision", "text"):
            width, heads = values[f"{tower}.width"], values[f"{tower}.heads"]
            if width % heads:
                problems.append(f"{tower}.width is {width}, no multiple of its {heads} heads")
        tokens = {field: values[field] for field in ("start_token", "end_token")}
        if max(tokens.values()) >= values["vocabulary_size"]:
            problems.append(f"{tokens} are not in the vocabulary")
    if problems:
        raise InputError(
            f"{source}: no CLIP with an image and a text transformer ({few(problems, '; ', 6)}): "
            "restore it, or choose another model"
        )
    sizes = [field.name for field in dataclasses.fields(clip.Transformer)]
    values["preparation"] = clip.Preparation(values.pop("image_size"))
    for tower in ("vision", "text"):
        values[tower] = clip.Transformer(*(values.pop(f"{tower}.{size}") for size in sizes))
    return clip.Config(**values)


def hugging_face_json(config: clip.Config) -> dict[str, Any]:
    """Returns the content of a `config.json`, which `hugging_face_config` reads."""
    shared = {"projection_dim": config.embedding_size}
    content: dict[str, Any] = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "vision_config": {"model_type": "clip_vision_model", "num_channels": 3, **shared},
        "text_config": {"model_type": "clip_text_model", "pad_token_id": 0, **shared},
    }
    for field, section, key in _HUGGING_FACE:
        part = content[section] if section else content
        part[key] = operator.attrgetter(field)(config)
    return content


def hugging_face_config(path: Path) -> clip.Config:
    """Returns the configuration in a Hugging Face `config.json`.

    Keys that it lacks have the defaults of `transformers`, which are ViT-B/32's. Raises InputError
    if a key has a wrong value, or if the model is not a CLIP.
    """
    defaults = hugging_face_json(clip.PRESETS["ViT-B/32"])
    with refuse_damaged(str(path), "restore it"):
        content = read_json(path)
        sections = {"": defaults | content}
        for name in ("vision_config", "text_config"):
            sections[name] = defaults[name] | (content.get(name) or {})
            if old := content.get(f"{name}_dict"):  # in files of 2022, it prevails
                sections[name] |= defaults[name] | old
        kind = sections[""]["model_type"]
        problems = [] if kind == "clip" else [f"it describes a {kind}"]
        values: dict[str, Any] = {}
        for field, section, key in _HUGGING_FACE:
            value = sections[section][key]
            if values.setdefault(field, value) != value:
                problems.append(f"the towers have {key} {values[field]!r} and {value!r}")
        if values["end_token"] == 2:  # so the first published files, which mean the highest id
            values["start_token"] = values["vocabulary_size"] - 2
            values["end_token"] = values["vocabulary_size"] - 1
        return make_config(values, str(path), problems)


_OPEN_CLIP_TOWER = {"layers": 12, "mlp_ratio": 4}  # open_clip's defaults for both, and for each
_OPEN_CLIP_VISION = {"image_size": 224, "patch_size": 16, "width": 768, "head_width": 64}
_OPEN_CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8}
# Keys that are read here or change nothing, and keys of which some values are implemented.
_OPEN_CLIP_KEYS = {*_OPEN_CLIP_TOWER, *_OPEN_CLIP_VISION, *_OPEN_CLIP_TEXT, "embed_dim"}
_OPEN_CLIP_KEYS |= {"quick_gelu", "vision_cfg", "text_cfg", "preprocess_cfg", "custom_text"}
_OPEN_CLIP_KEYS |= {"hf_tokenizer_name", "tokenizer_kwargs", "init_logit_scale", "patch_dropout"}
_OPEN_CLIP_KEYS |= {"output_tokens"}
_OPEN_CLIP_VALUES = {
    "pool_type": ["tok", "argmax"],
    "pos_embed_type": ["learnable"],
    "proj_type": ["linear"],
}


def open_clip_config(path: Path) -> clip.Config:
    """Returns the configuration in an `open_clip_config.json`.

    Raises InputError if a key has a wrong value, or one that `clip.CLIP` does not implement.
    """
    with refuse_damaged(str(path), "restore it"):
        content = read_json(path)
        whole = content.get("model_cfg", content)
        vision = _OPEN_CLIP_TOWER | _OPEN_CLIP_VISION | whole["vision_cfg"]
        text = _OPEN_CLIP_TOWER | _OPEN_CLIP_TEXT | whole["text_cfg"]
        items = [*whole.items(), *vision.items(), *text.items()]
        problems = unsupported(items, _OPEN_CLIP_KEYS, _OPEN_CLIP_VALUES)
        tokenizer = text.get("hf_tokenizer_name")
        if tokenizer and not (path.parent / "tokenizer.json").exists():
            problems.append(f"the tokenizer.json of {tokenizer} is not beside it")
        values = {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "vision.heads": vision["width"] // vision["head_width"],
            "text.heads": text["heads"],
            "embedding_size": whole["embed_dim"],
            "context_length": text["context_length"],
            "vocabulary_size": text["vocab_size"],
            "start_token": text["vocab_size"] - 2,
            "end_token": text["vocab_size"] - 1,
            "activation": "quick_gelu" if whole.get("quick_gelu") else "gelu",
        }
        for tower, section in (("vision", vision), ("text", text)):
            values[f"{tower}.width"] = section["width"]
            values[f"{tower}.layers"] = section["layers"]
            values[f"{tower}.mlp_width"] = int(section["width"] * section["mlp_ratio"])
        return make_config(values, str(path), problems)


# The fields of clip.Config, and the entries of OpenAI's files and the axes that specify them.
_OPENAI = [
    ("patch_size", "visual.conv1.weight", 3),
    ("image_size", "visual.positional_embedding", 0),  # 1 + (image_size / patch_size)^2
    ("vision.width", "visual.transformer.resblocks.0.mlp.c_fc.weight", 1),
    ("vision.mlp_width", "visual.transformer.resblocks.0.mlp.c_fc.bias", 0),
    ("text.width", "transformer.resblocks.0.mlp.c_fc.weight", 1),
    ("text.mlp_width", "transformer.resblocks.0.mlp.c_fc.bias", 0),
    ("embedding_size", "text_projection", 1),
    ("context_length", "positional_embedding", 0),
    ("vocabulary_size", "token_embedding.weight", 0),
]


def openai_config(state: Mapping[str, np.ndarray], source: str) -> clip.Config:
    """Returns the configuration that the shapes of OpenAI's entries imply.

    Heads are those of published models. Raises InputError if such an entry is missing or empty, or
    lacks the axis.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for field, entry, axis in _OPENAI:
        shape = state[entry].shape if entry in state else ()
        values[field] = shape[axis] if len(shape) > axis else 0
        if values[field] == 0:
            problems.append(f"{entry} has shape {shape}" if shape else f"lacks {entry}")
    patches = max(values["image_size"] - 1, 0)
    values["image_size"] = math.isqrt(patches) * values["patch_size"]
    values["start_token"] = values["vocabulary_size"] - 2
    values["end_token"] = values["vocabulary_size"] - 1
    for tower, prefix in (("vision", "visual.transformer."), ("text", "transformer.")):
        blocks = [name for name in state if name.startswith(f"{prefix}resblocks.")]
        numbers = {name.removeprefix(f"{prefix}resblocks.").partition(".")[0] for name in blocks}
        values[f"{tower}.layers"] = len(numbers)
        values[f"{tower}.heads"], remainder = divmod(values[f"{tower}.width"], 64)
        if remainder:
            problems.append(f"{tower}.width is no multiple of 64, and no config.json says heads")
    if values["vision.width"] in (1280, 1408, 1664, 1792):  # open_clip's ViT-H, g, bigG and e
        values["vision.heads"] = 16
    return make_config(values, f"weights {source}", problems)


# How images are prepared: keys that are read or change nothing, and those of which some values are
# implemented.
_PROCESSORS = ["CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast"]
_PROCESSOR = (
    {"size", "crop_size", "do_center_crop", "image_mean", "image_std", "do_convert_rgb"}
    | {"processor_class", "data_format", "_valid_processor_keys"},
    {"do_resize": [True], "do_rescale": [True], "do_normalize": [True], "resample": [2, 3]}
    | {"feature_extractor_type": _PROCESSORS, "image_processor_type": _PROCESSORS}
    | {"rescale_factor": [1 / 255]},
)
_PREPROCESS = (
    {"size", "mean", "std", "fill_color"},
    {"mode": ["RGB"], "resize_mode": ["shortest", "squash"]}
    | {"interpolation": ["bilinear", "bicubic"]},
)


def _side(value: Any) -> int:
    """Returns the side of a square, which a number or both sides specify, and otherwise 0."""
    if isinstance(value, dict) and value.keys() in ({"height", "width"}, {"shortest_edge"}):
        value = [*value.values()]
    if isinstance(value, list) and len(value) in (1, 2) and value[0] == value[-1]:
        value = value[0]
    return value if type(value) is int else 0


def _three(value: Any) -> tuple[float, ...]:
    """Returns three numbers, or three times the one given, and nothing for other values."""
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    is_right = all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    return tuple(map(float, numbers)) if is_right and len(numbers) == 3 else ()


def read_preparation(path: Path, section: Mapping[str, Any], size: int) -> clip.Preparation:
    """Returns the preparation in a section of a file, of a model for images of `size` pixels.

    What it lacks is OpenAI's. Raises InputError, which names the keys whose values are not
    implemented.
    """
    part = {key: value for key, value in section.items() if value is not None}
    is_open_clip = path.name == OPEN_CLIP
    mean, deviation = ("mean", "std") if is_open_clip else ("image_mean", "image_std")
    edge = part.get("size", size)
    crops = not is_open_clip and part.get("do_center_crop", True) is True
    squash = part.get("resize_mode") == "squash"
    if not is_open_clip:
        squash = isinstance(edge, dict | list) and "shortest_edge" not in edge
    found = clip.Preparation(
        size,
        _side(edge) - size,
        squash,
        2 if part.get("resample", part.get("interpolation")) in (2, "bilinear") else 3,
        _three(part.get(mean, clip.Preparation.mean)),
        _three(part.get(deviation, clip.Preparation.deviation)),
    )
    is_wrong = {
        "size": found.margin < 0 or (found.margin > 0 and not crops),
        "crop_size": crops and _side(part.get("crop_size", size)) != size,
        "do_center_crop": not (crops or squash or is_open_clip),  # images would not be square
        mean: not found.mean,
        deviation: min(found.deviation, default=0) <= 0,
    }
    problems = unsupported(part.items(), *(_PREPROCESS if is_open_clip else _PROCESSOR))
    problems += [f"{key} {part[key]!r} is not supported" for key in is_wrong if is_wrong[key]]
    if problems:
        raise InputError(
            f"{path}: images of {size} pixels are not prepared here as it says "
            f"({few(problems, '; ', 6)}): restore it, or choose another model"
        )
    return found


def find_preparation(folder: Path, size: int, is_open_clip: bool) -> clip.Preparation | None:
    """Returns what the files of a folder specify, if anything, the model's own format first.

    Raises like `read_preparation`.
    """
    sections = {"processor_config.json": "image_processor", "preprocessor_config.json": ""}
    own = {OPEN_CLIP: "preprocess_cfg"}
    for name, section in ((own | sections) if is_open_clip else (sections | own)).items():
        path = folder / name
        if path.exists():
            with refuse_damaged(str(path), "restore it"):
                content = read_json(path)
                if part := content.get(section) if section else content:
                    return read_preparation(path, part, size)
    return None


# -------------------------------------------------------------------------------------- tokenizers

# The 256 printable symbols that stand for bytes, in the vocabulary's order (as in GPT-2).
BYTE_SYMBOLS = sorted(pre_tokenizers.ByteLevel.alphabet())
_OPENAI_TOKENS = 49408


def openai_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of OpenAI's vocabulary file: one header line, then 48,894 merges.

    Raises InputError if the file is missing or is not such a file.
    """
    count = _OPENAI_TOKENS - 2 * len(BYTE_SYMBOLS) - 2
    with refuse_damaged(f"vocabulary {path}", f"put OpenAI's {VOCABULARY_FILE} there"):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 1 + count]
        merges = [(first, second) for first, second in map(str.split, lines)]
        words = [*BYTE_SYMBOLS, *(f"{symbol}</w>" for symbol in BYTE_SYMBOLS)]
        words += [*map("".join, merges), clip.START_TEXT, clip.END_TEXT]
        vocabulary = {word: index for index, word in enumerate(words)}
        if len(vocabulary) != _OPENAI_TOKENS:
            raise ValueError(f"it does not contain {count} merges")
        return clip.bpe_tokenizer(vocabulary, merges)


def hugging_face_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer in `tokenizer.json`, else in `vocab.json` and `merges.txt`.

    Raises InputError if it cannot be read, or cannot encode.
    """
    advice = "copy the model's own there"
    with refuse_damaged(f"tokenizer {folder}", advice):
        if (folder / "tokenizer.json").exists():
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        else:
            path = folder / "merges.txt"
            lines = [line.split() for line in read_lines(path, f"tokenizer {path}", advice)[1:]]
            merges = [(first, second) for first, second in filter(None, lines)]
            tokenizer = clip.bpe_tokenizer(read_json(folder / "vocab.json"), merges)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("")  # where the library panics at a damaged post-processor
        return tokenizer


# ------------------------------------------------------------------------------------------ models


def unwrap(state: Arrays, source: str) -> tuple[Arrays, str]:
    """Returns the state dict in a checkpoint, without prefixes of its names, and their style.

    Raises InputError if the checkpoint contains several models.
    """
    landmarks = {  # an entry of every vision tower
        "hugging_face": "vision_model.embeddings.class_embedding",
        "openai": "visual.class_embedding",
    }
    found = [
        (name.removesuffix(landmark), style)
        for style, landmark in landmarks.items()
        for name in state
        if f".{name}".endswith(f".{landmark}")
    ]
    if len(found) > 1:
        places = ", ".join(sorted(prefix or "its top" for prefix, _ in found))
        raise InputError(
            f"weights {source} hold {len(found)} models, at {places}: save the one to use alone"
        )
    prefix, style = found[0] if found else ("", "openai")
    state = {
        name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)
    }
    if style == "openai" and "text.token_embedding.weight" in state:  # as in some of open_clip's
        state = {name.removeprefix("text."): array for name, array in state.items()}
    return state, style


def read_model(path: Path) -> tuple[Arrays, str, clip.Config]:
    """Returns the state dict of a file or folder, the style of its names, and the configuration.

    A file's configuration is beside it. What nothing specifies is as OpenAI has it, with a warning
    unless the file is OpenAI's. Raises InputError if something is missing or damaged.
    """
    read_config = {"config.json": hugging_face_config, OPEN_CLIP: open_clip_config}
    folder = path if path.is_dir() else path.parent
    assumed = []
    if path.is_dir():
        files = hub.choose({file.name for file in path.iterdir()})
        if not files:
            formats = ", nor ".join(" with ".join(files) for files in hub.MODEL)
            raise InputError(f"{path} has neither {formats}: put the missing files there")
        name = files[0]
        config = read_config[name](path / name)
        state, style = unwrap(read_weights(path / files[1]), str(path))
    else:
        state, style = unwrap(read_weights(path), str(path))
        name = "config.json" if style == "hugging_face" else OPEN_CLIP
        if style == "hugging_face" or (folder / name).exists():
            config = read_config[name](folder / name)
        else:
            config = openai_config(state, str(path))
            heads = f"{config.vision.heads} and {config.text.heads} heads"
            assumed.append(f"activation and heads (taken: quick_gelu, not gelu; {heads})")
    preparation = find_preparation(folder, config.image_size, name == OPEN_CLIP)
    if preparation:
        config = dataclasses.replace(config, preparation=preparation)
    else:
        assumed.append("how images are prepared (taken: OpenAI's mean, deviation, crop and filter)")
    if assumed and "input_resolution" not in state:  # which OpenAI's own files have
        warn(f"{path} does not specify {', nor '.join(assumed)}")
    return state, style, config


def load(name: str) -> tuple[clip.CLIP, Tokenizer]:
    """Returns model and tokenizer of a preset, a folder, a file, or a repository on the hub.

    Raises InputError if a file is missing or damaged, or if the files do not belong together.
    """
    path = TINY if name == "tiny" else Path(name)
    is_repository = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not path.exists()
    if name in hub.OPENAI or (is_repository and path.suffix not in WEIGHT_SUFFIXES):
        path = hub.download(hub.OPENAI.get(name, name))
    elif not path.exists() and not {"/", "."} & {*name}:
        raise unknown("model preset", name, ["tiny", *hub.OPENAI])
    state, style, config = read_model(path)
    folder = path if path.is_dir() else path.parent
    present = {file.name for file in folder.iterdir()}
    if style == "hugging_face" or hub.choose(present, hub.TOKENIZER):
        tokenizer = hugging_face_tokenizer(folder)
    elif VOCABULARY_FILE in present:
        tokenizer = openai_tokenizer(folder / VOCABULARY_FILE)
    else:
        tokenizer = hugging_face_tokenizer(hub.download(hub.OPENAI["ViT-B/32"], hub.TOKENIZER))
    size, special = tokenizer.get_vocab_size(), tokenizer.encode("").ids
    problems = []
    if size > config.vocabulary_size:
        problems.append(f"has {size} tokens, of {config.vocabulary_size} that the model embeds")
    if len(special) == 2 and special[1] != config.end_token:
        problems.append(f"ends texts with token {special[1]}, the model with {config.end_token}")
    if problems:
        raise InputError(
            f"the tokenizer of {path} {' and '.join(problems)}: put the model's own files beside it"
        )
    if len(special) == 2:
        config = dataclasses.replace(config, start_token=special[0])
    return clip.from_state_dict(state, config, style, str(path)), tokenizer


def save(folder: Path, model: clip.CLIP, tokenizer: Tokenizer, dtype: Any = np.float32) -> None:
    """Writes a folder that `load` and `transformers` (`CLIPModel`, `CLIPProcessor`) can open."""
    config = model.config
    images = config.preparation
    edges = ("height", "width") if images.squash else ("shortest_edge",)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes an array's buffer as it is: a transposed array must be contiguous first.
    state = clip.to_state_dict(model, "hugging_face")
    arrays = {name: np.asarray(leaf, dtype, order="C") for name, leaf in state.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    steps = ("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize")
    files = {
        "config.json": hugging_face_json(config),
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": dict.fromkeys(edges, images.size + images.margin),
            "resample": images.resample,
            "crop_size": {"height": images.size, "width": images.size},
            **dict.fromkeys(steps, True),
            "image_mean": images.mean,
            "image_std": images.deviation,
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
