"""Reading and writing weights: published formats, archives by hand, and files that are refused."""

import dataclasses
import functools
import gzip
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from archives_by_hand import (
    Build,
    Call,
    Global,
    New,
    Stored,
    archive,
    described,
    entries,
    module,
    pickled,
    rebuilt,
    state_dict,
    vocabulary_file,
    write,
)
from conftest import EXAMPLES, shared
from helpers import (
    CONFIG,
    MERGES,
    TOKENIZER,
    VOCABULARY,
    hugging_face_state,
    openai_state,
    refused,
    small_model,
)
from huggingface_hub import constants
from mutations import read_unless_refused, with_mutations
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import clip
from support import weights
from support.weights import formats, hub
from support.weights.archives import read_weights


def assert_same(actual: clip.CLIP, expected: clip.CLIP) -> None:
    """Compares all bits of the weights, and the configurations."""
    assert actual.config == expected.config
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, jnp.float32)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def read(path: Path) -> clip.CLIP:
    """Reads one of OpenAI's files as `load` does, without the tokenizer."""
    state = read_weights(path)
    config = formats.openai_config(state, str(path))
    return clip.from_state_dict(state, config, "openai", str(path))


def arrays_of(model: clip.CLIP, style: str) -> dict[str, np.ndarray]:
    """Returns a state dict that can be written to a safetensors file."""
    state = clip.to_state_dict(model, style)
    return {name: np.array(array, order="C") for name, array in state.items()}


# -------------------------------------------------------------------------------- PyTorch archives


@pytest.mark.parametrize("tree", [state_dict, module])
@pytest.mark.parametrize("prefix", ["archive/", "x/y/", ""])
def test_archive(tree: Callable, prefix: str, tmp_path: Path) -> None:
    """Both kinds, saved on a GPU in mixed precision, with the integers in OpenAI's files."""
    integers = {name: np.array(8) for name in ("input_resolution", "context_length", "vocab_size")}
    files = archive(openai_state() | integers, tree, prefix, "cuda:0")
    actual = read(write(tmp_path / "clip.pt", files))
    assert actual.config == CONFIG
    for name, array in clip.to_state_dict(actual, "openai").items():
        expected = openai_state()[name].astype(np.float32)
        assert np.asarray(array).tobytes() == expected.tobytes(), name


def test_strides_and_offsets(tmp_path: Path) -> None:
    """Views of storages that tensors share have the right values, in every float dtype."""
    numbers = np.arange(24, dtype=np.float32)
    single, brain = Stored("0", "FloatStorage", 24), Stored("1", "BFloat16Storage", 24)
    attributes = Build(
        Call(Global("collections OrderedDict"), ()), {"_metadata": {"": {"version": 1}}}
    )
    tree = {
        "whole": rebuilt(single, 0, (2, 3, 4), (12, 4, 1)),
        "part": rebuilt(single, 5, (2, 3), (6, 2)),
        "transposed": rebuilt(single, 0, (4, 6), (1, 4)),
        "permuted": rebuilt(single, 0, (4, 2, 3), (1, 12, 4)),
        "scalar": rebuilt(single, 7, (), ()),
        "repeated": rebuilt(single, 3, (5,), (0,)),
        "empty": rebuilt(single, 0, (0, 4), (4, 1)),
        "brain": rebuilt(brain, 4, (4, 5), (1, 4)),
        "half": described("2", numbers.astype(np.float16)),
        "double": described("3", numbers.astype(np.float64)),
        "parameter": Call(Global("torch._utils _rebuild_parameter"), (rebuilt(single, 2, (), ()),)),
        "a dict with attributes": attributes,
    }
    dtypes = (np.float32, jnp.bfloat16, np.float16, np.float64)
    storages = {str(key): numbers.astype(dtype).tobytes() for key, dtype in enumerate(dtypes)}
    expected = {
        "whole": numbers.reshape(2, 3, 4),
        "part": np.array([[5, 7, 9], [11, 13, 15]]),
        "transposed": numbers.reshape(6, 4).T,
        "permuted": numbers.reshape(2, 3, 4).transpose(2, 0, 1),
        "scalar": np.array(7),
        "repeated": np.full(5, 3),
        "empty": np.zeros((0, 4)),
        "brain": numbers[4:].reshape(5, 4).T,
        "half": numbers,
        "double": numbers,
        "parameter": np.array(2),
    }
    tensors = read_weights(write(tmp_path / "a.pt", entries(tree, storages)))
    assert tensors.keys() == expected.keys()
    for name, array in tensors.items():
        assert array.shape == expected[name].shape
        np.testing.assert_array_equal(array.astype(np.float32), expected[name], err_msg=name)


# ------------------------------------------------------------------------------ names and layouts


@pytest.mark.parametrize("style", ["hugging_face", "openai"])
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_round_trip(style: str, dtype: Any) -> None:
    """Float32 keeps all bits; other precisions become float32."""
    state = {n: array.astype(dtype) for n, array in arrays_of(small_model(), style).items()}
    actual = arrays_of(clip.from_state_dict(state, CONFIG, style, "here"), style)
    assert actual.keys() == state.keys()
    for name, array in actual.items():
        assert array.tobytes() == state[name].astype(np.float32).tobytes(), name


def test_real_archive_and_folder_agree() -> None:
    archive, tokenizer = weights.load(str(shared("weights/pacs-clip/openai.pt")))
    folder, other = weights.load(str(shared("weights/pacs-clip/hf")))
    assert_same(archive, folder)
    assert archive.config.vision == clip.Transformer(128, 5, 2, 512)
    assert tokenizer.get_vocab() == other.get_vocab()


def test_hugging_face_names_and_layout() -> None:
    state = clip.to_state_dict(small_model(), "hugging_face")
    assert state.keys() == hugging_face_state().keys()
    for name, array in hugging_face_state().items():
        assert np.asarray(state[name]).tobytes() == array.tobytes(), name


def test_openai_names_and_layout() -> None:
    """Query, key and value are one entry, projections are transposed, the rest is unchanged."""
    source, state = hugging_face_state(), clip.to_state_dict(small_model(), "openai")
    expected = {
        "logit_scale": source["logit_scale"],
        "visual.class_embedding": source["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": source["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": source["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": source["visual_projection.weight"].T,
        "token_embedding.weight": source["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": source["text_model.embeddings.position_embedding.weight"],
        "text_projection": source["text_projection.weight"].T,
    }
    blocks = [("visual.transformer", "vision_model", 0), ("visual.transformer", "vision_model", 1)]
    blocks += [("transformer", "text_model", 0)]
    for kind in ("weight", "bias"):
        expected[f"visual.ln_pre.{kind}"] = source[f"vision_model.pre_layrnorm.{kind}"]
        expected[f"visual.ln_post.{kind}"] = source[f"vision_model.post_layernorm.{kind}"]
        expected[f"ln_final.{kind}"] = source[f"text_model.final_layer_norm.{kind}"]
        for prefix, tower, layer in blocks:
            block, other = f"{prefix}.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
            stacked = [source[f"{other}.self_attn.{name}_proj.{kind}"] for name in ("q", "k", "v")]
            expected[f"{block}.attn.in_proj_{kind}"] = np.concatenate(stacked)
            expected[f"{block}.attn.out_proj.{kind}"] = source[f"{other}.self_attn.out_proj.{kind}"]
            expected[f"{block}.mlp.c_fc.{kind}"] = source[f"{other}.mlp.fc1.{kind}"]
            expected[f"{block}.mlp.c_proj.{kind}"] = source[f"{other}.mlp.fc2.{kind}"]
            expected[f"{block}.ln_1.{kind}"] = source[f"{other}.layer_norm1.{kind}"]
            expected[f"{block}.ln_2.{kind}"] = source[f"{other}.layer_norm2.{kind}"]
    assert state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


# ---------------------------------------------------------------------------- folders and files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "not" / "yet"
    weights.save(folder, small_model(), TOKENIZER)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, to be changed."""
    return shutil.copytree(saved, tmp_path / "clip")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_save_then_load(dtype: Any, tmp_path: Path) -> None:
    weights.save(tmp_path, small_model(), TOKENIZER, dtype)
    loaded, tokenizer = weights.load(str(tmp_path))
    rounded = [np.asarray(leaf, dtype).astype("f4") for leaf in jax.tree.leaves(small_model())]
    structure = jax.tree.structure(small_model())
    assert_same(loaded, jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in rounded]))
    assert tokenizer.to_str() == TOKENIZER.to_str()
    assert tokenizer.encode("a dog").ids == [514, VOCABULARY["a</w>"], VOCABULARY["dog</w>"], 515]


def edit(path: Path, *keys: str, value: Any) -> None:
    """Sets one value of a JSON file, or removes it if `value` is `...`."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is ...:
        del inner[keys[-1]]
    path.write_text(json.dumps(content))


def shard(folder: Path) -> None:
    """Splits `model.safetensors` into two shards and an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def add_an_old_index(folder: Path) -> None:
    """The single file is read even if an index of other weights lies beside it."""
    weights.save(
        folder, eqx.tree_at(lambda m: m.logit_scale, small_model(), jnp.float32(1)), TOKENIZER
    )
    shard(folder)
    weights.save(folder, small_model(), TOKENIZER)


def split_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    lines = ["#version: 0.2", *map(" ".join, MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines))


def let_the_tokenizer_shorten(folder: Path) -> None:
    """Texts that are too long are to be refused or shortened by `clip.tokenize`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))


def add_position_ids(folder: Path) -> None:
    """Older folders contain them, as integers."""
    ids = {f"{tower}_model.embeddings.position_ids": np.arange(5) for tower in ("text", "vision")}
    save_file(load_file(folder / "model.safetensors") | ids, folder / "model.safetensors")


def use_pytorch(folder: Path) -> None:
    write(folder / "pytorch_model.bin", archive(load_file(folder / "model.safetensors")))
    (folder / "model.safetensors").unlink()


def use_legacy_tokens(folder: Path) -> None:
    """The first published configurations say 2 and mean the highest id."""
    edit(folder / "config.json", "text_config", "bos_token_id", value=0)
    edit(folder / "config.json", "text_config", "eos_token_id", value=2)


def forget_the_start_token(folder: Path) -> None:
    """The tokenizer's counts."""
    edit(folder / "config.json", "text_config", "bos_token_id", value=7)


FOLDERS = [
    *(shard, add_an_old_index, split_the_tokenizer, let_the_tokenizer_shorten),
    *(add_position_ids, use_pytorch, use_legacy_tokens, forget_the_start_token),
]


@pytest.mark.parametrize("change", FOLDERS)
def test_folder_of_another_kind(change: Callable[[Path], None], folder: Path) -> None:
    """The same model and tokenizer, written in another way."""
    change(folder)
    model, tokenizer = weights.load(str(folder))
    assert_same(model, small_model())
    assert tokenizer.encode("dog dog dog").ids == [514, *[VOCABULARY["dog</w>"]] * 3, 515]


def test_short_configuration_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    gelu = {"hidden_act": "gelu"}
    path.write_text(
        json.dumps({"vision_config": gelu, "text_config": None, "text_config_dict": gelu})
    )
    expected = dataclasses.replace(clip.PRESETS["ViT-B/32"], activation="gelu")
    assert weights.hugging_face_config(path) == expected
    path.write_text("{}")
    assert weights.hugging_face_config(path) == clip.PRESETS["ViT-B/32"]


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8}
        | {"head_width": 32, "mlp_ratio": 3, "pool_type": "tok"},
        "text_cfg": {"context_length": 12, "vocab_size": 516, "width": 128}
        | {"heads": 4, "layers": 2, "mlp_ratio": 4.3},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


@functools.cache
def open_clip_model() -> clip.CLIP:
    """A model with exact GELU, heads that are not 64 wide, and statistics of its own."""
    vision, text = clip.Transformer(64, 2, 2, 192), clip.Transformer(128, 2, 4, 550)
    statistics = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    config = clip.Config(16, 8, vision, text, 32, 12, 516, 514, 515, "gelu", 1e-5, *statistics)
    return clip.CLIP(config, jax.random.key(3))


@pytest.fixture
def open_clip_folder(tmp_path: Path) -> Path:
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    save_file(arrays_of(open_clip_model(), "openai"), tmp_path / "open_clip_model.safetensors")
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "bin", "file", "custom text", "saved"])
def test_open_clip(kind: str, open_clip_folder: Path) -> None:
    """The configuration specifies activation, heads, widths and statistics; the weights do not."""
    path = open_clip_folder / "open_clip_model.safetensors"
    state = load_file(path)
    if kind == "custom text":
        whole = ("visual.", "logit_scale")
        prefixes = {name: "" if name.startswith(whole) else "text." for name in state}
        save_file({prefixes[name] + name: array for name, array in state.items()}, path)
    elif kind == "bin":
        write(open_clip_folder / "open_clip_pytorch_model.bin", archive(state))
        path.unlink()
    elif kind == "saved":
        weights.save(open_clip_folder, open_clip_model(), TOKENIZER)
    loaded = weights.load(str(path if kind == "file" else open_clip_folder))[0]
    assert_same(loaded, open_clip_model())


@pytest.mark.parametrize("prefix", ["", "module.", "state_dict.module.", "model.clip."])
def test_checkpoint_of_training(
    prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state dict is found under any prefix, and the command says what it does not specify."""
    inner = arrays_of(small_model(), "openai")
    state = {f"{prefix}{name}": array for name, array in inner.items()}
    if prefix:
        state["optimizer.state.0.exp_avg"] = np.ones(3, np.float32)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "epoch.safetensors"
    save_file(state, path)
    assert_same(weights.load(str(path))[0], small_model())
    said = "does not specify activation and heads, taken: quick_gelu (not gelu), 1 and 2 heads"
    assert said in capsys.readouterr().err
    save_file(state | {"ema.visual.class_embedding": np.ones(64)}, path)
    refused(lambda: weights.load(str(path)), path, f"hold 2 models, at ema., {prefix or 'its top'}")


@pytest.mark.parametrize(
    ("name", "section"),
    [("preprocessor_config.json", None), ("processor_config.json", "image_processor")],
)
def test_image_statistics_of_the_processor(name: str, section: str | None, folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    content = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.5]}
    (folder / name).write_text(json.dumps({section: content} if section else content))
    config = weights.load(str(folder))[0].config
    assert (config.image_mean, config.image_deviation) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.5))


# ----------------------------------------------------------------------------------- files refused

WRONG_VALUES = [
    ("config.json", "text_config", [1], "TypeError"),
    ("config.json", "model_type", "siglip", "it describes a siglip"),
    ("config.json", "projection_dim", None, "embedding_size is None, not a positive whole number"),
    ("config.json", "text_config hidden_size", "128", "text.width is '128', not a positive"),
    ("config.json", "vision_config image_size", [16, 16], "image_size is [16, 16], not a positive"),
    ("config.json", "vision_config patch_size", 0, "patch_size is 0, not a positive"),
    ("config.json", "vision_config num_hidden_layers", 1.5, "vision.layers is 1.5, not a positive"),
    (
        "config.json",
        "text_config num_attention_heads",
        3,
        "text.width is 128, no multiple of its 3",
    ),
    ("config.json", "text_config hidden_act", "gelu", "hidden_act 'quick_gelu' and 'gelu'"),
    ("config.json", "text_config layer_norm_eps", 1e-6, "layer_norm_eps 1e-05 and 1e-06"),
    ("config.json", "text_config eos_token_id", 516, "'end_token': 516} are not in the vocabulary"),
    ("config.json", "text_config eos_token_id", [515], "end_token is [515], not the id of a token"),
    ("config.json", "text_config bos_token_id", None, "start_token is None, not the id of a token"),
    (
        "open_clip_config.json",
        "model_cfg vision_cfg timm_model_name",
        "x",
        "timm_model_name 'x' is",
    ),
    ("open_clip_config.json", "model_cfg vision_cfg pool_type", "avg", "pool_type 'avg' is not"),
    ("open_clip_config.json", "model_cfg text_cfg hf_model_name", "y", "hf_model_name 'y' is not"),
    ("open_clip_config.json", "model_cfg multimodal_cfg", {"a": 3}, "multimodal_cfg {'a': 3} is"),
    (
        "open_clip_config.json",
        "model_cfg vision_cfg layers",
        [3, 4],
        "vision.layers is [3, 4], not",
    ),
    ("open_clip_config.json", "model_cfg text_cfg heads", 3, "text.width is 128, no multiple"),
    ("open_clip_config.json", "model_cfg text_cfg", None, "TypeError"),
    ("open_clip_config.json", "preprocess_cfg mean", [0.5, 0.5], "ValueError"),
    ("preprocessor_config.json", "image_std", [0.5, 0.5, 0], "[0.5 0.5 0. ], not three numbers"),
    ("preprocessor_config.json", "image_mean", 0.5, "ValueError"),
    ("preprocessor_config.json", "image_mean", ["a", "b", "c"], "ValueError"),
    ("preprocessor_config.json", "image_mean", [0.5, float("nan"), 0.5], "not three numbers"),
    ("preprocessor_config.json", "do_normalize", False, "images are not standardised"),
    ("preprocessor_config.json", "do_rescale", False, "images are not standardised"),
]


@pytest.mark.parametrize(("name", "keys", "value", "outcome"), WRONG_VALUES)
def test_wrong_value(
    name: str, keys: str, value: Any, outcome: str, request: pytest.FixtureRequest
) -> None:
    is_open_clip = name == "open_clip_config.json"
    folder = request.getfixturevalue("open_clip_folder" if is_open_clip else "folder")
    edit(folder / name, *keys.split(), value=value)
    refused(lambda: weights.load(str(folder)), folder / name, outcome)


@pytest.mark.parametrize(
    ("key", "value", "outcome"),
    [
        ("hidden_act", "relu", "activation is 'relu', not quick_gelu or gelu"),
        ("hidden_act", ["gelu"], "activation is ['gelu'], not quick_gelu or gelu"),
        ("layer_norm_eps", "0", "layer_norm_epsilon is '0', not a fraction"),
    ],
)
def test_wrong_value_in_both_towers(key: str, value: Any, outcome: str, folder: Path) -> None:
    for tower in ("vision_config", "text_config"):
        edit(folder / "config.json", tower, key, value=value)
    refused(lambda: weights.load(str(folder)), folder / "config.json", outcome)


def test_open_clips_tokenizer_must_be_there(open_clip_folder: Path) -> None:
    path = open_clip_folder / "open_clip_config.json"
    edit(path, "model_cfg", "text_cfg", "hf_tokenizer_name", value="someone/bert")
    assert_same(weights.load(str(open_clip_folder))[0], open_clip_model())
    (open_clip_folder / "tokenizer.json").unlink()
    outcome = "the tokenizer.json of someone/bert is not beside it"
    refused(lambda: weights.load(str(open_clip_folder)), path, outcome)


def header(dtype: str, shape: list[int], size: int) -> bytes:
    """Returns a safetensors file with one tensor of zeros."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    content = json.dumps({"a\n": entry}).encode()
    return struct.pack("<Q", len(content)) + content + bytes(size)


INDEX = "model.safetensors.index.json"
BROKEN = [
    ("config.json", None, "neither config.json with model.safetensors"),
    ("config.json", b"", "config.json cannot be read"),
    ("config.json", b"[]", "config.json cannot be read (TypeError"),
    ("config.json", b"\xff", "config.json cannot be read"),
    ("model.safetensors", None, "put the missing files there"),
    ("model.safetensors", b"", "cannot be read (SafetensorError"),
    ("model.safetensors", struct.pack("<Q", 2**40) + b"{}", "cannot be read (SafetensorError"),
    ("model.safetensors", header("F8_E4M3", [4], 4), "model.safetensors cannot be read"),
    ("model.safetensors", header("F32", [4], 8), "cannot be read (SafetensorError"),
    ("model.safetensors", header("NO\nNE", [1], 4), "cannot be read (SafetensorError"),
    ("model.safetensors", header("F32", [1], 4), r"unexpected 'a\\n'"),
    (INDEX, b"", f"{INDEX} cannot be read"),
    (INDEX, b"{}", f"{INDEX} cannot be read (KeyError: 'weight_map')"),
    (INDEX, b'{"weight_map": []}', f"{INDEX} cannot be read (AttributeError"),
    (INDEX, b'{"weight_map": {"a": 3}}', f"{INDEX} cannot be read (TypeError"),
    (
        INDEX,
        b'{"weight_map": {"a": "b.safetensors"}}',
        "b.safetensors cannot be read (FileNotFound",
    ),
    ("tokenizer.json", None, "merges.txt cannot be read"),
    ("tokenizer.json", b"", "copy the model's own there"),
    ("tokenizer.json", b"{}", "copy the model's own there"),
]


@pytest.mark.parametrize(("name", "content", "outcome"), BROKEN)
def test_broken_file(name: str, content: bytes | None, outcome: str, folder: Path) -> None:
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    refused(lambda: weights.load(str(folder)), folder, outcome)


# --------------------------------------------------------------------------------- weights refused


@pytest.mark.parametrize("style", ["hugging_face", "openai"])
def test_every_mismatch_is_reported_at_once(style: str) -> None:
    state = arrays_of(small_model(), style)
    gone, short, integer, *_ = state
    del state[gone]
    state |= {
        "head.weight\n": state[short],
        short: state[short][:1, None],
        integer: np.ones_like(state[integer], int),
    }
    refused(
        lambda: clip.from_state_dict(state, CONFIG, style, "FILE"),
        "FILE",
        f"lacks {gone}",
        r"unexpected 'head.weight\n'",
        f"{short} has shape (1, 1",
        f"{integer} has dtype int64",
    )


C_FC = "transformer.resblocks.0.mlp.c_fc.weight"
OPENAI_ENTRIES = [
    ("visual.conv1.weight", None, "lacks visual.conv1.weight"),  # as in OpenAI's ResNets
    ("visual.conv1.weight", np.zeros((64, 3, 0, 0)), "conv1.weight has shape (64, 3, 0, 0)"),
    ("visual.positional_embedding", np.zeros((0, 64)), "positional_embedding has shape (0, 64)"),
    ("visual.positional_embedding", np.zeros((1, 64)), "image_size is 0, not a positive"),
    ("visual.positional_embedding", np.zeros((6, 64)), "has shape (6, 64), not (5, 64)"),
    ("token_embedding.weight", np.zeros(64), "token_embedding.weight has shape (64,)"),
    ("token_embedding.weight", np.zeros((516, 128), int), "token_embedding.weight has dtype int64"),
    ("text_projection", np.zeros(64), "text_projection has shape (64,)"),
    (C_FC, np.zeros((192, 48)), "text.width is no multiple of 64"),
    (
        "transformer.resblocks.1.ln_1.bias",
        np.zeros(128),
        "lacks transformer.resblocks.1.ln_1.weight",
    ),
]


@pytest.mark.parametrize(("name", "array", "outcome"), OPENAI_ENTRIES)
def test_openai_sizes_that_do_not_fit(
    name: str, array: np.ndarray | None, outcome: str, tmp_path: Path
) -> None:
    state = {**openai_state(), name: array}
    if array is None:
        del state[name]
    path = write(tmp_path / "clip.pt", archive(state))
    refused(lambda: read(path), path, outcome)


HUGGING_FACE_ENTRIES = [
    ("text_model.embeddings.token_embedding.weight", None, "lacks text_model.embeddings.token"),
    ("text_projection.weight", np.ones((40, 128)), "has shape (40, 128), not (32, 128)"),
    ("text_projection.weight", np.full((32, 128), np.inf), "text_projection.weight is not finite"),
    ("logit_scale", np.array(np.nan), "logit_scale is not finite"),
    ("logit_scale", np.array(100.0), "logit_scale is 100, which exp() makes huge"),
]


@pytest.mark.parametrize(("name", "array", "outcome"), HUGGING_FACE_ENTRIES)
def test_weights_that_cannot_be(
    name: str, array: np.ndarray | None, outcome: str, folder: Path
) -> None:
    state = {**load_file(folder / "model.safetensors"), name: array}
    if array is None:
        del state[name]
    save_file(state, folder / "model.safetensors")
    refused(lambda: weights.load(str(folder)), folder, outcome)


# ------------------------------------------------------------------------ names and tokenizers refused


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


NAMES = [
    *[
        (name, f"unknown model preset '{name}': did you mean ViT-")
        for name in ("ViT-B-16", "ViTL14")
    ],
    *[(name, f"{repository} is no file or folder here") for name, repository in hub.OPENAI.items()],
    ("some/one", "OfflineModeIsEnabled"),
    ("a--b/c", "HFValidationError"),
    ("some/no.pt", "some/no.pt cannot be read (FileNotFoundError"),
]


@pytest.mark.parametrize(("name", "outcome"), NAMES)
def test_name_of_nothing(name: str, outcome: str, empty_hub: None) -> None:
    refused(lambda: weights.load(name), outcome, "ViT-B/16")


def test_tokenizer_of_another_model(folder: Path) -> None:
    """Both mismatches are reported at once."""
    edit(folder / "config.json", "text_config", "vocab_size", value=500)
    edit(folder / "config.json", "text_config", "bos_token_id", value=6)
    edit(folder / "config.json", "text_config", "eos_token_id", value=7)
    outcome = (
        "has 516 tokens, of 500 that the model embeds and ends texts with token 515, the model "
    )
    refused(lambda: weights.load(str(folder)), folder, f"{outcome}with 7")


def test_file_without_a_tokenizer(empty_hub: None, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    repository = hub.OPENAI["ViT-B/32"]
    refused(lambda: weights.load(str(path)), repository, "tokenizer.json elsewhere, put it at")
    vocabulary_file(tmp_path)
    refused(lambda: weights.load(str(path)), path, "has 49408 tokens, of 516")


# -------------------------------------------------------------------------------- archives refused


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


NO_ZIP = "cannot be read (BadZipFile: File is not a zip file)"
DAMAGED = {
    "empty": (lambda content: b"", NO_ZIP),
    "beginning": (lambda content: content[:5_000], NO_ZIP),
    "half": (lambda content: content[: len(content) // 2], NO_ZIP),
    "without its end": (lambda content: content[:-1], NO_ZIP),
    "a pickle": (lambda content: pickle.dumps({"a": 1}, 2), NO_ZIP),
    "an empty zip": (
        lambda content: b"PK\x05\x06" + bytes(18),
        "There is no item named 'data.pkl'",
    ),
    "a flipped bit": (flip_a_bit, "Bad CRC-32 for file"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_archive(kind: str, tmp_path: Path) -> None:
    damage, outcome = DAMAGED[kind]
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: read(path), path, outcome)


@pytest.mark.parametrize("entry", ["archive/data.pkl", "archive/data/3"])
@pytest.mark.parametrize("damage", ["compressed", "missing", "empty"])
def test_entry_that_cannot_be_read(entry: str, damage: str, tmp_path: Path) -> None:
    files = archive(openai_state())
    outcome = {
        "compressed": f"its entry '{entry}' is compressed): download it again, or, if an old",
        "missing": "There is no item named",
        "empty": "EOFError" if entry.endswith("pkl") else "exceeds its storage '3'",
    }[damage]
    if damage == "missing":
        del files[entry]
    elif damage == "empty":
        files[entry] = b""
    path = write(tmp_path / "clip.pt", files, entry if damage == "compressed" else "")
    refused(lambda: read(path), path, outcome)


def write_tree(tmp_path: Path, tree: Any) -> Path:
    """Writes an archive of `tree` whose storage 0 contains 6 float32 numbers."""
    files = entries(tree, {"0": np.arange(6, dtype=np.float32).tobytes()})
    return write(tmp_path / "clip.pt", files)


FORBIDDEN = """os system, torch.jit._pickle build_intlist, posix system, builtins eval, builtins getattr,
__builtin__ eval, torch load, torch.storage _load_from_bytes, torch._utils _rebuild_tensor,
numpy.core.multiarray _reconstruct, numpy dtype, copyreg _reconstructor, __torch__evil system,
collections OrderedDict.__init__"""


@pytest.mark.parametrize("place", ["call", "module", "value"])
@pytest.mark.parametrize("name", [name.strip() for name in FORBIDDEN.split(",")])
def test_forbidden_global_is_refused_by_name(name: str, place: str, tmp_path: Path) -> None:
    function = Global(name)
    places = {"call": Call(function, ("",)), "module": Build(New(function), {}), "value": function}
    path = write_tree(tmp_path, {"a": places[place]})
    asked = f"its data.pkl asks for {name.replace(' ', '.')!r}, which weights never need"
    refused(lambda: read(path), path, asked, "do not trust it", "save its state_dict()")


@pytest.mark.parametrize(
    ("name", "code"), [("os system", "touch {}"), ("builtins eval", "open('{}', 'w').close()")]
)
def test_nothing_is_executed(name: str, code: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = Call(Global(name), (code.format(trace),))
    path = write_tree(tmp_path, {"a": payload})
    refused(lambda: read(path), path)
    assert not trace.exists()
    pickle.loads(pickled(payload) + pickle.STOP)  # without the checks, the payload is executed
    assert trace.exists()


def test_archive_cannot_change_a_dtype(tmp_path: Path) -> None:
    """NumPy's bfloat16 is one object per process, and BUILD would call its `__setstate__`."""
    swapped = Build(Global("torch BFloat16Storage"), (3, ">", None, None, None, -1, -1, 0))
    path = write_tree(tmp_path, {"a": swapped})
    refused(lambda: read(path), path)
    assert np.dtype(jnp.bfloat16).byteorder == "="


def test_archive_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD sets attributes of a function: of one that only this archive has."""
    changed = Build(Global("torch._utils _rebuild_parameter"), (None, {"__defaults__": (3,)}))
    tensor = rebuilt(Stored("0", "FloatStorage", 6), 0, (6,), (1,))
    read_weights(write_tree(tmp_path, {"a": changed, "b": tensor}))
    call = Call(Global("torch._utils _rebuild_parameter"), ())
    path = write_tree(tmp_path, {"a": call})
    refused(lambda: read(path), path, "TypeError")


FLOATS = Stored("0", "FloatStorage", 6)
EXCEEDS = "exceeds its storage '0'"
TENSORS = {
    "stride": (rebuilt(FLOATS, 0, (2, 3), (4, 1)), EXCEEDS),
    "offset": (rebuilt(FLOATS, 1, (2, 3), (3, 1)), EXCEEDS),
    "offset far": (rebuilt(FLOATS, 2**62, (2,), (1,)), EXCEEDS),
    "size": (rebuilt(FLOATS, 0, (7,), (1,)), EXCEEDS),
    "size far": (rebuilt(FLOATS, 0, (2**62, 4), (4, 1)), EXCEEDS),
    "negative size": (rebuilt(FLOATS, 0, (-2, 3), (3, 1)), EXCEEDS),
    "two negative sizes": (rebuilt(FLOATS, 0, (-2, -3), (3, 1)), EXCEEDS),
    "negative stride": (rebuilt(FLOATS, 5, (6,), (-1,)), EXCEEDS),
    "negative offset": (rebuilt(FLOATS, -1, (2,), (1,)), EXCEEDS),
    "bomb": (rebuilt(FLOATS, 0, (10**12,), (0,)), EXCEEDS),
    "short storage": (rebuilt(Stored("0", "FloatStorage", 7), 0, (2, 3), (3, 1)), EXCEEDS),
    "short for its type": (rebuilt(Stored("0", "DoubleStorage", 6), 0, (2,), (1,)), EXCEEDS),
    "negative storage": (rebuilt(Stored("0", "FloatStorage", -1), 0, (2,), (1,)), EXCEEDS),
    "claims less": (rebuilt(Stored("0", "FloatStorage", 5), 0, (2, 3), (3, 1)), EXCEEDS),
    "no storage": (rebuilt(("tensor", "FloatStorage", "0", "cpu", 6), 0, (6,), (1,)), EXCEEDS),
    "short id": (rebuilt(("storage", "FloatStorage"), 0, (2, 3), (3, 1)), "IndexError"),
    "axes": (rebuilt(FLOATS, 0, (2, 3), (1,)), "ValueError"),
    "fraction": (rebuilt(FLOATS, 0, (2.0, 3), (3, 1)), "TypeError"),
    "text": (rebuilt(FLOATS, 0, "23", "31"), "TypeError"),
    "unknown storage": (rebuilt(Stored("0", "Storage", 6), 0, (6,), (1,)), "torch.Storage"),
    "missing storage": (rebuilt(Stored("1", "FloatStorage", 6), 0, (6,), (1,)), "There is no item"),
    "elsewhere": (
        rebuilt(Stored("../version", "ByteStorage", 1), 0, (1,), (1,)),
        "There is no item",
    ),
    "few arguments": (Call(Global("torch._utils _rebuild_tensor_v2"), (FLOATS, 0)), "TypeError"),
    "called storage": (Call(Global("torch FloatStorage"), (6,)), "TypeError"),
    "called module": (Call(Global("__torch__.os system"), ("true",)), "TypeError"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_malformed_tensor(kind: str, tmp_path: Path) -> None:
    tensor, outcome = TENSORS[kind]
    path = write_tree(tmp_path, {"a": tensor})
    refused(lambda: read_weights(path), f"weights {path} cannot be read (", outcome)


PICKLES = {
    pickle.EMPTY_DICT + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f.": "memo of 2147483647 objects",
    pickle.EMPTY_DICT + pickle.PUT + b"99999999999\n.": "has a memo of 99999999999 objects",
    pickle.BYTEARRAY8 + struct.pack("<Q", 2**36): "ValueError",
    pickle.BINUNICODE8 + struct.pack("<Q", 2**62): "ValueError",
    pickle.LONG4 + b"\xff\xff\xff\x7f": "ValueError",
    pickle.GLOBAL + b"torch\n\xff\n": "UnicodeDecodeError",
    pickle.EMPTY_DICT: "ValueError",
    pickle.PROTO + b"\x09}.": "unsupported pickle protocol: 9",
    b"}q\x00X\x01\x00\x00\x00ah\x00s.": "RecursionError",  # a dict that contains itself
}


@pytest.mark.parametrize("opcodes", PICKLES)
def test_malformed_pickle(opcodes: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", {"archive/data.pkl": b"\x80\x02" + opcodes})
    refused(lambda: read(path), f"weights {path} cannot be read (", PICKLES[opcodes])


# ----------------------------------------------------------------------------------------------------- corrupted bytes


@functools.cache
def packed() -> Mapping[str, bytes]:
    """Returns a small archive: its tensors share one storage."""
    stored = Stored("0", "HalfStorage", max(array.size for array in openai_state().values()))
    steps = {
        name: tuple(step // array.itemsize for step in array.strides)
        for name, array in openai_state().items()
    }
    tree = module(
        {
            name: rebuilt(stored, 0, array.shape, steps[name])
            for name, array in openai_state().items()
        }
    )
    return entries(tree, {"0": np.linspace(-1, 1, stored.length, dtype=np.float16).tobytes()})


@EXAMPLES
def test_any_bytes_in_a_pickle(examples: int, tmp_path: Path) -> None:
    name, files = "archive/data.pkl", packed()

    def check(content: bytes) -> None:
        path = write(tmp_path / "pickle.pt", {**files, name: content})
        read_unless_refused(lambda: read(path), path)

    with_mutations(examples, files[name], check)


@EXAMPLES
def test_any_bytes_in_a_zip(examples: int, tmp_path: Path) -> None:
    """Checksums protect the contents: a file that is not refused has the original values."""
    path = write(tmp_path / "clip.pt", packed())
    original, intact = read_weights(path), path.read_bytes()
    with zipfile.ZipFile(path) as file:
        places = [*range(file.start_dir, len(intact))]
        for entry in file.infolist():
            places += range(entry.header_offset, entry.header_offset + 30 + len(entry.filename))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tensors = read_unless_refused(lambda: read_weights(path), path)
        if tensors is not None:
            assert list(tensors) == list(original)
            assert all(
                array.tobytes() == original[name].tobytes() for name, array in tensors.items()
            )

    with_mutations(examples, intact, check, places)


@EXAMPLES
def test_any_bytes_in_safetensors(examples: int, saved: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    path = saved / "mutated.safetensors"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_unless_refused(
            lambda: clip.from_state_dict(read_weights(path), CONFIG, "hugging_face", str(path)),
            path,
        )

    with_mutations(examples, content, check, range(8 + int.from_bytes(content[:8], "little")))


@EXAMPLES
@pytest.mark.parametrize(
    "name", ["config.json", "open_clip_config.json", "preprocessor_config.json"]
)
def test_any_bytes_in_a_configuration(name: str, examples: int, tmp_path: Path) -> None:
    """Any change is refused, or gives sizes that are positive and statistics that are finite."""
    weights.save(tmp_path, small_model(), TOKENIZER)
    if name == "open_clip_config.json":
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / name).write_text(json.dumps(OPEN_CLIP))
    path = tmp_path / name
    original = path.read_bytes()

    def read() -> clip.Config:
        if name == "open_clip_config.json":
            return formats.with_image_statistics(formats.open_clip_config(path), tmp_path)
        return formats.with_image_statistics(
            weights.hugging_face_config(tmp_path / "config.json"), tmp_path
        )

    def check(content: bytes) -> None:
        path.write_bytes(content)
        config = read_unless_refused(read, path)
        if config is not None:
            sizes = [
                *vars(config.vision).values(),
                *vars(config.text).values(),
                config.image_size,
                config.patch_size,
            ]
            assert all(type(size) is int and size > 0 for size in sizes)
            assert (
                np.all(np.isfinite([*config.image_mean, *config.image_deviation]))
                and min(config.image_deviation) > 0
            )

    with_mutations(examples, original, check)


def encodes(tokenizer: Tokenizer) -> None:
    """Encodes texts like `clip.tokenize`, so that a tokenizer that loads but cannot encode fails the test."""
    tokenizer.encode_batch(["dog", "a photo of a dog.", "\U0001f9b4"], add_special_tokens=False)


@EXAMPLES
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_any_bytes_in_a_tokenizer(name: str, examples: int, tmp_path: Path) -> None:
    if name == "tokenizer.json":
        TOKENIZER.save(str(tmp_path / name))
    else:
        (tmp_path / "vocab.json").write_text(json.dumps(VOCABULARY))
        (tmp_path / "merges.txt").write_text("\n".join(["header", *map(" ".join, MERGES)]))
    path = tmp_path / name

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read_unless_refused(lambda: encodes(weights.hugging_face_tokenizer(tmp_path)), tmp_path)

    with_mutations(examples, path.read_bytes(), check)


@EXAMPLES
def test_any_bytes_in_openais_vocabulary(examples: int, tmp_path: Path) -> None:
    """Changes the compressed file, whose checksum fails, and a tenth as often the text before compression."""
    vocabulary_file(tmp_path)
    path = tmp_path / formats.VOCABULARY_FILE
    compressed = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tokenizer = read_unless_refused(lambda: weights.openai_tokenizer(path), path)
        assert tokenizer is None or tokenizer.get_vocab_size() == 49408

    with_mutations(examples, compressed, check)
    with_mutations(
        examples // 10, gzip.decompress(compressed), lambda text: check(gzip.compress(text, 1))
    )
