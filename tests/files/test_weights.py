"""Reading and writing weights: handwritten PyTorch archives, Hugging Face folders, and files that must be refused."""

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
from conftest import EXAMPLES, shared
from helpers import (
    CONFIG,
    MERGES,
    TOKENIZER,
    VOCABULARY,
    Build,
    Call,
    Global,
    New,
    Stored,
    archive,
    described,
    entries,
    hugging_face_state,
    module,
    openai_state,
    pickled,
    rebuilt,
    refused,
    small_model,
    state_dict,
    vocabulary_file,
    write,
)
from huggingface_hub import constants
from mutations import read_unless_refused, with_mutations
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

import clip
from support import weights
from support.weights import archives, hub


def assert_same(actual: clip.CLIP, expected: clip.CLIP) -> None:
    """Compares all bits of the weights, and the configurations."""
    assert actual.config == expected.config
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, jnp.float32)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# ------------------------------------------------------------------------------------------------- archives by hand


def read(path: Path) -> clip.CLIP:
    """Reads an archive as `load` does, without the tokenizer."""
    state = archives.read_torch_archive(path)
    return clip.from_state_dict(state, weights.openai_config(state, str(path)), "openai", str(path))


@pytest.mark.parametrize("tree", [state_dict, module])
@pytest.mark.parametrize("prefix", ["archive/", "x/y/", ""])
def test_archive(tree: Callable, prefix: str, tmp_path: Path) -> None:
    """Both kinds of archive, saved on a GPU in mixed precision, with the integers in OpenAI's files."""
    integers = {name: np.array(8) for name in ("input_resolution", "context_length", "vocab_size")}
    actual = read(
        write(tmp_path / "clip.pt", archive(openai_state() | integers, tree, prefix, "cuda:0"))
    )
    assert actual.config == CONFIG
    for name, array in clip.to_state_dict(actual, "openai").items():
        assert np.asarray(array).tobytes() == openai_state()[name].astype(np.float32).tobytes(), (
            name
        )


def test_state_dict_attributes_are_ignored(tmp_path: Path) -> None:
    """The `_metadata` attribute of a state dict contains no tensors."""
    array = np.arange(3, dtype=np.float32)
    tree = Build(Call(Global("collections OrderedDict"), ()), {"_metadata": {"": {"version": 1}}})
    path = write(
        tmp_path / "clip.pt",
        entries({"a": described("0", array), "b": tree}, {"0": array.tobytes()}),
    )
    tensors = archives.read_torch_archive(path)
    assert list(tensors) == ["a"]
    np.testing.assert_array_equal(tensors["a"], array)


def test_strides_and_offsets(tmp_path: Path) -> None:
    """Views of storages that tensors share have the right values, in every floating-point dtype."""
    numbers = np.arange(24, dtype=np.float32)
    single, brain = Stored("0", "FloatStorage", 24), Stored("1", "BFloat16Storage", 24)
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
    }
    storages = dict(
        enumerate([numbers, numbers.astype(jnp.bfloat16), *map(numbers.astype, ("f2", "f8"))])
    )
    path = write(
        tmp_path / "a.pt",
        entries(tree, {str(key): array.tobytes() for key, array in storages.items()}),
    )
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
    }
    tensors = archives.read_torch_archive(path)
    assert tensors.keys() == expected.keys()
    for name, array in tensors.items():
        assert array.shape == expected[name].shape
        np.testing.assert_array_equal(array.astype(np.float32), expected[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_other_precisions_become_float32(dtype: Any) -> None:
    state = {name: array.astype(dtype) for name, array in hugging_face_state().items()}
    actual = clip.from_state_dict(state, CONFIG, "hugging_face", "seeded")
    for name, array in clip.to_state_dict(actual, "hugging_face").items():
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, state[name].astype(np.float32))


def test_real_archive_and_folder_agree() -> None:
    archive, tokenizer = weights.load(str(shared("weights/pacs-clip/openai.pt")))
    folder, other = weights.load(str(shared("weights/pacs-clip/hf")))
    assert_same(archive, folder)
    assert archive.config.vision == clip.Transformer(128, 5, 2, 512)
    assert tokenizer.get_vocab() == other.get_vocab()


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("style", ["hugging_face", "openai"])
def test_round_trip(style: str) -> None:
    state = {
        name: np.asarray(array) for name, array in clip.to_state_dict(small_model(), style).items()
    }
    assert_same(clip.from_state_dict(state, CONFIG, style, "here"), small_model())


def test_hugging_face_names_and_layout() -> None:
    state = clip.to_state_dict(small_model(), "hugging_face")
    assert state.keys() == hugging_face_state().keys()
    for name, array in hugging_face_state().items():
        assert np.asarray(state[name]).tobytes() == array.tobytes(), name


def test_openai_names_and_layout() -> None:
    """Query, key and value are one entry, in that order; projections are transposed; the rest is unchanged."""
    source, state = hugging_face_state(), clip.to_state_dict(small_model(), "openai")
    expected = {
        "visual.proj": source["visual_projection.weight"].T,
        "text_projection": source["text_projection.weight"].T,
        "visual.conv1.weight": source["vision_model.embeddings.patch_embedding.weight"],
        "visual.ln_pre.bias": source["vision_model.pre_layrnorm.bias"],
        "positional_embedding": source["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": source["text_model.final_layer_norm.weight"],
    }
    blocks = [("visual.transformer", "vision_model", 0), ("visual.transformer", "vision_model", 1)]
    for prefix, tower, layer in [*blocks, ("transformer", "text_model", 0)]:
        block, other = f"{prefix}.resblocks.{layer}", f"{tower}.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            stacked = [source[f"{other}.self_attn.{name}_proj.{kind}"] for name in ("q", "k", "v")]
            expected[f"{block}.attn.in_proj_{kind}"] = np.concatenate(stacked)
            expected[f"{block}.attn.out_proj.{kind}"] = source[f"{other}.self_attn.out_proj.{kind}"]
            expected[f"{block}.mlp.c_fc.{kind}"] = source[f"{other}.mlp.fc1.{kind}"]
            expected[f"{block}.mlp.c_proj.{kind}"] = source[f"{other}.mlp.fc2.{kind}"]
            expected[f"{block}.ln_1.{kind}"] = source[f"{other}.layer_norm1.{kind}"]
            expected[f"{block}.ln_2.{kind}"] = source[f"{other}.layer_norm2.{kind}"]
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)
    rest = {
        "visual.class_embedding",
        "visual.positional_embedding",
        "visual.ln_pre.weight",
        "visual.ln_post.weight",
    }
    rest |= {"visual.ln_post.bias", "ln_final.bias", "token_embedding.weight", "logit_scale"}
    assert state.keys() == expected.keys() | rest


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "not" / "yet"
    weights.save(folder, small_model(), TOKENIZER)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved folder, for tests that damage it."""
    return shutil.copytree(saved, tmp_path / "clip")


def shard(folder: Path) -> None:
    """Splits `model.safetensors` into two shards and an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def test_save_then_load(folder: Path) -> None:
    loaded, tokenizer = weights.load(str(folder))
    assert_same(loaded, small_model())
    assert tokenizer.to_str() == TOKENIZER.to_str()
    assert tokenizer.encode("a dog").ids == [514, VOCABULARY["a</w>"], VOCABULARY["dog</w>"], 515]


def test_save_again_over_shards(folder: Path) -> None:
    """The single file is read even if an old index lies beside it."""
    shard(folder)
    other = eqx.tree_at(lambda model: model.logit_scale, small_model(), jnp.float32(1.25))
    weights.save(folder, other, TOKENIZER)
    assert_same(weights.load(str(folder))[0], other)


def test_save_a_model_of_open_clip(tmp_path: Path) -> None:
    """Its activation and statistics are not OpenAI's."""
    weights.save(tmp_path, open_clip_model(), TOKENIZER)
    assert_same(weights.load(str(tmp_path))[0], open_clip_model())


def test_symbols_of_bytes() -> None:
    """Against the library's, which have no order: theirs is that of code points."""
    assert weights.byte_symbols() == sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_save_in_half_precision(dtype: Any, tmp_path: Path) -> None:
    weights.save(tmp_path, small_model(), TOKENIZER, dtype)
    rounded = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype).astype(np.float32)), small_model()
    )
    assert_same(weights.load(str(tmp_path))[0], rounded)


def test_sharded_folder(folder: Path) -> None:
    shard(folder)
    assert_same(weights.load(str(folder))[0], small_model())


def test_vocabulary_and_merges_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in MERGES)
    )
    assert weights.load(str(folder))[1].to_str() == TOKENIZER.to_str()


def edit(folder: Path, keys: tuple[str, ...], value: Any) -> None:
    """Sets one value of config.json, or removes it if `value` is `...`."""
    path = folder / "config.json"
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is ...:
        del inner[keys[-1]]
    path.write_text(json.dumps(content))


def test_legacy_end_token_means_the_highest_id(folder: Path) -> None:
    edit(folder, ("text_config", "bos_token_id"), 0)
    edit(folder, ("text_config", "eos_token_id"), 2)
    assert_same(weights.load(str(folder))[0], small_model())


def test_position_ids_are_ignored(folder: Path) -> None:
    """Older folders contain them, as integers."""
    ids = {
        f"{tower}_model.embeddings.position_ids": np.arange(5)[None] for tower in ("text", "vision")
    }
    save_file(load_file(folder / "model.safetensors") | ids, folder / "model.safetensors")
    assert_same(weights.load(str(folder))[0], small_model())


def test_short_configuration_has_the_defaults_of_transformers(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(
        '{"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config_dict": {"hidden_act": "gelu"}}'
    )
    assert weights.hugging_face_config(path) == dataclasses.replace(
        clip.PRESETS["ViT-B/32"], activation="gelu"
    )
    path.write_text("{}")
    assert weights.hugging_face_config(path) == clip.PRESETS["ViT-B/32"]


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 16,
            "layers": 2,
            "width": 64,
            "patch_size": 8,
            "head_width": 32,
            "mlp_ratio": 3,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 516,
            "width": 128,
            "heads": 4,
            "layers": 2,
            "mlp_ratio": 4.3,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def open_clip_model() -> clip.CLIP:
    """A model with exact GELU, heads that are not 64 wide, and statistics of its own."""
    vision, text = clip.Transformer(64, 2, 2, 192), clip.Transformer(128, 2, 4, 550)
    config = clip.Config(
        16, 8, vision, text, 32, 12, 516, 514, 515, "gelu", 1e-5, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    )  # fmt: skip
    return clip.CLIP(config, jax.random.key(3))


def open_clip_state() -> dict[str, np.ndarray]:
    return {
        name: np.array(array, order="C")
        for name, array in clip.to_state_dict(open_clip_model(), "openai").items()
    }


@pytest.mark.parametrize("kind", ["safetensors", "bin", "file", "custom text"])
def test_open_clip(kind: str, tmp_path: Path) -> None:
    """The configuration specifies activation, heads, widths and statistics; the weights do not."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    state = open_clip_state()
    if kind == "custom text":
        whole = ("visual.", "logit_scale")
        state = {
            name if name.startswith(whole) else f"text.{name}": array
            for name, array in state.items()
        }
    if kind == "bin":
        write(tmp_path / "open_clip_pytorch_model.bin", archive(state))
    else:
        save_file(state, tmp_path / "open_clip_model.safetensors")
    path = tmp_path / "open_clip_model.safetensors" if kind == "file" else tmp_path
    assert_same(weights.load(str(path))[0], open_clip_model())


@pytest.mark.parametrize(
    ("section", "change", "word"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}, "timm_model_name 'vit_base'"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type 'avg'"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "layers is [3, 4, 6, 3]"),
        ("text_cfg", {"heads": 3}, "no multiple of its 3 heads"),
        (None, {"multimodal_cfg": {"width": 3}}, "multimodal_cfg"),
        (None, {"text_cfg": None}, "open_clip_config.json"),
    ],
)
def test_open_clip_models_that_are_not_supported(
    section: str | None, change: dict, word: str, tmp_path: Path
) -> None:
    content = json.loads(json.dumps(OPEN_CLIP))
    (content["model_cfg"][section] if section else content["model_cfg"]).update(change)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    refused(lambda: weights.load(str(tmp_path)), "open_clip_config.json", word)


def test_what_a_file_does_not_specify_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(
        {name: np.array(array) for name, array in openai_state().items()},
        tmp_path / "clip.safetensors",
    )
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    weights.load(str(tmp_path / "clip.safetensors"))
    assert (
        "does not specify activation and heads, taken: quick_gelu (not gelu)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("prefix", ["module.", "state_dict.module.", "model.clip."])
def test_checkpoints_of_training(prefix: str, tmp_path: Path) -> None:
    """A state dict is found under the keys of wrappers, beside an optimizer's tensors."""
    inner = clip.to_state_dict(small_model(), "openai")
    state = {f"{prefix}{name}": np.array(array, order="C") for name, array in inner.items()}
    state["optimizer.state.0.exp_avg"] = np.ones(3, np.float32)
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    save_file(state, tmp_path / "epoch.safetensors")
    assert_same(weights.load(str(tmp_path / "epoch.safetensors"))[0], small_model())
    save_file(state | {"ema.visual.class_embedding": np.ones(64)}, tmp_path / "epoch.safetensors")
    refused(
        lambda: weights.load(str(tmp_path / "epoch.safetensors")), f"2 models, at ema., {prefix}"
    )


def test_pytorch_file_in_a_folder(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", archive(state))
    assert_same(weights.load(str(folder))[0], small_model())


@pytest.mark.parametrize(
    ("name", "section"),
    [("preprocessor_config.json", None), ("processor_config.json", "image_processor")],
)
def test_image_statistics_of_the_processor(name: str, section: str | None, folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()

    def write_statistics(**changes: Any) -> None:
        content = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.5]} | changes
        (folder / name).write_text(json.dumps({section: content} if section else content))

    write_statistics()
    config = weights.load(str(folder))[0].config
    assert (config.image_mean, config.image_deviation) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.5))
    for changes in (
        {"image_std": [0.5, 0.5, 0]},
        {"image_mean": 0.5},
        {"image_mean": ["a", "b", "c"]},
        {"do_normalize": False},
        {"do_rescale": False},
    ):
        write_statistics(**changes)
        refused(lambda: weights.load(str(folder)), folder / name)


def test_folder_without_text_tower(folder: Path) -> None:
    state = {
        name: array
        for name, array in load_file(folder / "model.safetensors").items()
        if name.startswith("vis")
    }
    save_file(state, folder / "model.safetensors")
    refused(lambda: weights.load(str(folder)), folder, "have no text tower")


@pytest.mark.parametrize(
    ("name", "value"),
    [("logit_scale", 100.0), ("logit_scale", np.nan), ("text_projection.weight", np.inf)],
)
def test_values_that_cannot_be(name: str, value: float, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state[name] = np.full_like(state[name], value)
    save_file(state, folder / "model.safetensors")
    refused(
        lambda: weights.load(str(folder)), name, "not finite" if not np.isfinite(value) else "exp()"
    )


def test_tokenizer_with_other_special_tokens(folder: Path) -> None:
    edit(folder, ("text_config", "bos_token_id"), 7)
    assert weights.load(str(folder))[0].config.start_token == 514  # the tokenizer's
    edit(folder, ("text_config", "eos_token_id"), 7)
    refused(
        lambda: weights.load(str(folder)), "ends texts with token 515, its configuration says 7"
    )


def test_tokenizer_that_shortens_and_pads(folder: Path) -> None:
    """Its file may say so, but a text that is too long is to be refused or shortened by `clip.tokenize`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    _, loaded = weights.load(str(folder))
    assert loaded.encode("dog dog dog").ids == [514, *[VOCABULARY["dog</w>"]] * 3, 515]


# ------------------------------------------------------------------------------------------------- archives refused


def test_missing_archive(tmp_path: Path) -> None:
    refused(
        lambda: weights.load(str(tmp_path / "no.pt")),
        tmp_path / "no.pt",
        "do not exist",
        "ViT-B/16",
    )


@pytest.mark.parametrize("length", [0, 1, 30, 5_000, 0.5, 0.9, -30, -1])
def test_truncated_archive(length: float, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    refused(lambda: read(path), path, "not a complete zip archive")


@pytest.mark.parametrize(
    "content",
    [b"no zip", pickle.dumps({"a": 1}, 2), b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18)],
)
def test_not_an_archive(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    path.write_bytes(content)
    refused(lambda: read(path), path, "zip")


def test_zip_of_something_else(tmp_path: Path) -> None:
    refused(
        lambda: read(write(tmp_path / "a.pt", {"a/readme.txt": b"hello"})),
        tmp_path / "a.pt",
        "data.pkl",
    )


def test_flipped_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(lambda: read(path), path, "CRC")


@pytest.mark.parametrize("entry", ["archive/data.pkl", "archive/data/3"])
@pytest.mark.parametrize("damage", ["compressed", "missing", "empty"])
def test_entry_that_cannot_be_read(entry: str, damage: str, tmp_path: Path) -> None:
    files = archive(openai_state())
    if damage == "missing":
        del files[entry]
    elif damage == "empty":
        files[entry] = b""
    path = write(tmp_path / "clip.pt", files, entry if damage == "compressed" else "")
    refused(lambda: read(path), path, entry if damage == "compressed" else "")


def write_tree(tmp_path: Path, tree: Any) -> Path:
    """Writes an archive of `tree` whose storage 0 contains 6 float32 numbers."""
    return write(
        tmp_path / "clip.pt", entries(tree, {"0": np.arange(6, dtype=np.float32).tobytes()})
    )


@pytest.mark.parametrize("place", ["call", "module", "value"])
@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "torch.jit._pickle build_intlist",
        "posix system",
        "builtins eval",
        "__builtin__ eval",
        "builtins getattr",
        "torch load",
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_tensor",
        "numpy.core.multiarray _reconstruct",
        "numpy dtype",
        "copyreg _reconstructor",
        "collections OrderedDict.__init__",
        "__torch__evil system",
    ],
)
def test_forbidden_global_is_refused_by_name(name: str, place: str, tmp_path: Path) -> None:
    function = Global(name)
    tree = {"call": Call(function, ("",)), "module": Build(New(function), {}), "value": function}[
        place
    ]
    path = write_tree(tmp_path, {"a": tree})
    refused(lambda: read(path), path, repr(name.replace(" ", ".")), "do not trust")


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


FLOATS = Stored("0", "FloatStorage", 6)


@pytest.mark.parametrize(
    "tensor",
    {
        "stride": rebuilt(FLOATS, 0, (2, 3), (4, 1)),
        "offset": rebuilt(FLOATS, 1, (2, 3), (3, 1)),
        "offset far": rebuilt(FLOATS, 2**62, (2,), (1,)),
        "size": rebuilt(FLOATS, 0, (7,), (1,)),
        "size far": rebuilt(FLOATS, 0, (2**62, 4), (4, 1)),
        "negative size": rebuilt(FLOATS, 0, (-2, 3), (3, 1)),
        "two negative sizes": rebuilt(FLOATS, 0, (-2, -3), (3, 1)),
        "negative stride": rebuilt(FLOATS, 5, (6,), (-1,)),
        "negative offset": rebuilt(FLOATS, -1, (2,), (1,)),
        "bomb": rebuilt(FLOATS, 0, (10**12,), (0,)),
        "axes": rebuilt(FLOATS, 0, (2, 3), (1,)),
        "fraction": rebuilt(FLOATS, 0, (2.0, 3), (3, 1)),
        "text": rebuilt(FLOATS, 0, "23", "31"),
        "short storage": rebuilt(Stored("0", "FloatStorage", 7), 0, (2, 3), (3, 1)),
        "short for its type": rebuilt(Stored("0", "DoubleStorage", 6), 0, (2,), (1,)),
        "negative storage": rebuilt(Stored("0", "FloatStorage", -1), 0, (2,), (1,)),
        "claims less": rebuilt(Stored("0", "FloatStorage", 5), 0, (2, 3), (3, 1)),
        "no storage": rebuilt(("storage", "FloatStorage"), 0, (2, 3), (3, 1)),
        "missing storage": rebuilt(Stored("1", "FloatStorage", 6), 0, (2, 3), (3, 1)),
        "storage elsewhere": rebuilt(Stored("../version", "ByteStorage", 1), 0, (1,), (1,)),
        "few arguments": Call(Global("torch._utils _rebuild_tensor_v2"), (FLOATS, 0)),
        "called storage": Call(Global("torch FloatStorage"), (6,)),
        "called module": Call(Global("__torch__.os system"), ("true",)),
    }.items(),
    ids=lambda item: item[0],
)
def test_malformed_tensor(tensor: tuple[str, Any], tmp_path: Path) -> None:
    path = write_tree(tmp_path, {"a": tensor[1]})
    refused(lambda: archives.read_torch_archive(path), path, "clip.pt are")


@pytest.mark.parametrize(
    "opcode", [pickle.LONG_BINPUT + b"\xff\xff\xff\x7f", pickle.PUT + b"99999999999\n"]
)
def test_memo_that_would_fill_the_memory(opcode: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", {"archive/data.pkl": b"\x80\x02}" + opcode + b"."})
    refused(lambda: read(path), path, "memo")


@pytest.mark.parametrize(
    "opcodes",
    [
        pickle.BYTEARRAY8 + struct.pack("<Q", 2**36),
        pickle.BINUNICODE8 + struct.pack("<Q", 2**62),
        pickle.LONG4 + b"\xff\xff\xff\x7f",
        pickle.GLOBAL + b"torch\n\xff\n",
        pickle.EMPTY_DICT,
        b"\x80\x09}.",
        b"",
        b"}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dict that contains itself
    ],
)
def test_malformed_pickle(opcodes: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", {"archive/data.pkl": b"\x80\x02" + opcodes})
    refused(lambda: read(path), path, "damaged")


# ------------------------------------------------------------------------------------------ weights that do not fit


@pytest.mark.parametrize("style", ["hugging_face", "openai"])
def test_every_mismatch_is_reported_at_once(style: str) -> None:
    state = {
        name: np.asarray(array) for name, array in clip.to_state_dict(small_model(), style).items()
    }
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


@pytest.mark.parametrize(
    ("name", "array", "word"),
    [
        (
            "visual.conv1.weight",
            None,
            "lacks visual.conv1.weight",
        ),  # OpenAI's ResNets have none of this shape
        (
            "visual.conv1.weight",
            np.zeros((64, 3, 0, 0)),
            "visual.conv1.weight has shape (64, 3, 0, 0)",
        ),
        (
            "visual.positional_embedding",
            np.zeros((0, 64)),
            "visual.positional_embedding has shape (0, 64)",
        ),
        (
            "visual.positional_embedding",
            np.zeros((6, 64)),
            "visual.positional_embedding has shape (6, 64), not (5,",
        ),
        ("token_embedding.weight", np.zeros(64), "token_embedding.weight has shape (64,)"),
        (
            "token_embedding.weight",
            np.zeros((516, 128), int),
            "token_embedding.weight has dtype int64",
        ),
        (
            "transformer.resblocks.0.mlp.c_fc.weight",
            np.zeros((192, 48)),
            "width 48 is no multiple of 64",
        ),
        (
            "transformer.resblocks.1.ln_1.bias",
            np.zeros(128),
            "lacks transformer.resblocks.1.ln_1.weight",
        ),
    ],
)
def test_openai_sizes_that_do_not_fit(
    name: str, array: np.ndarray | None, word: str, tmp_path: Path
) -> None:
    state = openai_state() | {name: array}
    if array is None:
        del state[name]
    path = write(tmp_path / "clip.pt", archive(state))
    refused(lambda: read(path), path, word)


# ---------------------------------------------------------------------------------------- Hugging Face folders refused


@pytest.mark.parametrize(
    ("keys", "value", "word"),
    [
        (("text_config",), [], "configuration"),
        (("model_type",), "siglip", "describes a siglip, not a CLIP"),
        (("projection_dim",), None, "projection_dim is None"),
        (("text_config", "hidden_size"), "128", "hidden_size is '128'"),
        (("vision_config", "image_size"), [16, 16], "image_size is [16, 16]"),
        (("vision_config", "patch_size"), 0, "patch_size is 0"),
        (("vision_config", "num_hidden_layers"), 0, "num_hidden_layers is 0"),
        (("vision_config", "num_hidden_layers"), 1.5, "num_hidden_layers is 1.5"),
        (("text_config", "num_attention_heads"), 3, "no multiple of its 3 heads"),
        (("text_config", "num_attention_heads"), 0, "num_attention_heads is 0"),
        (("text_config", "hidden_act"), "gelu", "one hidden_act"),
        (("text_config", "hidden_act"), ["gelu"], "hidden_act"),
        (("text_config", "layer_norm_eps"), 1e-6, "one layer_norm_eps"),
        (("text_config", "eos_token_id"), 516, "(514, 516)"),
        (("text_config", "eos_token_id"), [515], "eos_token_id"),
        (("text_config", "bos_token_id"), None, "bos_token_id"),
    ],
)
def test_wrong_configuration(keys: tuple[str, ...], value: Any, word: str, folder: Path) -> None:
    edit(folder, keys, value)
    refused(lambda: weights.load(str(folder)), folder / "config.json", word)


@pytest.mark.parametrize("key", ["hidden_act", "layer_norm_eps"])
def test_unsupported_value_in_both_towers(key: str, folder: Path) -> None:
    for tower in ("vision_config", "text_config"):
        edit(folder, (tower, key), "relu")
    refused(lambda: weights.load(str(folder)), folder / "config.json", key, "quick_gelu")


def test_weights_of_another_configuration(folder: Path) -> None:
    edit(folder, ("vision_config", "num_hidden_layers"), 1)
    edit(folder, ("projection_dim",), 40)
    refused(
        lambda: weights.load(str(folder)),
        folder,
        "text_projection.weight has shape (32, 128), not (40, 128)",
        "unexpected 'vision_model.encoder.layers.1.layer_norm1.bias'",
        "and 12 more",
    )


def header(name: str, dtype: str, shape: list[int], size: int) -> bytes:
    """Returns a safetensors file with one tensor of zeros."""
    content = json.dumps(
        {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    ).encode()
    return struct.pack("<Q", len(content)) + content + bytes(size)


BROKEN = {
    "config.json": [None, b"", b"{", b"[]", b"3", b"\xff"],
    "model.safetensors": [
        None,
        b"",
        b"12345678",
        struct.pack("<Q", 2**40) + b"{}",
        header("a", "F8_E4M3", [4], 4),
        header("a", "F32", [4], 8),
        header("a\n", "F32", [1], 4),
        header("a", "NO\nNE", [1], 4),
    ],
    "tokenizer.json": [None, b"", b"{}"],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param(name, content, id=f"{name}-{number}")
        for name, contents in BROKEN.items()
        for number, content in enumerate(contents)
    ],
)
def test_broken_file_is_named(name: str, content: bytes | None, folder: Path) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    refused(lambda: weights.load(str(folder)), folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}']
)
def test_broken_index_is_named(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(content)
    refused(lambda: weights.load(str(folder)), folder / "model.safetensors.index.json")


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (missing := folder / "model-00002-of-00002.safetensors").unlink()
    refused(lambda: weights.load(str(folder)), missing, "do not exist")


# -------------------------------------------------------------------------------------------------------- load refused


@pytest.fixture
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_missing_vocabulary(empty_hub: None, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    refused(lambda: weights.load(str(path)), hub.OPENAI["ViT-B/32"], "tokenizer.json", "put it")


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", archive(openai_state()))
    vocabulary_file(tmp_path)
    refused(lambda: weights.load(str(path)), path, "49408 tokens", "516")


@pytest.mark.parametrize("name", ["ViT-B-16", "vit-b32", "ViTL14"])
def test_unknown_preset(name: str) -> None:
    refused(lambda: weights.load(name), repr(name), "did you mean ViT-", "ViT-L/14@336px")


@pytest.mark.parametrize("name", clip.PRESETS)
def test_preset_that_is_not_in_the_cache(name: str, empty_hub: None) -> None:
    refused(lambda: weights.load(name), hub.OPENAI[name], "model.safetensors", "put it at")


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
    original, intact = archives.read_torch_archive(path), path.read_bytes()
    with zipfile.ZipFile(path) as file:
        places = [*range(file.start_dir, len(intact))]
        for entry in file.infolist():
            places += range(entry.header_offset, entry.header_offset + 30 + len(entry.filename))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tensors = read_unless_refused(lambda: archives.read_torch_archive(path), path)
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
            lambda: clip.from_state_dict(
                archives.read_safetensors(path), CONFIG, "hugging_face", str(path)
            ),
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
            return weights.with_image_statistics(weights.open_clip_config(path), tmp_path)
        return weights.with_image_statistics(
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
    path = tmp_path / weights.VOCABULARY_FILE
    compressed = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        tokenizer = read_unless_refused(lambda: weights.openai_tokenizer(path), path)
        assert tokenizer is None or tokenizer.get_vocab_size() == 49408

    with_mutations(examples, compressed, check)
    with_mutations(
        examples // 10, gzip.decompress(compressed), lambda text: check(gzip.compress(text, 1))
    )
