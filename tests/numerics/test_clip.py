"""Compares the towers, heads and tokenizer of clip.py with PyTorch `transformers` and OpenAI's
tokenizer.
"""

import dataclasses
import functools
import gzip
import json
import re
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from conftest import REFERENCE, shared
from helpers import CONFIG, TOKENIZER, config_of, seeded_model

import clip
from support import errors, weights
from support.errors import InputError
from tools import seeded

FILES = {
    "tiny": "tiny",
    "tiny-gelu": "tiny",
    "heads-80-gelu": "heads-80",
    "vit-b-32": "ViT-B/32",
    "vit-b-16": "ViT-B/16",
    "vit-l-14": "ViT-L/14",
}


def close(actual: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def states(tower: clip.VisionTower | clip.TextTower, x: jax.Array) -> jax.Array:
    """Returns `x` and the output of each block, of the last one for all tokens, too."""
    end, after = jax.lax.scan(lambda x, block: (block(x),) * 2, x, tower.blocks)
    return jnp.concatenate([x[None], after, tower.last(end)[None]])


@pytest.mark.parametrize("file", FILES)
def test_towers_stage_by_stage(file: str) -> None:
    name = FILES[file]
    if name == "ViT-L/14" and psutil.virtual_memory().available < 8e9:
        pytest.skip("ViT-L/14 needs 8 GB of free memory")
    sizes, reference = seeded.ARCHITECTURES[name], np.load(REFERENCE / f"{file}.npz")
    model = seeded_model(name, "gelu" if file.endswith("gelu") else "quick_gelu")
    if name in clip.PRESETS:
        assert model.config == clip.PRESETS[name]

    seen = (
        2 if name in clip.PRESETS else seeded.IMAGES
    )  # images whose stages are compared; their features are, of all

    @eqx.filter_jit
    def vision(tower: clip.VisionTower, images: jax.Array) -> tuple[jax.Array, ...]:
        embeddings = jax.vmap(tower.embed)(clip.standardize(images[:seen], tower))
        after = jax.vmap(states, in_axes=(None, 0))(tower, embeddings)
        return (
            embeddings,
            after,
            jax.vmap(tower.layer_norm_post)(after[:, -1, 0]),
            clip.image_features(tower, images),
        )

    @eqx.filter_jit
    def text(tower: clip.TextTower, ids: jax.Array) -> tuple[jax.Array, ...]:
        after = jax.vmap(states, in_axes=(None, 0))(tower, jax.vmap(tower.embed)(ids))
        end = jnp.argmax(ids, axis=1)
        at_end = after[jnp.arange(len(ids)), :, end]
        return (
            after,
            at_end,
            jax.vmap(tower.layer_norm_final)(at_end[:, -1]),
            clip.text_features(tower, ids),
        )

    images = jnp.asarray(seeded.images(sizes, seeded.SEED, seeded.IMAGES))
    embeddings, after, pooled, image_features = vision(model.vision, images)
    if (
        name != "tiny"
    ):  # the reference has only three tokens here, and the class token after each block
        embeddings, after = embeddings[:, jnp.array([0, 1, -1])], after[:, :, 0]
    close(embeddings, reference["vision_embeddings"][:seen], 2e-5)
    close(after, reference["vision_states"][:seen], 2e-5)
    close(pooled, reference["vision_pooled"][:seen], 1e-5)
    close(image_features, reference["vision_features"], 2e-6)

    after, at_end, pooled, text_features = text(model.text, jnp.asarray(reference["token_ids"]))
    close(after if name == "tiny" else at_end, reference["text_states"], 2e-5)
    close(pooled, reference["text_pooled"], 1e-5)
    close(text_features, reference["text_features"], 2e-6)

    logits = jnp.exp(model.logit_scale) * image_features @ text_features.T
    close(logits, reference["logits"], 2e-4)


def test_shorter_texts_give_the_same_features() -> None:
    """`prompt_features` cuts padding: tokens after the end token must not change features."""
    model = seeded_model("tiny")
    ids = np.zeros((2, model.config.context_length), np.int32)
    ids[:, :4] = [[98, 5, 99, 0], [98, 7, 8, 99]]
    close(
        clip.text_features(model.text, jnp.asarray(ids[:, :4])),
        clip.text_features(model.text, jnp.asarray(ids)),
        1e-6,
    )


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_last_block_of_one_token_against_all_tokens(precision: str, tolerance: float) -> None:
    """Features and gradients, with end tokens at different places and tokens after them."""
    model = seeded_model("tiny")
    sizes = seeded.ARCHITECTURES["tiny"]
    images = jnp.asarray(seeded.images(sizes, seeded.SEED, 4))
    ids = jnp.array([[98, 5, 99, 3, 7], [98, 7, 8, 6, 99], [98, 99, 1, 1, 1]], jnp.int32)

    def one(tower: clip.VisionTower | clip.TextTower) -> jax.Array:
        tower = clip.compute_in(tower, precision)
        if isinstance(tower, clip.VisionTower):
            return clip.image_features(tower, images)
        return clip.text_features(tower, ids)

    def every(tower: clip.VisionTower | clip.TextTower) -> jax.Array:
        tower = clip.compute_in(tower, precision)
        if isinstance(tower, clip.VisionTower):
            standardized = clip.standardize(images, tower)
            ends = jax.vmap(lambda image: states(tower, tower.embed(image))[-1, 0])(standardized)
            embeddings = jax.vmap(tower.projection)(jax.vmap(tower.layer_norm_post)(ends))
        else:
            after = jax.vmap(lambda text: states(tower, tower.embed(text))[-1])(ids)
            ends = after[jnp.arange(3), jnp.array([2, 4, 1])]
            embeddings = jax.vmap(tower.projection)(jax.vmap(tower.layer_norm_final)(ends))
        return clip.normalize(embeddings.astype(jnp.float32))

    @functools.partial(jax.jit, static_argnums=0)
    def features_and_gradient(features: Callable, tower: clip.VisionTower | clip.TextTower):
        return features(tower), jax.grad(lambda tower: jnp.sum(features(tower)[:, 0]))(tower)

    for tower in (model.vision, model.text):
        found, expected = (features_and_gradient(features, tower) for features in (one, every))
        for (path, leaf), other in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
        ):
            scale = max(1.0, float(np.abs(other).max()))
            np.testing.assert_allclose(
                leaf, other, rtol=0, atol=tolerance * scale, err_msg=clip.leaf_name(path)
            )


def test_softmax_is_float32_in_bfloat16() -> None:
    block = clip.compute_in(seeded_model("tiny").text, "bfloat16").last
    x = jnp.ones((3, block.query.weight.shape[1]), jnp.bfloat16)
    program = str(jax.make_jaxpr(block.attention)(x))
    assert re.findall(r":(\w+)\[[\d,]*\] = exp ", program) == ["f32"]


def test_end_token_that_is_not_the_highest_id() -> None:
    """Reverses the vocabulary: its last two tokens get ids 1 and 0."""
    sizes = seeded.ARCHITECTURES["tiny"]
    state, config = seeded.hugging_face_weights(sizes, seeded.SEED), config_of(sizes)
    model = clip.from_state_dict(state, config, "hugging_face", "seeded")
    name = "text_model.embeddings.token_embedding.weight"
    turned = clip.from_state_dict(
        state | {name: state[name][::-1]},
        dataclasses.replace(config, start_token=1, end_token=0),
        "hugging_face",
        "seeded",
    )
    ids = jnp.array([98, 5, 99, 0], jnp.int32)
    close(turned.text(99 - ids), model.text(ids), 1e-6)


def test_every_layer_norm_has_the_epsilon_of_the_configuration() -> None:
    config = dataclasses.replace(config_of(seeded.ARCHITECTURES["tiny"]), layer_norm_epsilon=0.125)
    model = eqx.filter_eval_shape(clip.CLIP, config, jax.random.key(0))
    norms = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, eqx.nn.LayerNorm))
    # Two in the first and two in the last blocks of each tower, one before and one after those of
    # images, and one after those of texts.
    assert [norm.eps for norm in norms if isinstance(norm, eqx.nn.LayerNorm)] == [0.125] * 11


def test_one_weight_that_is_not_finite_is_refused() -> None:
    sizes = seeded.ARCHITECTURES["tiny"]
    state = dict(seeded.hugging_face_weights(sizes, seeded.SEED))
    state["visual_projection.weight"] = state["visual_projection.weight"].copy()
    state["visual_projection.weight"][1, 2] = np.nan
    with pytest.raises(InputError, match=r"visual_projection\.weight is not finite"):
        clip.from_state_dict(state, config_of(sizes), "hugging_face", "seeded")


def test_random_initialisation_has_the_scales_of_openai() -> None:
    config = clip.Config(
        clip.Preparation(64),
        8,
        clip.Transformer(128, 4, 2, 512),
        clip.Transformer(192, 3, 3, 768),
        96,
        77,
        2000,
        1998,
        1999,
    )
    model = eqx.filter_jit(clip.CLIP)(config, jax.random.key(0))
    for tower, width, layers in ((model.vision, 128, 4), (model.text, 192, 3)):
        residual = width**-0.5 * (2 * layers) ** -0.5
        for layer, deviation in {
            "query": width**-0.5,
            "key": width**-0.5,
            "value": width**-0.5,
            "out": residual,
            "fc1": (2 * width) ** -0.5,
            "fc2": residual,
        }.items():
            first, last = getattr(tower.blocks, layer), getattr(tower.last, layer)
            assert first.weight.shape == (layers - 1, *last.weight.shape)
            for weight in (*first.weight, last.weight):
                np.testing.assert_allclose(np.std(weight), deviation, rtol=0.05)
            assert not np.any(first.bias) and not np.any(last.bias)
        np.testing.assert_allclose(np.std(tower.projection.weight), width**-0.5, rtol=0.05)
        assert tower.projection.bias is None
    np.testing.assert_allclose(np.std(model.text.token_embedding), 0.02, rtol=0.05)
    np.testing.assert_allclose(np.std(model.text.position_embedding), 0.01, rtol=0.05)
    np.testing.assert_allclose(np.exp(model.logit_scale), 1 / 0.07, rtol=1e-6)


def test_standardize() -> None:
    """Bytes and floats in [0, 1] give the same values, computed here per channel, with the tower's
    own statistics.
    """
    image = np.array([[[0, 128, 255]]], np.uint8)
    sizes = clip.Transformer(8, 1, 1, 8)
    config = clip.Config(clip.Preparation(8), 4, sizes, sizes, embedding_size=4)
    tower = clip.VisionTower(config, jax.random.key(0))
    expected = [
        (0 - 0.48145466) / 0.26862954,
        (128 / 255 - 0.4578275) / 0.26130258,
        (1 - 0.40821073) / 0.27577711,
    ]
    close(clip.standardize(jnp.asarray(image), tower)[0, 0], expected, 1e-6)
    close(clip.standardize(jnp.asarray(image / np.float32(255)), tower)[0, 0], expected, 1e-6)
    preparation = clip.Preparation(8, mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.25))
    halves = dataclasses.replace(config, preparation=preparation)
    tower = clip.VisionTower(halves, jax.random.key(0))
    close(clip.standardize(jnp.asarray(image), tower)[0, 0], [-1, 128 / 255 * 2 - 1, 2], 1e-6)


def test_heads_against_a_loop() -> None:
    """Computes equations 1 and 14 one text at a time."""
    features = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    head, context = clip.zero_shot_head(features), clip.context_head(features)
    assert head.shape == (5, 4) and context.shape == (5, 3)
    for label in range(4):
        mean = sum(features[template, label] for template in range(3)) / 3
        close(head[:, label], mean / np.sqrt(np.sum(mean**2)), 1e-6)
    for template in range(3):
        mean = sum(features[template, label] for label in range(4)) / 4
        close(context[:, template], mean / np.sqrt(np.sum(mean**2)), 1e-6)


def test_prompt_features_do_not_depend_on_batches() -> None:
    """They are those of one prompt at a time, which is padded to the whole context."""
    model, tokenizer = weights.load("tiny")
    classes, templates = ["dog", "house", "ice cream"], ["a {}.", "my own {}."]
    features = clip.prompt_features(model, tokenizer, classes, templates)
    close(clip.prompt_features(model, tokenizer, classes, templates, batch_size=4), features, 1e-6)
    text_features = jax.jit(clip.text_features)
    for row, template in zip(features, templates, strict=True):
        for actual, name in zip(row, classes, strict=True):
            ids = clip.tokenize(tokenizer, [template.replace("{}", name)], model.config)
            close(actual, text_features(model.text, jnp.asarray(ids))[0], 1e-6)


# ---------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return weights.openai_tokenizer(shared("weights/openai/bpe_simple_vocab_16e6.txt.gz"))


def test_tokenizer_matches_openai(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On texts that `ftfy` has not repaired, so that the ids do not depend on its version."""
    monkeypatch.setattr(clip.ftfy, "fix_text", lambda text: text)
    recorded = json.loads(gzip.decompress((REFERENCE / "tokenizer.json.gz").read_bytes()))[
        "strings"
    ]
    # Here, the text of a special token is always a special token; in OpenAI's code, only where a
    # word may begin.
    strings = [(text, ids) for text, ids in recorded if "oftext" not in clip.clean_text(text)]
    assert len(strings) > 2_700
    for text, ids in strings:
        assert tokenizer.encode(clip.clean_text(text), add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a jack\u2019s box", "a jack's box"),
        ("a caf\u00c3\u00a9", "a caf\u00e9"),  # UTF-8 decoded as Latin-1
        ("\uff24\uff2f\uff27", "DOG"),  # full-width letters
        ("a \ufb01sh", "a fish"),  # a ligature
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_texts_are_repaired_as_openai_does(tokenizer, text: str, plain: str) -> None:
    ids = clip.tokenize(tokenizer, [text, plain], clip.PRESETS["ViT-B/32"])
    np.testing.assert_array_equal(*ids)


def test_tokenize_adds_start_end_and_padding(tokenizer) -> None:
    config = clip.PRESETS["ViT-B/32"]
    ids = clip.tokenize(tokenizer, ["a photo of a dog.", ""], config)
    assert ids.shape == (2, 77) and ids.dtype == np.int32
    assert (
        ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 269, 49407]
        and not ids[0, 8:].any()
    )
    assert ids[1, :3].tolist() == [49406, 49407, 0]


def test_words_of_a_vocabulary_of_bytes() -> None:
    """Ids by hand: each word's last byte ends it, digits are words of their own, and only "dog" is
    one token.
    """
    pieces = ["i", "t</w>", "'", "s</w>", "4</w>", "2</w>", "dog</w>", "!", "?</w>"]
    ids = TOKENIZER.encode(clip.clean_text("It's 42 DOG !?"), add_special_tokens=False).ids
    assert ids == [TOKENIZER.token_to_id(piece) for piece in pieces]
    shortened = clip.tokenize(TOKENIZER, ["it's 42 dogs"], CONFIG, truncate=True)
    assert shortened.tolist() == [[CONFIG.start_token, *ids[:6], CONFIG.end_token]]


def test_html_entities_are_unescaped_twice() -> None:
    """Beside a tag: without one, `ftfy` unescapes entities itself."""
    assert clip.clean_text("<b> cats &amp;amp; dogs") == "<b> cats & dogs"


def test_tokenize_text_longer_than_the_context(tokenizer) -> None:
    config, text = clip.PRESETS["ViT-B/32"], "dog " * 76
    with pytest.raises(InputError, match="has 76 tokens, the model takes 75"):
        clip.tokenize(tokenizer, [text], config)
    ids = clip.tokenize(tokenizer, [text], config, truncate=True)
    assert ids[0, 0] == 49406 and set(ids[0, 1:76].tolist()) == {1929} and ids[0, 76] == 49407
    assert clip.tokenize(tokenizer, ["dog " * 75], config)[0, 76] == 49407


def test_tokenizers_of_one_model_agree(tokenizer, tmp_path) -> None:
    """Compares OpenAI's file, tokenizer.json, and vocab.json with merges.txt."""
    folder = shared("weights/pacs-clip/hf")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    texts = ["a photo of a dog.", "it's CLIP's 1st  &amp; best; naïve café 🙂!!", "x" * 60]
    expected = [tokenizer.encode(clip.clean_text(text)).ids for text in texts]
    for other in (weights.hugging_face_tokenizer(folder), weights.hugging_face_tokenizer(tmp_path)):
        assert [other.encode(clip.clean_text(text)).ids for text in texts] == expected
        assert other.get_vocab_size() == 49408


@pytest.mark.parametrize(
    "content",
    [None, b"", b"not gzip", gzip.compress(b"header\nonly one line\n"), gzip.compress(b"\xff")],
    ids=[
        "missing",
        "empty",
        "text",
        "one line",
        "no UTF-8",
    ],  # gzip stores the time, so its bytes cannot be names
)
def test_broken_vocabulary_is_named(content: bytes | None, tmp_path) -> None:
    path = tmp_path / "bpe.txt.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"vocabulary .*bpe.txt.gz"):
        weights.openai_tokenizer(path)


def test_unknown_preset_suggests_the_nearest() -> None:
    assert "did you mean ViT-B/16" in str(errors.unknown("model preset", "ViT-B16", clip.PRESETS))
