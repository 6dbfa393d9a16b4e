"""Reading and writing weights: published formats, archives by hand, and files that are refused."""

import dataclasses
import functools
import gzip
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from archives_by_hand import (
    archive,
    vocabulary_file,
    write,
)
from conftest import EXAMPLES, REFERENCE, shared
from helpers import (
    CONFIG,
    MERGES,
    TOKENIZER,
    VOCABULARY,
    hugging_face_state,
    openai_state,
    refused,
    shard,
    small_model,
)
from huggingface_hub import constants
from mutations import check_mutations
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


def arrays_of(model: clip.CLIP, style: str) -> dict[str, np.ndarray]:
    """Returns a state dict that can be written to a safetensors file."""
    state = clip.to_state_dict(model, style)
    return {name: np.array(array, order="C") for name, array in state.items()}


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


RECORDED = np.load(REFERENCE / "preparation.npz")
PROCESSORS = {  # as `weights.save` writes them
    f"{kind}{change}": json.loads(str(RECORDED[f"{kind}{change}/section"]))
    for kind in ("shortest", "squash")
    for change in ("", " bilinear", " cropped")
}


def with_preparation(preparation: clip.Preparation) -> clip.CLIP:
    config = dataclasses.replace(CONFIG, preparation=preparation)
    return clip.from_state_dict(hugging_face_state(), config, "hugging_face", "seeded")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_save_then_load(dtype: Any, tmp_path: Path) -> None:
    weights.save(tmp_path, small_model(), TOKENIZER, dtype)
    loaded, tokenizer = weights.load(str(tmp_path))
    rounded = [np.asarray(leaf, dtype).astype("f4") for leaf in jax.tree.leaves(small_model())]
    structure = jax.tree.structure(small_model())
    assert_same(loaded, jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in rounded]))
    assert tokenizer.to_str() == TOKENIZER.to_str()
    assert tokenizer.encode("a dog").ids == [514, VOCABULARY["a</w>"], VOCABULARY["dog</w>"], 515]


@pytest.mark.parametrize("name", [*PROCESSORS])
def test_saved_processor(name: str, tmp_path: Path) -> None:
    """The files with which `transformers` gave the recorded pixels, and the same model again."""
    preparation = formats.read_preparation(Path("preprocessor_config.json"), PROCESSORS[name], 16)
    model = with_preparation(preparation)
    weights.save(tmp_path, model, TOKENIZER)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == PROCESSORS[name]
    assert_same(weights.load(str(tmp_path))[0], model)


def edit(path: Path, *keys: str, value: Any) -> None:
    """Sets one value of a JSON file."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def add_an_old_index(folder: Path) -> None:
    """The single file is read even if the index of other weights lies beside it."""
    (folder / "model.safetensors.index.json").write_text("{}")


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


def store_the_scale_as_a_vector(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["logit_scale"] = state["logit_scale"][None]
    save_file(state, folder / "model.safetensors")


def forget_the_start_token(folder: Path) -> None:
    """The tokenizer's counts."""
    edit(folder / "config.json", "text_config", "bos_token_id", value=7)


@pytest.mark.parametrize(
    "change",
    [
        shard,
        add_an_old_index,
        split_the_tokenizer,
        let_the_tokenizer_shorten,
        add_position_ids,
        use_pytorch,
        use_legacy_tokens,
        store_the_scale_as_a_vector,
        forget_the_start_token,
    ],
)
def test_folder_of_another_kind(change: Callable[[Path], None], folder: Path) -> None:
    """The same model and tokenizer, written in another way."""
    change(folder)
    model, tokenizer = weights.load(str(folder))
    assert_same(model, small_model())
    assert tokenizer.encode("dog dog dog").ids == [514, *[VOCABULARY["dog</w>"]] * 3, 515]


def test_short_configuration_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    gelu = {"hidden_act": "gelu"}
    content = {"vision_config": gelu, "text_config": None, "text_config_dict": gelu}
    path.write_text(json.dumps(content))
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
    images = clip.Preparation(16, mean=(0.5, 0.5, 0.5), deviation=(0.25, 0.25, 0.25))
    config = clip.Config(images, 8, vision, text, 32, 12, 516, 514, 515, "gelu", 1e-5)
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
    (said,) = capsys.readouterr().err.splitlines()
    assert "not specify activation and heads (taken: quick_gelu, not gelu; 1 and 2 heads)" in said
    assert "nor how images are prepared (taken: OpenAI's mean, deviation" in said
    save_file(state | {"ema.visual.class_embedding": np.ones(64)}, path)
    refused(lambda: weights.load(str(path)), path, f"hold 2 models, at ema., {prefix or 'its top'}")


HALVES = {"mean": (0.5, 0.5, 0.5), "deviation": (0.25, 0.25, 0.5)}
STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.5]}
ZERO_AND_TWO = {"mean": (0.0, 0.0, 0.0), "deviation": (2.0, 2.0, 2.0)}
UNUSED = {"do_pad": False, "processor_class": "CLIPProcessor", "crop_pct": None}
BILINEAR = {"resample": 2}
SQUASHED = {"squash": True, "resample": 2}
PREPARATIONS = [
    ("preprocessor_config.json", STATISTICS, HALVES),
    ("processor_config.json", {"image_processor": STATISTICS}, HALVES),
    ("preprocessor_config.json", {"image_mean": 0, "image_std": 2}, ZERO_AND_TWO),
    ("preprocessor_config.json", {"size": 18, "crop_size": 16, **UNUSED}, {"margin": 2}),
    ("preprocessor_config.json", {"size": {"shortest_edge": 16}, "do_rescale": True}, {}),
    ("preprocessor_config.json", {"size": [16, 16], "resample": 2}, SQUASHED),
    ("open_clip_config.json", {"preprocess_cfg": {"interpolation": "bilinear"}}, BILINEAR),
]


@pytest.mark.parametrize(("name", "content", "expected"), PREPARATIONS)
def test_preparation(
    name: str, content: Any, expected: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the one file specifies, with OpenAI's values for the rest; without it, a warning."""
    (folder / "preprocessor_config.json").unlink()
    assert weights.load(str(folder))[0].config == CONFIG
    assert "not specify how images are prepared (taken: OpenAI's mean" in capsys.readouterr().err
    (folder / name).write_text(json.dumps(content))
    found = weights.load(str(folder))[0].config.preparation
    assert found == clip.Preparation(16, **expected)
    assert capsys.readouterr().err == ""


def test_the_files_of_the_own_format_count_first(open_clip_folder: Path, folder: Path) -> None:
    """In `transformers`, what is nested in processor_config.json hides the older file."""
    (open_clip_folder / "preprocessor_config.json").write_text(json.dumps(STATISTICS))
    assert_same(weights.load(str(open_clip_folder))[0], open_clip_model())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": STATISTICS}))
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    expected = clip.Preparation(16, **HALVES)
    assert weights.load(str(folder))[0].config.preparation == expected


@pytest.mark.parametrize(("width", "heads"), [(1280, 16), (1408, 16), (1664, 16), (1024, 16)])
def test_heads_of_published_sizes(width: int, heads: int) -> None:
    """ViT-H/14, g/14 and bigG/14 of open_clip, and ViT-L/14 with heads of width 64."""
    vision = clip.Transformer(width, 1, heads, 8)
    config = dataclasses.replace(CONFIG, vision=vision)
    shapes = eqx.filter_eval_shape(clip.CLIP, config, jax.random.key(0))
    entries = eqx.filter_eval_shape(clip.to_state_dict, shapes, "openai")
    state = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in entries.items()}
    assert formats.openai_config(state, "here").vision == vision


# ----------------------------------------------------------------------------------- files refused

WRONG_VALUES = {
    "config.json": [
        ("text_config", [1], "TypeError"),
        ("model_type", "siglip", "it describes a siglip"),
        ("projection_dim", None, "embedding_size is None, not a positive whole number"),
        ("text_config hidden_size", "128", "text.width is '128', not a positive whole number"),
        ("vision_config image_size", [16, 16], "image_size is [16, 16], not a positive"),
        ("vision_config patch_size", 0, "patch_size is 0, not a positive whole number"),
        ("vision_config num_hidden_layers", 1.5, "vision.layers is 1.5, not a positive"),
        ("text_config num_attention_heads", 3, "text.width is 128, no multiple of its 3 heads"),
        ("text_config hidden_act", "gelu", "the towers have hidden_act 'quick_gelu' and 'gelu'"),
        ("text_config layer_norm_eps", 1e-6, "the towers have layer_norm_eps 1e-05 and 1e-06"),
        ("text_config eos_token_id", 516, "'end_token': 516} are not in the vocabulary"),
        ("text_config eos_token_id", [515], "end_token is [515], not the id of a token"),
        ("text_config bos_token_id", None, "start_token is None, not the id of a token"),
        ("*_config hidden_act", "relu", "activation is 'relu', not quick_gelu or gelu"),
        ("*_config hidden_act", ["gelu"], "activation is ['gelu'], not quick_gelu or gelu"),
        ("*_config layer_norm_eps", "0", "layer_norm_epsilon is '0', not a fraction"),
    ],
    "open_clip_config.json": [
        ("model_cfg vision_cfg timm_model_name", "x", "timm_model_name 'x' is not supported"),
        ("model_cfg vision_cfg pool_type", "avg", "pool_type 'avg' is not supported"),
        ("model_cfg text_cfg hf_model_name", "y", "hf_model_name 'y' is not supported"),
        ("model_cfg multimodal_cfg", {"a": 3}, "multimodal_cfg {'a': 3} is not supported"),
        ("model_cfg vision_cfg layers", [3, 4], "vision.layers is [3, 4], not a positive"),
        ("model_cfg text_cfg heads", 3, "text.width is 128, no multiple of its 3 heads"),
        ("model_cfg text_cfg", None, "TypeError"),
        ("preprocess_cfg mean", [0.5, 0.5], "mean [0.5, 0.5] is not supported"),
        ("preprocess_cfg std", 0, "std 0 is not supported"),
        ("preprocess_cfg mode", "L", "mode 'L' is not supported"),
        ("preprocess_cfg size", 224, "size 224 is not supported"),
        ("preprocess_cfg size", [16, 24], "size [16, 24] is not supported"),
        ("preprocess_cfg resize_mode", "longest", "resize_mode 'longest' is not supported"),
        ("preprocess_cfg interpolation", "random", "interpolation 'random' is not supported"),
    ],
    "preprocessor_config.json": [
        ("image_std", [0.5, 0.5, 0], "image_std [0.5, 0.5, 0] is not supported"),
        ("image_mean", ["a", "b", "c"], "image_mean ['a', 'b', 'c'] is not supported"),
        ("image_mean", [0.5, float("nan"), 0.5], "image_mean [0.5, nan, 0.5] is not supported"),
        ("do_normalize", False, "do_normalize False is not supported"),
        ("do_rescale", False, "do_rescale False is not supported"),
        ("do_resize", False, "do_resize False is not supported"),
        ("do_center_crop", False, "do_center_crop False is not supported"),
        ("rescale_factor", 1 / 127.5, "rescale_factor 0.00784"),
        ("resample", 1, "resample 1 is not supported"),
        ("resample", "bicubic", "resample 'bicubic' is not supported"),
        ("size", 15, "size 15 is not supported"),
        ("size", {"longest_edge": 16}, "size {'longest_edge': 16} is not supported"),
        ("size", {"height": 16, "width": 24}, "'width': 24} is not supported"),
        ("size", [], "size [] is not supported"),
        ("crop_size", 18, "crop_size 18 is not supported"),
        ("crop_pct", 0.9, "crop_pct 0.9 is not supported"),
        ("do_pad", True, "do_pad True is not supported"),
        ("image_processor_type", "SiglipImageProcessor", "'SiglipImageProcessor' is not supported"),
    ],
}


@pytest.mark.parametrize(
    ("name", "keys", "value", "outcome"),
    [(name, *row) for name, rows in WRONG_VALUES.items() for row in rows],
)
def test_wrong_value(
    name: str, keys: str, value: Any, outcome: str, request: pytest.FixtureRequest
) -> None:
    """`*` stands for both towers."""
    is_open_clip = name == "open_clip_config.json"
    folder = request.getfixturevalue("open_clip_folder" if is_open_clip else "folder")
    for tower in ("text", "vision"):
        edit(folder / name, *keys.replace("*", tower).split(), value=value)
    refused(lambda: weights.load(str(folder)), folder / name, outcome)


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
    (INDEX, b"", f"{INDEX} cannot be read"),
    (INDEX, b"{}", f"{INDEX} cannot be read (KeyError: 'weight_map')"),
    (INDEX, b'{"weight_map": []}', f"{INDEX} cannot be read (AttributeError"),
    (INDEX, b'{"weight_map": {"a": 3}}', f"{INDEX} cannot be read (TypeError"),
    (INDEX, b'{"weight_map": {"a": "b.bin"}}', "b.bin cannot be read (FileNotFoundError"),
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


WRONG_ENTRIES = {
    "hugging_face": [
        ("text_model.embeddings.token_embedding.weight", None, "lacks text_model.embeddings.token"),
        ("text_projection.weight", np.ones((40, 128)), "has shape (40, 128), not (32, 128)"),
        ("text_projection.weight", np.full((32, 128), np.inf), "projection.weight is not finite"),
        ("text_projection.weight", np.ones((32, 128), int), "projection.weight has dtype int64"),
        ("logit_scale", np.array(np.nan), "logit_scale is not finite"),
        (
            "logit_scale",
            np.array(100.0),
            "logit_scale is 100, not a logarithm: store its logarithm",
        ),
        ("head.weight\n", np.ones(3), r"unexpected 'head.weight\n'"),
    ],
    "openai": [
        ("visual.conv1.weight", None, "lacks visual.conv1.weight"),  # as in OpenAI's ResNets
        ("visual.conv1.weight", np.ones((64, 3, 0, 0)), "conv1.weight has shape (64, 3, 0, 0)"),
        ("visual.positional_embedding", np.ones((0, 64)), "embedding has shape (0, 64)"),
        ("visual.positional_embedding", np.ones((1, 64)), "image_size is 0, not a positive"),
        ("visual.positional_embedding", np.ones((6, 64)), "has shape (6, 64), not (5, 64)"),
        ("token_embedding.weight", np.ones(516), "token_embedding.weight has shape (516,)"),
        ("text_projection", np.ones(64), "text_projection has shape (64,)"),
        ("transformer.resblocks.0.mlp.c_fc.weight", np.ones((192, 48)), "no multiple of 64"),
        ("transformer.resblocks.1.ln_1.bias", np.ones(128), "lacks transformer.resblocks.1.ln_1."),
    ],
}


@pytest.mark.parametrize(
    ("style", "name", "array", "outcome"),
    [(style, *row) for style, rows in WRONG_ENTRIES.items() for row in rows],
)
def test_wrong_entry(
    style: str, name: str, array: np.ndarray | None, outcome: str, folder: Path
) -> None:
    state = {**arrays_of(small_model(), style), name: array}
    if array is None:
        del state[name]
    is_folder = style == "hugging_face"
    path = folder if is_folder else folder / "model.safetensors"
    save_file(state, folder / "model.safetensors")
    refused(lambda: weights.load(str(path)), path, outcome)


@pytest.mark.parametrize("style", ["hugging_face", "openai"])
def test_every_mismatch_is_reported_at_once(style: str) -> None:
    state = arrays_of(small_model(), style)
    gone, short, *_ = state
    state |= {"head": state.pop(gone), short: state[short][:1, None]}
    outcomes = (f"lacks {gone}", "unexpected 'head'", f"{short} has shape (1, 1")
    refused(lambda: clip.from_state_dict(state, CONFIG, style, "FILE"), "FILE", *outcomes)


# -------------------------------------------------------------------- names and tokenizers refused


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


NAMES = [
    ("ViT-B-16", "unknown model preset 'ViT-B-16': did you mean ViT-"),
    ("ViTL14", "unknown model preset 'ViTL14': did you mean ViT-"),
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
    for key, value in {"vocab_size": 500, "bos_token_id": 6, "eos_token_id": 7}.items():
        edit(folder / "config.json", "text_config", key, value=value)
    outcomes = ("has 516 tokens, of 500 that", "ends texts with token 515, the model with 7")
    refused(lambda: weights.load(str(folder)), folder, *outcomes)


def test_file_without_a_tokenizer(empty_hub: None, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    repository = hub.OPENAI["ViT-B/32"]
    refused(lambda: weights.load(str(path)), repository, "tokenizer.json elsewhere, put it at")
    vocabulary_file(tmp_path)
    refused(lambda: weights.load(str(path)), path, "has 49408 tokens, of 516")
    (tmp_path / formats.VOCABULARY_FILE).write_bytes(gzip.compress(b"header\n! !\na a"))
    refused(lambda: weights.load(str(path)), tmp_path, "does not contain 48894 merges")


# --------------------------------------------------------------------------------- corrupted bytes


@EXAMPLES
def test_any_bytes_in_safetensors(examples: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    places = range(8 + int.from_bytes(path.read_bytes()[:8], "little"))

    def read_file() -> clip.CLIP:
        return clip.from_state_dict(read_weights(path), CONFIG, "hugging_face", str(path))

    check_mutations(examples, path, read_file, places=places)


@EXAMPLES
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_any_bytes_in_a_configuration(
    name: str, examples: int, request: pytest.FixtureRequest
) -> None:
    """Any change is refused, or gives sizes that are positive and statistics that are finite."""
    is_open_clip = name == "open_clip_config.json"
    folder = request.getfixturevalue("open_clip_folder" if is_open_clip else "folder")

    def read_configuration() -> clip.Config:
        if is_open_clip:
            config = formats.open_clip_config(folder / name)
        else:
            config = formats.hugging_face_config(folder / "config.json")
        preparation = formats.find_preparation(folder, config.image_size, is_open_clip)
        return dataclasses.replace(config, preparation=preparation or config.preparation)

    def check(config: clip.Config) -> None:
        sizes = [*vars(config.vision).values(), *vars(config.text).values()]
        sizes += [config.image_size, config.patch_size, config.embedding_size]
        assert all(type(size) is int and size > 0 for size in sizes)
        preparation = config.preparation
        assert np.all(np.isfinite([preparation.mean, preparation.deviation]))
        assert min(preparation.deviation) > 0 and preparation.margin >= 0
        assert preparation.resample in (2, 3)

    check_mutations(examples, folder / name, read_configuration, check)


@EXAMPLES
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_any_bytes_in_a_tokenizer(name: str, examples: int, folder: Path) -> None:
    """A tokenizer that can be loaded can encode, as `clip.tokenize` does."""
    if name != "tokenizer.json":
        split_the_tokenizer(folder)

    def check(tokenizer: Tokenizer) -> None:
        texts = ["dog", "a photo of a dog.", "\U0001f9b4"]
        tokenizer.encode_batch(texts, add_special_tokens=False)

    check_mutations(examples, folder / name, lambda: weights.hugging_face_tokenizer(folder), check)


@EXAMPLES
def test_any_bytes_in_openais_vocabulary(examples: int, tmp_path: Path) -> None:
    """Changes the compressed file, whose checksum fails, and less often the text inside."""
    vocabulary_file(tmp_path)
    path = tmp_path / formats.VOCABULARY_FILE
    text = tmp_path / "text"
    text.write_bytes(gzip.decompress(path.read_bytes()))

    def check(tokenizer: Tokenizer) -> None:
        assert tokenizer.get_vocab_size() == 49408

    def read_text() -> Tokenizer:
        path.write_bytes(gzip.compress(text.read_bytes(), 1))
        return weights.openai_tokenizer(path)

    check_mutations(examples, path, lambda: weights.openai_tokenizer(path), check)
    check_mutations(examples // 10, text, read_text, check)
