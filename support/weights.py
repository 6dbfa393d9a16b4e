"""Reads models from OpenAI's archives and Hugging Face folders, and writes Hugging Face folders.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model FILE_OR_FOLDER` uses it.
`clip.NAMES` maps the entries of both formats to a `clip.CLIP`.
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

import clip
from support import download
from support.archives import read_safetensors, read_torch_archive
from support.download import VOCABULARY_FILE
from support.errors import InputError, read_json, read_lines, unknown
from support.files import cache_folder

TINY = Path(__file__).parents[1] / "assets" / "tiny-clip"
_TOWER_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")  # as in clip.Transformer


def openai_config(state: Mapping[str, np.ndarray], source: str) -> clip.Config:
    """Returns the sizes that the shapes of OpenAI's entries imply. OpenAI's attention heads have width 64.

    Raises InputError if an entry that implies a size is missing or empty, or has the wrong number of axes.
    """
    tables = ["visual.positional_embedding", "token_embedding.weight", "positional_embedding", "text_projection"]
    first_layers = ["visual.transformer.resblocks.0.mlp.c_fc.weight", "transformer.resblocks.0.mlp.c_fc.weight"]
    ranks = {"visual.conv1.weight": 4} | dict.fromkeys(tables + first_layers, 2)
    wrong = [f"lacks {name}" for name in ranks if name not in state]
    shapes = {name: state[name].shape for name in ranks if name in state}
    wrong += [f"{name} has shape {shape}" for name, shape in shapes.items() if len(shape) != ranks[name] or 0 in shape]
    if wrong:
        raise InputError(f"weights {source} are not a CLIP with a vision transformer, give one: {'; '.join(wrong)}")

    def tower(prefix: str) -> clip.Transformer:
        mlp_width, width = shapes[f"{prefix}resblocks.0.mlp.c_fc.weight"]
        if width % 64:
            raise InputError(
                f"weights {source}: width {width} is no multiple of 64, the width of OpenAI's attention heads: give "
                "the model as a Hugging Face folder, whose config.json specifies the heads"
            )
        layers = {name.split(".")[prefix.count(".") + 1] for name in state if name.startswith(f"{prefix}resblocks.")}
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


def hugging_face_config(path: Path) -> clip.Config:
    """Returns the sizes in a Hugging Face `config.json`. Raises InputError if a key is missing or has a wrong value."""
    content = read_json(path)

    def size(section: Mapping[str, Any], key: str) -> int:
        if type(section[key]) is not int or section[key] < 1:
            raise InputError(f"{path}: {key} is {section[key]!r}, not a positive whole number: restore the file")
        return section[key]

    def tower(section: Mapping[str, Any]) -> clip.Transformer:
        width, layers, heads, mlp_width = (size(section, key) for key in _TOWER_KEYS)
        if width % heads:
            raise InputError(f"{path}: hidden_size {width} is no multiple of its {heads} heads: restore the file")
        return clip.Transformer(width, layers, heads, mlp_width)

    try:
        vision, text = content["vision_config"], content["text_config"]
        pairs = [(part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", 1e-5)) for part in (vision, text)]
        activation, epsilon = pairs[0]
        if pairs[0] != pairs[1] or activation not in clip.ACTIVATIONS or type(epsilon) is not float:
            raise InputError(
                f"{path}: both towers must have one layer_norm_eps and one hidden_act, of "
                f"{', '.join(clip.ACTIVATIONS)}: choose another model"
            )
        vocabulary_size = size(text, "vocab_size")
        tokens = text.get("bos_token_id", 49406), text.get("eos_token_id", 49407)
        if tokens[1] == 2:  # the first published configurations say 2 and mean the highest id
            tokens = vocabulary_size - 2, vocabulary_size - 1
        if not all(type(token) is int and 0 <= token < vocabulary_size for token in tokens):
            raise InputError(f"{path}: bos_token_id, eos_token_id {tokens} are not in the vocabulary: restore the file")
        return clip.Config(
            image_size=size(vision, "image_size"),
            patch_size=size(vision, "patch_size"),
            vision=tower(vision),
            text=tower(text),
            embedding_size=size(content, "projection_dim"),
            context_length=size(text, "max_position_embeddings"),
            vocabulary_size=vocabulary_size,
            start_token=tokens[0],
            end_token=tokens[1],
            activation=activation,
            layer_norm_epsilon=epsilon,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not the configuration of a CLIP ({error!r}): restore the file") from error


def read_hugging_face_weights(folder: Path) -> dict[str, np.ndarray]:
    """Reads `model.safetensors` or, if it is missing, the shards that `model.safetensors.index.json` names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_safetensors(single)
    try:
        shards = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} does not name the shards ({error!r}): restore the file") from error
    return {name: array for shard in shards for name, array in read_safetensors(shard).items()}


def save(folder: Path, model: clip.CLIP, tokenizer: Tokenizer, dtype: Any = np.float32) -> None:
    """Writes a folder that `load` and PyTorch `transformers` (`CLIPModel`, `CLIPProcessor`) can open."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes an array's buffer as it is, so a transposed array must be made contiguous first.
    state = clip.to_state_dict(model, "hugging_face")
    arrays = {name: np.asarray(leaf, dtype, order="C") for name, leaf in state.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})

    def tower(kind: str, sizes: clip.Transformer) -> dict[str, Any]:
        return {
            "model_type": f"clip_{kind}_model",
            **dict(zip(_TOWER_KEYS, vars(sizes).values(), strict=True)),
            "hidden_act": config.activation,
            "layer_norm_eps": config.layer_norm_epsilon,
            "projection_dim": config.embedding_size,
        }

    files = {
        "config.json": {
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
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": config.image_size},
            "resample": 3,
            "crop_size": {"height": config.image_size, "width": config.image_size},
            **dict.fromkeys(("do_resize", "do_center_crop", "do_convert_rgb", "do_rescale", "do_normalize"), True),
            "image_mean": clip.IMAGE_MEAN,
            "image_std": clip.IMAGE_STANDARD_DEVIATION,
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


def openai_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of OpenAI's vocabulary file, which has one header line, then 48,894 merges.

    Raises InputError if the file is missing or is not such a file.
    """
    count = 49152 - 256 - 2
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 1 + count]]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"vocabulary {path} cannot be read ({error}): put OpenAI's {VOCABULARY_FILE} there") from error
    symbols = clip.byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), clip.START_TEXT, clip.END_TEXT]
    vocabulary = {word: index for index, word in enumerate(words)}
    known = all(len(merge) == 2 and vocabulary.keys() >= set(merge) for merge in merges)
    if len(vocabulary) < 256 + 256 + count + 2 or not known:
        raise InputError(f"vocabulary {path} does not contain {count} merges: put OpenAI's {VOCABULARY_FILE} there")
    return clip.bpe_tokenizer(vocabulary, merges)


def hugging_face_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer in `tokenizer.json`, else in `vocab.json` and `merges.txt`, or raises InputError."""
    path = folder / "tokenizer.json"
    try:
        if path.exists():
            tokenizer = Tokenizer.from_file(str(path))
        else:
            path = folder / "merges.txt"
            merges = [(first, second) for first, second in (line.split() for line in read_lines(path)[1:] if line)]
            path = folder / "vocab.json"
            vocabulary = read_json(path)
            if not isinstance(vocabulary, dict) or not all(type(index) is int for index in vocabulary.values()):
                raise ValueError("it does not map tokens to whole numbers")
            tokenizer = clip.bpe_tokenizer(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(f"tokenizer {path} cannot be read ({error!s:.200}): copy the model's own there") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load(name: str) -> tuple[clip.CLIP, Tokenizer]:
    """Returns model and tokenizer of a preset, a Hugging Face folder, or a `.pt` or `.safetensors` file like OpenAI's.

    Raises InputError if a file is missing or damaged, or if the files do not belong together.
    """
    path = TINY if name == "tiny" else Path(name)
    if name in clip.PRESETS:
        path = download.published(f"{name.replace('/', '-').replace('@', '-')}.pt")
    elif not path.exists() and not {"/", os.sep, "."} & set(name):
        raise unknown("model preset", name, ["tiny", *clip.PRESETS])
    if path.is_dir():
        config = hugging_face_config(path / "config.json")
        model = clip.from_state_dict(read_hugging_face_weights(path), config, "hugging_face", str(path))
        tokenizer = hugging_face_tokenizer(path)
    else:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_archive(path)
        model = clip.from_state_dict(state, openai_config(state, str(path)), "openai", str(path))
        beside = path.parent / VOCABULARY_FILE
        own = path.parent != cache_folder() and beside.exists()
        tokenizer = openai_tokenizer(beside if own else download.published(VOCABULARY_FILE))
    if tokenizer.get_vocab_size() > model.config.vocabulary_size:
        raise InputError(
            f"the tokenizer of {path} has {tokenizer.get_vocab_size()} tokens, the text tower embeds only "
            f"{model.config.vocabulary_size}: put the model's own tokenizer files beside it"
        )
    return model, tokenizer
