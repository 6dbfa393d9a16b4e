"""Models in files: OpenAI's archives and Hugging Face folders, read and, the latter, written.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model FILE_OR_FOLDER` uses it. Entries
of both formats become a `clip.CLIP` through one table of names, `clip.NAMES`.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from gzip import open as open_gzip
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from clip import (
    ACTIVATIONS,
    CLIP,
    END_TEXT,
    IMAGE_MEAN,
    IMAGE_STANDARD_DEVIATION,
    PRESETS,
    START_TEXT,
    Config,
    Transformer,
    bpe_tokenizer,
    byte_symbols,
    from_state_dict,
    to_state_dict,
)
from support import download
from support.archives import read_safetensors, read_torch_archive
from support.download import VOCABULARY_FILE
from support.errors import InputError, read_json, read_lines, unknown
from support.files import cache_folder

# ------------------------------------------------------------------------------------------------- configurations


def openai_config(state: Mapping[str, np.ndarray], source: str) -> Config:
    """Sizes from the shapes of OpenAI's entries; heads are 64 wide, the last two tokens are start and end.

    Raises InputError where an entry that tells a size is missing, is empty or has the wrong number of axes.
    """
    ranks = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "token_embedding.weight": 2,
        "positional_embedding": 2,
        "text_projection": 2,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 2,
        "transformer.resblocks.0.mlp.c_fc.weight": 2,
    }
    wrong = [f"lacks {name}" for name in ranks if name not in state]
    shapes = {name: state[name].shape for name in ranks if name in state}
    wrong += [f"{name} has shape {shape}" for name, shape in shapes.items() if len(shape) != ranks[name] or 0 in shape]
    if wrong:
        raise InputError(f"weights {source} are no CLIP with a vision transformer, give one: {'; '.join(wrong)}")

    def tower(prefix: str) -> Transformer:
        mlp_width, width = state[f"{prefix}resblocks.0.mlp.c_fc.weight"].shape
        if width % 64:
            raise InputError(
                f"weights {source}: width {width} is no multiple of 64, as OpenAI's heads ask: give the model as a "
                "Hugging Face folder, whose config.json tells its heads"
            )
        layers = {name.split(".")[prefix.count(".") + 1] for name in state if name.startswith(f"{prefix}resblocks.")}
        return Transformer(width, len(layers), width // 64, mlp_width)

    patch_size = state["visual.conv1.weight"].shape[-1]
    vocabulary_size = state["token_embedding.weight"].shape[0]
    return Config(
        image_size=patch_size * math.isqrt(state["visual.positional_embedding"].shape[0] - 1),
        patch_size=patch_size,
        vision=tower("visual.transformer."),
        text=tower("transformer."),
        embedding_size=state["text_projection"].shape[1],
        context_length=state["positional_embedding"].shape[0],
        vocabulary_size=vocabulary_size,
        start_token=vocabulary_size - 2,
        end_token=vocabulary_size - 1,
    )


# ----------------------------------------------------------------------------------------- Hugging Face folders


def hugging_face_config(path: Path) -> Config:
    """Sizes from a Hugging Face `config.json`. Raises InputError where a key is missing or of no use."""
    content = read_json(path)

    def size(section: Mapping[str, Any], key: str) -> int:
        if type(section[key]) is not int or section[key] < 1:
            raise InputError(f"{path}: {key} is {section[key]!r}, not a positive whole number: restore the file")
        return section[key]

    try:
        vision, text = content["vision_config"], content["text_config"]
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        towers = [Transformer(*(size(tower, key) for key in keys)) for tower in (vision, text)]
        for tower in towers:
            if tower.width % tower.heads:
                raise InputError(
                    f"{path}: hidden_size {tower.width} is no multiple of its {tower.heads} attention heads: "
                    "restore the file"
                )
        (activation, epsilon), other = (
            (tower.get("hidden_act", "quick_gelu"), tower.get("layer_norm_eps", 1e-5)) for tower in (vision, text)
        )
        if (activation, epsilon) != other or activation not in ACTIVATIONS or type(epsilon) is not float:
            raise InputError(
                f"{path}: both towers need one layer_norm_eps and one hidden_act of {', '.join(ACTIVATIONS)}: choose "
                "another model"
            )
        vocabulary_size = size(text, "vocab_size")
        tokens = text.get("bos_token_id", 49406), text.get("eos_token_id", 49407)
        if tokens[1] == 2:  # the first published configurations say 2 and mean the highest id
            tokens = vocabulary_size - 2, vocabulary_size - 1
        if not all(type(token) is int and 0 <= token < vocabulary_size for token in tokens):
            raise InputError(
                f"{path}: bos_token_id, eos_token_id are {tokens}, no ids of the vocabulary: restore the file"
            )
        return Config(
            size(vision, "image_size"),
            size(vision, "patch_size"),
            *towers,
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
    """`model.safetensors`, else the shards that `model.safetensors.index.json` names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return read_safetensors(single)
    try:
        shards = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} does not name the shards ({error!r}): restore the file") from error
    state: dict[str, np.ndarray] = {}
    for shard in shards:
        state |= read_safetensors(shard)
    return state


def save(folder: Path, model: CLIP, tokenizer: Tokenizer, dtype: Any = np.float32) -> None:
    """Writes a folder that `load` and PyTorch `transformers` (`CLIPModel`, `CLIPProcessor`) open."""
    config = model.config
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors writes the buffer as it lies: a transposed array must be made contiguous first.
    arrays = {name: np.asarray(leaf, dtype, order="C") for name, leaf in to_state_dict(model, "hugging_face").items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})

    def tower(kind: str, sizes: Transformer) -> dict[str, Any]:
        return {
            "model_type": f"clip_{kind}_model",
            "hidden_size": sizes.width,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "intermediate_size": sizes.mlp_width,
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
            "do_resize": True,
            "size": {"shortest_edge": config.image_size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": config.image_size, "width": config.image_size},
            "do_convert_rgb": True,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": IMAGE_MEAN,
            "image_std": IMAGE_STANDARD_DEVIATION,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": config.context_length,
            "bos_token": START_TEXT,
            "eos_token": END_TEXT,
            "pad_token": END_TEXT,
            "unk_token": END_TEXT,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------------------------------------------------- tokenizers


def openai_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that OpenAI's vocabulary file describes: line 0 is a header, then 48,894 merges.

    Raises InputError where the file is missing or is none.
    """
    count = 49152 - 256 - 2
    try:
        with open_gzip(path, "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 1 + count]]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"vocabulary {path} cannot be read ({error}): put OpenAI's {VOCABULARY_FILE} there") from error
    symbols = byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START_TEXT, END_TEXT]
    vocabulary = {word: index for index, word in enumerate(words)}
    known = all(len(merge) == 2 and vocabulary.keys() >= set(merge) for merge in merges)
    if len(vocabulary) < 256 + 256 + count + 2 or not known:
        raise InputError(f"vocabulary {path} does not hold {count} merges: put OpenAI's {VOCABULARY_FILE} there")
    return bpe_tokenizer(vocabulary, merges)


def hugging_face_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: `tokenizer.json`, else `vocab.json` and `merges.txt`.

    Raises InputError where neither can be read.
    """
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
                raise ValueError("it is no table of tokens and their numbers")
            tokenizer = bpe_tokenizer(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise InputError(
            f"tokenizer {path} cannot be read ({error!s:.200}): copy the model's tokenizer files there"
        ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# --------------------------------------------------------------------------------------------------------------- load


TINY = Path(__file__).parents[1] / "assets" / "tiny-clip"


def load(name: str) -> tuple[CLIP, Tokenizer]:
    """The model and tokenizer of a file with OpenAI's names (`.pt`, `.safetensors`), a Hugging Face folder or a preset.

    Raises InputError where something is missing, damaged, or does not fit together.
    """
    path = TINY if name == "tiny" else Path(name)
    if name in PRESETS:
        path = download.published(f"{name.replace('/', '-').replace('@', '-')}.pt")
    elif not path.exists() and not {"/", os.sep, "."} & set(name):
        raise unknown("model preset", name, ["tiny", *PRESETS])
    if path.is_dir():
        config = hugging_face_config(path / "config.json")
        model = from_state_dict(read_hugging_face_weights(path), config, "hugging_face", str(path))
        tokenizer = hugging_face_tokenizer(path)
    else:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_archive(path)
        model = from_state_dict(state, openai_config(state, str(path)), "openai", str(path))
        beside = path.parent / VOCABULARY_FILE
        own = path.parent != cache_folder() and beside.exists()
        tokenizer = openai_tokenizer(beside if own else download.published(VOCABULARY_FILE))
    if tokenizer.get_vocab_size() > model.config.vocabulary_size:
        raise InputError(
            f"the tokenizer of {path} knows {tokenizer.get_vocab_size()} tokens, the text tower embeds "
            f"{model.config.vocabulary_size}: put the model's own tokenizer files beside it"
        )
    return model, tokenizer
