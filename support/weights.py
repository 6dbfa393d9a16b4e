"""Weights of a CLIP in and out: OpenAI's `.pt` archives (read without torch) and Hugging Face folders.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --model FILE_OR_FOLDER` uses it.
Both formats are read and written through one table of names, `clip.NAMES`.
"""

import io
import json
import math
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
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
    VOCABULARY_FILE,
    Config,
    Transformer,
    from_state_dict,
    hugging_face_tokenizer,
    openai_tokenizer,
    to_state_dict,
)
from support import download
from support.errors import InputError, read_json, unknown
from support.files import cache_folder

# ------------------------------------------------------------------------------------------- OpenAI's archives

_STORAGES = {
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "BFloat16Storage": jnp.bfloat16,
}


class _StandIn:
    """Takes the place of a TorchScript class: holds what the archive sets on it and does nothing."""


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it, not checked. Arrays are made once the pickle has been read: it could call
    `__setstate__` of whatever it holds, and that of a NumPy dtype changes the dtype for the whole process."""

    storage: Any  # ("storage", type, key, device, length)
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors and nothing else: any other global is refused by name, never called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if module == "torch" and name in _STORAGES:
            return name
        if module.partition(".")[0] == "__torch__":
            return type(name, (_StandIn,), {})
        wanted = f"{module}.{name}"
        raise InputError(
            f"its data.pkl asks for {wanted!r}, which no weights need: do not trust this file; of a model of your own, "
            "save the state_dict()"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """One entry, its checksum verified."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"its entry {name!r} is compressed: save it again with torch.save")
    return archive.read(entry)


def _unpickle(content: bytes) -> Any:
    # The unpickler makes room for the highest memo index at once: four wrong bytes may cost 64 GB. Other lengths are
    # checked against the content by genops itself.
    highest = max((index for opcode, index, _ in pickletools.genops(content) if opcode.name.endswith("PUT")), default=0)
    if highest > len(content):
        raise InputError(f"its data.pkl has a memo of {highest} objects: download the file again")
    return _Unpickler(io.BytesIO(content)).load()


def _to_array(tensor: _Tensor, data: Mapping[str, bytes]) -> np.ndarray:
    """The array that `tensor` describes, a view of its storage in `data` and never of other memory."""
    (kind, storage, key, _device, length), offset, size, stride = tensor
    if kind != "storage" or storage not in _STORAGES:
        raise InputError(f"its data.pkl refers to {tensor.storage!r}, which is no storage: download the file again")
    dtype = np.dtype(_STORAGES[storage])
    if length * dtype.itemsize > len(data[key]):
        raise InputError(f"its storage {key!r} is shorter than {length} numbers: download the file again")
    last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *size, *stride)) < 0 or (count and last >= length) or count > length:
        raise InputError(f"a tensor of shape {size} reaches outside its storage: download the file again")
    return np.ndarray(size, dtype, data[key], offset * dtype.itemsize, [step * dtype.itemsize for step in stride])


def _tensors(value: Any, prefix: str = "") -> dict[str, _Tensor]:
    """Every tensor under a module stand-in or a state dict, by its dotted name."""
    if isinstance(value, _Tensor):
        return {prefix: value}
    children = vars(value) if isinstance(value, _StandIn) else value if isinstance(value, dict) else {}
    found: dict[str, _Tensor] = {}
    for name, child in children.items():
        found |= _tensors(child, f"{prefix}.{name}" if prefix else str(name))
    return found


def read_torch_archive(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch or TorchScript archive by name, read without torch and without executing anything in it.

    Raises InputError, naming the file, for whatever is not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise InputError("it is a zip file without a data.pkl: give one that PyTorch saved")
            name = min(pickles, key=len)
            tensors = _tensors(_unpickle(_read_entry(archive, name)))
            folder = f"{name.removesuffix('data.pkl')}data"
            data = {key: _read_entry(archive, f"{folder}/{key}") for key in {t.storage[2] for t in tensors.values()}}
        return {name: _to_array(tensor, data) for name, tensor in tensors.items()}
    except FileNotFoundError as error:
        raise InputError(
            f"weights {path} do not exist: give a .pt file, a Hugging Face folder or one of {', '.join(PRESETS)}"
        ) from error
    except InputError as error:
        raise InputError(f"weights {path} are refused: {error}") from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"weights {path} are not a whole zip archive ({error}): download the file again, or, if it was saved by an "
            "old PyTorch, save it again with torch.save"
        ) from error
    except Exception as error:  # a malformed pickle may raise anything
        raise InputError(f"weights {path} are damaged ({error!r}): download them again") from error


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


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one safetensors file. Raises InputError, naming the file, where it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise InputError(f"weights {path} do not exist: put the model's safetensors file there") from error
    except Exception as error:  # AttributeError for a dtype that NumPy lacks, such as F8_E4M3
        raise InputError(f"weights {path} cannot be read ({error!r}): download them again") from error


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


def save_openai(path: Path, model: CLIP) -> None:
    """Writes a safetensors file under OpenAI's names. Raises InputError for a model whose sizes these cannot tell."""
    config = model.config
    state = {name: np.asarray(leaf, order="C") for name, leaf in to_state_dict(model, "openai").items()}
    heads = [tower.width // tower.heads for tower in (config.vision, config.text)]
    if heads != [64, 64] or openai_config(state, str(path)) != config:
        raise InputError(
            f"OpenAI's format tells no sizes but those of its own models: heads 64 wide (here {heads[0]} and "
            f"{heads[1]}), QuickGELU (here {config.activation}), start and end as the last tokens: use the Hugging "
            "Face folder instead"
        )
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    save_file(state, temporary)
    os.replace(temporary, path)


# --------------------------------------------------------------------------------------------------------------- load


def _vocabulary_file(folder: Path) -> Path:
    """OpenAI's vocabulary beside the weights, else in the cache."""
    beside = folder / VOCABULARY_FILE
    return beside if folder != cache_folder() and beside.exists() else download.published(VOCABULARY_FILE)


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
        tokenizer = openai_tokenizer(_vocabulary_file(path.parent))
    if tokenizer.get_vocab_size() > model.config.vocabulary_size:
        raise InputError(
            f"the tokenizer of {path} knows {tokenizer.get_vocab_size()} tokens, the text tower embeds "
            f"{model.config.vocabulary_size}: put the model's own tokenizer files beside it"
        )
    return model, tokenizer
