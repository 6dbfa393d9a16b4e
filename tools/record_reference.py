"""Writes `tests/reference/`: outputs of PyTorch's CLIP and of OpenAI's tokenizer.

    pip install '.[reference]' && pip install --no-deps clip-anytorch
    pip install --no-deps open_clip_torch torchvision timm ftfy    # for preparation alone
    python -m tools.record_reference      # all of them, or give names: tiny tiny-gelu vit-b-32 ...

NAME.npz contains the float32 outputs of `transformers.CLIPModel` for the weights, images and texts
of `seeded.py`:

    vision_embeddings   after the pre-LayerNorm [images, tokens, width]; large models: class token,
                        first, last patch
    vision_states       vision_embeddings, then the state after each block
                        [images, layers + 1, tokens, width]; large models: only the class token
                        [images, layers + 1, width]
    vision_pooled       the class token after the post-LayerNorm [images, width]
    vision_projected    vision_pooled in the joint space [images, embedding]
    vision_features     vision_projected at unit norm
    text_states         embeddings, then the state after each block
                        [texts, layers + 1, tokens, width]; large models: only the end token
                        [texts, layers + 1, width]
    text_pooled, text_projected, text_features          as for vision, of the end token
    logits              exp(logit_scale) vision_features text_features^T [images, texts]
    token_ids, image_sums, weight_sums                  the token ids, and the sum of each image and
                        each weight: they distinguish changed inputs (such as other random numbers)
                        from a wrong model
    versions            versions of the libraries

methods.npz contains one step per fine-tuning method at the size `nano`, on `seeded.fine_tuning`, in
float64:

    METHOD/loss         cross-entropy plus lambda times the regularizer, both averaged over the
                        images (L2SP: the sum over all parameters of vision tower, visual projection
                        and head); KL(zero-shot || trained); lambda 0.7, temperature 2 if the method
                        has one
    METHOD/tau          20; 2 for KD, whose teacher is certain of one class at 20: its term would be
                        1e-7
    METHOD/grad/LEAF    the gradient per parameter, under PyTorch's names; `head` for the head
    probe/loss          the minimal cross-entropy of a linear probe
    probe/logits        the logits of that probe on its training data

tpgm.npz contains TPGM at the size `nano`, on the same inputs, as its authors' class computes it
(Tian et al. 2023: the ratio of radius and distance + 1e-8 through Hardtanh, whose gradient is 0 at
its bounds). TYPE is float32, in which 1e-8 vanishes beside a distance of 0.25 or more, or float64:

    TYPE/NORM/losses        the cross-entropy before each of 200 steps of Adam on the radii; NORM is
                            frobenius or mars
    TYPE/NORM/radii/LEAF    the radii after them, under PyTorch's names
    TYPE/NORM/bounds/LEAF   the upper bounds of the radii

preparation.npz contains the images of `seeded.pictures` as `transformers.CLIPImageProcessor` (with
Pillow) and open_clip's transform for evaluation prepare them:

    NAME/file, NAME/section     the file and, as JSON, the section that specify the preparation
    NAME/pixels                 standardised [images, 16, 16, 3]; of transformers without the last

original.npz is not recorded here. It contains the inputs, outputs and gradients of the Lipsum-FT
authors' own step (Flax, float32), and three optimizer steps, for weights that `test_lipsum.py`
draws from a seed.

tokenizer.json.gz contains {"versions": {...}, "strings": [[text, ids], ...]}, the ids without start
and end token. OpenAI's tokenizer first applies `ftfy` to texts. It is left out here; otherwise the
ids would depend on its version.
"""

import ast
import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import random
import string
import sys
import tempfile
import time
import types
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tyro
from PIL import Image

from support.errors import exit_code, unknown
from tools import seeded

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "reference"
MODELS = {
    "tiny": ("tiny", "quick_gelu"),
    "tiny-gelu": ("tiny", "gelu"),
    "heads-80-gelu": ("heads-80", "gelu"),
    "vit-b-32": ("ViT-B/32", "quick_gelu"),
    "vit-b-16": ("ViT-B/16", "quick_gelu"),
    "vit-l-14": ("ViT-L/14", "quick_gelu"),
}
NAMES = (*MODELS, "methods", "tpgm", "preparation", "tokenizer")
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


# -------------------------------------------------------------------------------------- the model


def record_model(name: str) -> None:
    """Writes NAME.npz."""
    architecture_name, activation = MODELS[name]
    architecture = seeded.ARCHITECTURES[architecture_name]
    weights = seeded.hugging_face_weights(architecture, seeded.SEED)
    images = seeded.images(architecture, seeded.SEED, seeded.IMAGES)
    token_ids = seeded.token_ids(architecture, seeded.SEED, seeded.TEXTS)
    model = build_model(architecture, activation, weights)
    values: dict[str, Any] = {
        **model_values(model, images, token_ids, all_tokens=architecture_name == "tiny"),
        "token_ids": token_ids,
        "image_sums": images.sum((1, 2, 3), dtype=np.int64),
        "weight_sums": np.array([weight.sum(dtype=np.float64) for weight in weights.values()]),
        "versions": torch_versions(),
    }
    np.savez_compressed(REFERENCE / f"{name}.npz", **values)


def build_model(architecture: dict[str, int], activation: str, weights: dict[str, np.ndarray]):
    """Returns `transformers.CLIPModel` with these weights, which it does not copy."""
    import torch
    import transformers

    def tower(name: str) -> dict:
        width = architecture[f"{name}_width"]
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": architecture[f"{name}_layers"],
            "num_attention_heads": architecture[f"{name}_heads"],
            "projection_dim": architecture["embedding_size"],
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
        }

    config = transformers.CLIPConfig(
        text_config=tower("text")
        | {
            "vocab_size": architecture["vocabulary_size"],
            "max_position_embeddings": architecture["context_length"],
            "bos_token_id": architecture["vocabulary_size"] - 2,
            "eos_token_id": architecture["vocabulary_size"] - 1,
        },
        vision_config=tower("vision")
        | {"image_size": architecture["image_size"], "patch_size": architecture["patch_size"]},
        projection_dim=architecture["embedding_size"],
        attn_implementation="eager",
    )
    model = transformers.CLIPModel(config).eval()
    # `assign` uses the arrays instead of copying them: ViT-L/14 has 1.7 GB.
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


def model_values(
    model, images: np.ndarray, token_ids: np.ndarray, all_tokens: bool
) -> dict[str, np.ndarray]:
    """Returns the values that NAME.npz contains, at every token or at the first and last ones."""
    import torch

    pixels = (images.astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    ids = torch.from_numpy(token_ids).long()
    end = (ids == model.config.text_config.eos_token_id).int().argmax(1)
    with torch.inference_mode():
        vision = model.vision_model(pixel_values=pixels, output_hidden_states=True)
        text = model.text_model(input_ids=ids, output_hidden_states=True)
        vision_states = torch.stack(vision.hidden_states, 1)
        text_states = torch.stack(text.hidden_states, 1)
        vision_projected = model.visual_projection(vision.pooler_output)
        text_projected = model.text_projection(text.pooler_output)
        vision_features = vision_projected / vision_projected.norm(dim=-1, keepdim=True)
        text_features = text_projected / text_projected.norm(dim=-1, keepdim=True)
        logits = model.logit_scale.exp() * vision_features @ text_features.T
        whole = model(pixel_values=pixels, input_ids=ids)
    torch.testing.assert_close(logits, whole.logits_per_image, rtol=0, atol=1e-4)
    vision_embeddings = vision_states[:, 0]
    values = {
        "vision_embeddings": vision_embeddings if all_tokens else vision_embeddings[:, [0, 1, -1]],
        "vision_states": vision_states if all_tokens else vision_states[:, :, 0],
        "vision_pooled": vision.pooler_output,
        "vision_projected": vision_projected,
        "vision_features": vision_features,
        "text_states": text_states if all_tokens else text_states[torch.arange(len(ids)), :, end],
        "text_pooled": text.pooler_output,
        "text_projected": text_projected,
        "text_features": text_features,
        "logits": logits,
    }
    return {name: value.numpy() for name, value in values.items()}


# ------------------------------------------------------------ the fine-tuning methods, in PyTorch

TAU, LAMBDA, TEMPERATURE = 20.0, 0.7, 2.0


def record_methods() -> None:
    """Writes methods.npz."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, normalize

    inputs = seeded.fine_tuning(seeded.SEED)
    architecture = seeded.ARCHITECTURES["nano"]
    zero_shot = (
        build_model(architecture, "quick_gelu", inputs["zero_shot"]).double().requires_grad_(False)
    )
    pixels = (inputs["images"].astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).double()
    labels = torch.from_numpy(inputs["labels"]).long()
    head0, context = (
        torch.from_numpy(inputs[name]).double() for name in ("zero_shot_head", "context_head")
    )
    ids = torch.from_numpy(inputs["texts"]).long()

    def image_features(model):
        return normalize(
            model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output), dim=-1
        )

    texts = normalize(
        zero_shot.text_projection(zero_shot.text_model(input_ids=ids).pooler_output), dim=-1
    )
    features0 = image_features(zero_shot)

    def kl(v, v0, temperature=1.0):
        log_p = log_softmax(v / temperature, dim=1)
        log_p0 = log_softmax(v0 / temperature, dim=1)
        return temperature**2 * kl_div(log_p, log_p0, reduction="batchmean", log_target=True)

    def halved_mse(v, v0):
        return mse_loss(v, v0) / 2

    def distance(model, head):
        start = dict(zero_shot.named_parameters())
        moved = [
            ((parameter - start[name]) ** 2).sum()
            for name, parameter in model.named_parameters()
            if name.startswith("vis")
        ]
        return sum(moved) + ((head - head0) ** 2).sum()

    taus = {"kd": 2.0}
    # Arguments: the features of the trained model, that model, and its head.
    regularizers = {
        "ft": lambda features, model, head: 0.0,
        "scratch-ft": lambda features, model, head: 0.0,
        "l2sp": lambda features, model, head: distance(model, head),
        "kd": lambda features, model, head: kl(
            taus["kd"] * features @ head, taus["kd"] * features0 @ head0
        ),
        "car-ft": lambda features, model, head: kl(
            TAU * features @ context, TAU * features0 @ context, TEMPERATURE
        ),
        "lipsum": lambda features, model, head: halved_mse(
            TAU * features @ texts.T, TAU * features0 @ texts.T
        ),
        "lipsum-exact": lambda features, model, head: halved_mse(
            TAU * features @ texts.T, TAU * features0 @ texts.T
        ),
        "kld-random": lambda features, model, head: kl(
            TAU * features @ texts.T, TAU * features0 @ texts.T, TEMPERATURE
        ),
        "mse-fixed": lambda features, model, head: halved_mse(
            TAU * features @ context, TAU * features0 @ context
        ),
        "feat-kd": lambda features, model, head: ((features - features0) ** 2).sum(dim=1).mean(),
    }
    values: dict[str, Any] = {"versions": torch_versions()}
    for method, regularizer in regularizers.items():
        model = build_model(architecture, "quick_gelu", inputs["trained"]).double()
        head = torch.from_numpy(inputs["trained_head"]).double()
        head = (torch.zeros_like(head) if method == "scratch-ft" else head).requires_grad_()
        features = image_features(model)
        tau = taus.get(method, TAU)
        loss = cross_entropy(tau * features @ head, labels) + LAMBDA * regularizer(
            features, model, head
        )
        loss.backward()
        values[f"{method}/tau"] = np.float32(tau)
        values[f"{method}/loss"] = loss.detach().numpy()
        values[f"{method}/grad/head"] = head.grad.numpy().astype(np.float32)
        for name, parameter in model.named_parameters():
            if name.startswith("vis"):
                values[f"{method}/grad/{name}"] = parameter.grad.numpy().astype(np.float32)

    features = torch.from_numpy(inputs["probe_features"]).double()
    labels = torch.from_numpy(inputs["probe_labels"]).long()
    probe = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [probe],
        max_iter=5000,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        loss = cross_entropy(features @ probe, labels)
        loss.backward()
        return loss

    solver.step(closure)
    values["probe/loss"] = closure().detach().numpy()
    values["probe/logits"] = (features @ probe).detach().numpy()
    np.savez_compressed(REFERENCE / "methods.npz", **values)


def record_tpgm() -> None:
    """Writes tpgm.npz."""
    import torch

    values: dict[str, Any] = {"versions": torch_versions()}
    for precision in (torch.float32, torch.float64):
        for norm in ("frobenius", "mars"):
            prefix = f"{precision}".removeprefix("torch.") + f"/{norm}"
            found = run_tpgm(norm, precision)
            values |= {f"{prefix}/{name}": value for name, value in found.items()}
    np.savez_compressed(REFERENCE / "tpgm.npz", **values)


def run_tpgm(norm: str, precision: Any) -> dict[str, Any]:
    """Returns losses, radii and bounds of 200 steps of TPGM."""
    import torch
    from torch.nn.functional import cross_entropy, hardtanh, normalize

    inputs = seeded.fine_tuning(seeded.SEED)
    pixels = (inputs["images"].astype(np.float32) / np.float32(255) - MEAN) / DEVIATION
    pixels = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(precision)
    labels = torch.from_numpy(inputs["labels"]).long()
    model = build_model(seeded.ARCHITECTURES["nano"], "quick_gelu", inputs["zero_shot"])
    model = model.to(precision)

    def parameters(kind: str) -> dict:
        weights = {name: weight for name, weight in inputs[kind].items() if name.startswith("vis")}
        weights["head"] = inputs[f"{kind}_head"]
        return {name: torch.from_numpy(weight).to(precision) for name, weight in weights.items()}

    class Tower(torch.nn.Module):
        def forward(self):
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    tower = Tower()
    tower.model = model
    start, end = parameters("zero_shot"), parameters("trained")
    norms = {}
    for name, weight in end.items():
        moved = weight - start[name]
        rows = moved.abs().flatten(1).sum(1) if moved.ndim > 1 else moved.abs().sum()
        norms[name] = (
            moved.norm() if norm == "frobenius" else rows.reshape(-1, *[1] * (moved.ndim - 1))
        )
    radii = {name: (each.min() / 2).clone().requires_grad_() for name, each in norms.items()}
    adam = torch.optim.Adam(radii.values(), lr=1e-2)
    losses = []
    for _ in range(200):
        projected = {
            name: start[name]
            + hardtanh(radii[name] / (norms[name] + 1e-8), 0, 1) * (end[name] - start[name])
            for name in end
        }
        head = projected.pop("head")
        named = {f"model.{name}": weight for name, weight in projected.items()}
        features = normalize(torch.func.functional_call(tower, named, ()), dim=-1)
        loss = cross_entropy(TAU * features @ head, labels)
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for name, radius in radii.items():
                radius.clamp_(1e-8, norms[name].max().item())
        losses.append(loss.item())
    bounds = {f"bounds/{name}": each.max().numpy() for name, each in norms.items()}
    last = {f"radii/{name}": radius.detach().numpy() for name, radius in radii.items()}
    return {"losses": np.array(losses), **last, **bounds}


# ------------------------------------------------------------------------------------- preparation

HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.5]}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "resample": 3,
    "crop_size": {"height": 16, "width": 16},
    **{f"do_{step}": True for step in ("resize", "center_crop", "convert_rgb", "rescale")},
    "do_normalize": True,
    "image_mean": HALVES["mean"],
    "image_std": HALVES["std"],
}
SQUARE, LARGER = ({"height": side, "width": side} for side in (16, 20))
PREPROCESSOR, OPEN_CLIP = "preprocessor_config.json", "open_clip_config.json"
PREPARATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "shortest": (PREPROCESSOR, PROCESSOR),
    "shortest bilinear": (PREPROCESSOR, PROCESSOR | {"resample": 2}),
    "shortest cropped": (PREPROCESSOR, PROCESSOR | {"size": {"shortest_edge": 20}}),
    "squash": (PREPROCESSOR, PROCESSOR | {"size": SQUARE}),
    "squash bilinear": (PREPROCESSOR, PROCESSOR | {"size": SQUARE, "resample": 2}),
    "squash cropped": (PREPROCESSOR, PROCESSOR | {"size": LARGER}),
    "old keys": (PREPROCESSOR, PROCESSOR | {"size": 16, "crop_size": 16}),
    "no crop": (PREPROCESSOR, PROCESSOR | {"size": SQUARE, "do_center_crop": False}),
    "open_clip": (OPEN_CLIP, {"size": 16}),
    "open_clip bilinear": (OPEN_CLIP, {"size": 16, "interpolation": "bilinear"} | HALVES),
    "open_clip squash": (OPEN_CLIP, {"size": [16, 16], "resize_mode": "squash"}),
    "open_clip squash bilinear": (
        OPEN_CLIP,
        {
            "size": 16,
            "resize_mode": "squash",
            "interpolation": "bilinear",
            "mean": 0.5,
            "std": 0.25,
        },
    ),
}


def record_preparation() -> None:
    """Writes preparation.npz."""
    import torch

    values: dict[str, Any] = {"versions": torch_versions("open_clip_torch", "torchvision")}
    images = [Image.fromarray(image) for image in seeded.pictures(seeded.SEED)]
    # The operators of torchvision are not needed, and need a PyTorch of the same kind of build.
    with mock.patch.object(torch.library, "register_fake", lambda name: lambda function: function):
        importlib.import_module("torchvision")
    for name, (file, section) in PREPARATIONS.items():
        record = with_open_clip if file == OPEN_CLIP else with_transformers
        values |= {f"{name}/file": file, f"{name}/section": json.dumps(section)}
        values[f"{name}/pixels"] = record(section, images)
    np.savez_compressed(REFERENCE / "preparation.npz", **values)


def with_transformers(section: dict[str, Any], images: Sequence[Image.Image]) -> np.ndarray:
    """Returns what the image processor of a folder makes of all images but the last."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / PREPROCESSOR).write_text(json.dumps(section))
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor(images[:-1], return_tensors="np")["pixel_values"]
    return pixels.transpose(0, 2, 3, 1)


def with_open_clip(section: dict[str, Any], images: Sequence[Image.Image]) -> np.ndarray:
    """Returns what open_clip's transform for evaluation makes of images."""
    open_clip: Any = importlib.import_module("open_clip.transform")
    transform = open_clip.image_transform_v2(open_clip.PreprocessCfg(**section), is_train=False)
    return np.stack([transform(image).numpy().transpose(1, 2, 0) for image in images])


# ---------------------------------------------------------------------------------- the tokenizer


def record_tokenizer(shared: Path) -> None:
    """Writes tokenizer.json.gz from OpenAI's files."""
    tokenizer = load_tokenizer(shared / "weights/openai/bpe_simple_vocab_16e6.txt.gz")
    texts = prompts(shared / "data/openai/Prompt_Engineering_for_ImageNet.ipynb") + odd_texts()
    unicode = {"unicodedata": unicodedata.unidata_version}
    content = {
        "versions": versions("clip-anytorch", "regex") | unicode,
        "strings": [[text, tokenizer.encode(text)] for text in dict.fromkeys(texts)],
    }
    lines = json.dumps(content, separators=(",", ":"))
    (REFERENCE / "tokenizer.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def load_tokenizer(vocabulary: Path):
    """Returns OpenAI's SimpleTokenizer.

    Its module is loaded by path, because its package imports torchvision.
    """
    package = importlib.metadata.distribution("clip-anytorch")
    path = str(package.locate_file("clip/simple_tokenizer.py"))
    specification: Any = importlib.util.spec_from_file_location("simple_tokenizer", path)
    module = importlib.util.module_from_spec(specification)
    identity: Any = types.ModuleType("ftfy")
    identity.fix_text = lambda text: text
    with mock.patch.dict(sys.modules, ftfy=identity):
        specification.loader.exec_module(module)
    return module.SimpleTokenizer(str(vocabulary))


def prompts(notebook: Path) -> list[str]:
    """Returns a prompt for each of ImageNet's 1,000 classes, with OpenAI's templates in turn."""
    classes = assigned_list(notebook, "imagenet_classes")
    templates = assigned_list(notebook, "imagenet_templates")
    return [templates[index % len(templates)].format(name) for index, name in enumerate(classes)]


def assigned_list(notebook: Path, name: str) -> list[str]:
    """Returns the list that a cell of a notebook assigns to `name`."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if source.startswith(f"{name} = "):
            statement: Any = ast.parse(source).body[0]
            return ast.literal_eval(statement.value)
    raise ValueError(f"{notebook}: no cell assigns {name}")


# Odd characters are intended here. Split strings keep the lists short: the formatter puts each list
# item on a line.
# ruff: noqa: RUF001, SIM905
CONTRACTIONS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
ACCENTED = """café naïve Zürich Ærøskøbing façade São señor Łódź Dvořák Ångström Đà Nẵng piñata
    brûlée žluťoučký""".split()
FRAGMENTS: dict[str, Sequence[str]] = {
    "apostrophes": [
        *(start + end for start in ("", "they") for end in CONTRACTIONS),
        *(start + end.upper() for start in ("", "WE") for end in CONTRACTIONS),
        *"""' '' \'\'\' 'ss 'sd 're' 'r 'v 'l 'Re 'lL ’s ’ `s ʼs 'ſ 'ſt o'clock 'tis rock'n'roll
            dogs' y'all'd've '90s x''s !'s 1's 's's't""".split(),
        *["' s", "it' s", "it 's"],
    ],
    "numbers": """0 42 2024 3.14 1,000,000 1e-5 0x1F a1b2c3 x86_64 2nd 4K R2D2 B-52 12:30 x² m³ 10⁻⁶
        H₂O E=mc² Ⅳ ⅻ MMⅩⅩ ½ 3¾ ⅓ ⅛ ↉ ①② ⑳ ㊿ １２３ ٣٤٥ ४२ 一二三 〇 𝟙𝟚 ² ₀ no.7 7-Eleven 50% ±5°C
        № 𒐀 ౧౨""".split(),
    "accents": [
        form
        for word in ACCENTED
        for form in (word, unicodedata.normalize("NFD", word), word.upper())
    ],
    "scripts": """Straße STRASSE GROẞE Übergrößenträger ΟΔΥΣΣΕΥΣ Σ ΑΣ. ὈΔΥΣΣΕΎΣ λόγος ΑΣ'Σ Σ1ΑΣ
        İstanbul ISPARTA ılık DİYARBAKIR I\u0307 Москва Ёлка щи ЇЖАК Ђорђе مرحبا السَّلَامُ كتاب
        שָׁלוֹם नमस्ते हिन्दी বাংলা தமிழ் ไทย 你好 中文，字。 漢字かな カタカナ ﾊﾝｶｸ \u30d1
        \u30cf\u309a ー 한국어 \u1112\u1161\u11ab ქართული Հայերեն \ufb01ne \ufb02ag \ufb06 ＦＵＬＬ
        \u01c5 \u01c7 \u212a \u212b \u2126 ª º \u0149 \u01f0""".split(),
    "emoji": """😀 😀😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 👨🏿\u200d🚀 🏳\ufe0f\u200d🌈 🇩🇪 🇯🇵🇫🇷
        1\ufe0f\u20e3 #\ufe0f\u20e3 ❤\ufe0f ❤ ☕\ufe0f 🐈\u200d⬛ 🧑🏻\u200d🤝\u200d🧑🏿 cat😀dog
        😀's 🔥100 ™ ©\ufe0f ® 〰\ufe0f :-) <3 ¯\\_(ツ)_/¯ \u200d \ufe0f
        🏴\U000e0067\U000e007f""".split(),
    "entities": """&amp; &amp;amp; &amp;amp;amp; &lt; &gt; &lt;b&gt; &amp;lt; &quot; &#39; &#x27;
        &#39;s &apos;t &eacute; &eacute &Eacute;t&eacute; &amp;eacute; &nbsp; a&nbsp;&nbsp;b &copy
        &notit; &amp & && &; &# &#; &#x; &#x110000; &#0; &#128; &#xD800; &#13; &#65 &bogus; AT&T
        &AMP; &Amp; R&amp;D &#x1F600; &hearts; &NotEqualTilde; &zwj; &ampamp; &#38;lt;
        &lt;|endoftext|&gt; &#60;|startoftext|&#62; &#x0a; &Tab;""".split(),
    "special": [
        *"""<|startoftext|> <|endoftext|> <|STARTOFTEXT|> <|EndOfText|> a<|startoftext|>b
            <|endoftext|><|endoftext|> <|endoftext| |endoftext|> <<|endoftext|>> !<|endoftext|>
            <|end\u00adoftext|> <end_of_text> <|startoftext|>'s '<|endoftext|> <|endoftext|>!
            endoftext <|ENDOFTEXT|>!! <|pad|> </w> a</w>""".split(),
        *["<| endoftext |>", "<|startoftext|>\t<|endoftext|>"],
    ],
    "symbols": """_ __ __init__ snake_case _a_ CONSTANT_NAME €100 $5.00 £ ¥ ₹ ₿ ¢ 100€ US$ → ≤ ∑ √2
        … — – «ça» „so“ ‘x’ ¿qué? ¡ay! § † • ※ ‼ ⁇ 。 、 「」 · \\ \\n \u0301 a\u0301\u0327
        http://example.com/?q=a&b=c#d name@example.com C++ C# #tag @user a/b a-b x=y {} [0] (a) '"
        /**/ -- ~ \x00 \x01\x02 \x7f \x80\x9f \ufffd \ue000 \u00ad soft\u00adhyphen \u202eabc
        \u2066x\u2069 \ufeffbom""".split(),
    "words": """a The CAT Photo dogs pneumonoultramicroscopicsilicovolcanoconiosis iPhone McDonald
        XYZ zxqj""".split(),
}
# Ranges of Unicode with all kinds of lower case, combining marks, numbers that are not digits, and
# symbols.
RANGES = """21-7F A1-250 300-370 370-400 400-460 5D0-5EB 620-670 904-970 E01-E5C 1E00-2000 2010-2028
    2070-209D 20A0-20C0 2100-2200 2460-2500 2600-27C0 3041-3100 4E00-5000 AC00-B000 FB00-FB07
    FF01-FFBF 1D400-1D456 1F300-1F650"""
BLOCKS = [
    range(int(first, 16), int(end, 16))
    for first, end in (pair.split("-") for pair in RANGES.split())
]
SPACES = [
    *[" ", "  ", "\t", "\n", "\r\n"],
    *"\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e",
    *map(chr, range(0x2000, 0x200E)),
    *"\u2028\u2029\u202f\u205f\u2060\u3000\ufeff",
]


def odd_texts() -> list[str]:
    """Returns texts that are hard to split into tokens.

    Each fragment comes alone, then random mixtures of fragments.
    """
    generator = random.Random(seeded.SEED)
    fragments = [fragment for group in FRAGMENTS.values() for fragment in group]
    texts = ["", *fragments, *SPACES]
    texts += [f"a{space}b" for space in SPACES]
    texts += [f"{space}a{space}" for space in SPACES]
    repeated = {"a": 1000, "ab": 300, "!": 500, "7": 300, "é": 200, "😀": 100, "_": 100, "'s": 50}
    texts += [text * count for text, count in (repeated | {"ha": 77}).items()]
    for _ in range(150):
        texts += [
            mixture(generator, fragments),
            mixture(generator, FRAGMENTS[generator.choice(list(FRAGMENTS))]),
            joined(generator, SPACES, 2, 8).join(generator.choices(fragments, k=3)),
            joined(generator, string.punctuation, 2, 12),
            joined(generator, string.ascii_letters + string.digits + "'_-", 3, 25),
            joined(generator, string.ascii_lowercase, 20, 200),
            *(block_text(generator) for _ in range(3)),
        ]
    return texts


def joined(generator: random.Random, pieces: Sequence[str], fewest: int, most: int) -> str:
    """Returns between `fewest` and `most` of the pieces, drawn with replacement."""
    return "".join(generator.choices(pieces, k=generator.randint(fewest, most)))


def mixture(generator: random.Random, fragments: Sequence[str]) -> str:
    """Returns two to eight fragments, about half of them with white space after them."""
    pieces = generator.choices(fragments, k=generator.randint(2, 8))
    return "".join(
        piece + generator.choice(["", " ", "", generator.choice(SPACES)]) for piece in pieces
    )


def block_text(generator: random.Random) -> str:
    """Returns assigned characters from one or two blocks of Unicode."""
    blocks = generator.choices(BLOCKS, k=2)
    characters = (
        chr(generator.choice(generator.choice(blocks))) for _ in range(generator.randint(3, 15))
    )
    return "".join(character for character in characters if unicodedata.category(character) != "Cn")


# ------------------------------------------------------------------------------------ the command


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of packages, NumPy and Python."""
    found = {package: importlib.metadata.version(package) for package in (*packages, "numpy")}
    return found | {"python": platform.python_version()}


def torch_versions(*others: str) -> np.ndarray:
    """Returns what an NPZ file says of the versions."""
    found = versions("torch", "transformers", *others)
    return np.array([f"{name} {version}" for name, version in found.items()])


def main(
    names: tyro.conf.Positional[tuple[str, ...]] = NAMES, shared: Path = ROOT.parent / "shared"
) -> None:
    """Record the reference values of the tests.

    Args:
        names: Files to record: a model, methods, tpgm, preparation, or tokenizer.
        shared: Folder with OpenAI's files, for the tokenizer.
    """
    recorders = {
        "methods": record_methods,
        "tpgm": record_tpgm,
        "preparation": record_preparation,
        "tokenizer": partial(record_tokenizer, shared),
    }
    recorders |= {name: partial(record_model, name) for name in MODELS}
    for name in names:
        if name not in recorders:
            raise unknown("reference", name, recorders)
    for name in names:
        began = time.perf_counter()
        recorders[name]()
        print(f"{name}: {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, prog="python -m tools.record_reference")))
