"""Mutation testing by hand-made mutants: does a test fail if an equation is wrong?

python -m tools.mutants             # before a release: all of them, about an hour on two cores
python -m tools.mutants --check     # only lists the mutants that no longer fit their files
python -m tools.mutants --module clip --only 3 14

Each mutant replaces one piece of one of the five files by something plausible and wrong, in a copy
of the repository, and runs that file's tests, the fastest first. The exit code is 1 if a mutant
survives, that is, if no test fails: it asks for a test, or is no real change.
"""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

ROOT = Path(__file__).parents[1]
Module = Literal["lipsum", "clip", "data", "eval", "train"]
TESTS: dict[Module, list[str]] = {  # as arguments of pytest
    "lipsum": ["tests/numerics/test_lipsum.py", "tests/numerics/test_scaling.py"],
    # Models of published sizes take minutes, and run the same code as the tiny one.
    "clip": [
        "tests/numerics/test_clip.py",
        "tests/numerics/test_scaling.py",
        "tests/files/test_weights.py",
        "-k",
        "not vit",
    ],
    "data": ["tests/numerics/test_data.py"],
    "eval": ["tests/numerics/test_eval.py", "tests/commands/test_train.py"],
    "train": ["tests/commands/test_train.py", "tests/commands/test_resume.py"],
}

# What the mutant does, the text it replaces (which occurs once in the file), and its replacement.
TABLE: dict[Module, list[tuple[str, str, str]]] = {
    "lipsum": [
        (
            "cross-entropy: a sum over the batch",
            "return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(u, labels))",
            "return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(u, labels))",
        ),
        ("the energy's sign", "return -images @ texts.T", "return images @ texts.T"),
        (
            "energy gap: the square of a mean",
            "jnp.mean((energy(images, texts) - energy(zero_shot_images, texts)) ** 2)",
            "jnp.mean(energy(images, texts) - energy(zero_shot_images, texts)) ** 2",
        ),
        (
            "closed-form gap: only the diagonal of C2",
            "difference @ second_moment * difference",
            "difference * jnp.diagonal(second_moment)[None] * difference",
        ),
        (
            "feature distortion: squared norms",
            "jnp.mean(jnp.linalg.norm(images - zero_shot_images, axis=1))",
            "jnp.mean(jnp.sum((images - zero_shot_images) ** 2, axis=1))",
        ),
        (
            "random texts lack the last id",
            "0, text.token_embedding.shape[0] - 2)",
            "0, text.token_embedding.shape[0] - 3)",
        ),
        ("random texts may contain a special token", "(ids >= token)", "(ids > token)"),
        (
            "random texts step over the higher special token first",
            "in sorted((text.start_token, text.end_token))",
            "in sorted((text.start_token, text.end_token), reverse=True)",
        ),
        (
            "every step draws the same random texts",
            "frozen.settings.text_length, key)",
            "frozen.settings.text_length, jax.random.key(0))",
        ),
        ("a user's text may be drawn twice in a step", "replace=False)", "replace=True)"),
        (
            "embeddings of many texts are not normalised",
            "lambda one: clip.normalize(text(one))",
            "text",
        ),
        (
            "C2 is centred",
            "return features.T @ features / len(ids)",
            "return (features - jnp.mean(features, axis=0)[None]).T @ features / len(ids)",
        ),
        (
            "Lipsum-FT: 1 / M for 1 / 2M",
            "/ (2 * len(texts))  # equation 7",
            "/ len(texts)  # equation 7",
        ),
        (
            "Lipsum-FT: energies without tau",
            "v = frozen.tau * (given.features @ texts.T)  # equation 8\n"
            "    zero_shot_v = frozen.tau * (given.zero_shot_features @ texts.T)",
            "v = given.features @ texts.T  # equation 8\n"
            "    zero_shot_v = given.zero_shot_features @ texts.T",
        ),
        (
            "Lipsum-FT, exact: tau for tau squared",
            "return frozen.tau**2 / 2 *",
            "return frozen.tau / 2 *",
        ),
        (
            "L2SP leaves the head out",
            "        given.classifier,\n        given.frozen.zero_shot,\n",
            "        given.classifier.vision,\n        given.frozen.zero_shot.vision,\n",
        ),
        (
            "KL's direction",
            "jnp.exp(zero_shot_log_p) * (zero_shot_log_p - log_p)",
            "jnp.exp(log_p) * (log_p - zero_shot_log_p)",
        ),
        ("T for T squared", "return temperature**2 *", "return temperature *"),
        (
            "KD: the teacher has the student's head",
            "logits(given.zero_shot_features, frozen.zero_shot.head, frozen.tau)",
            "logits(given.zero_shot_features, given.classifier.head, frozen.tau)",
        ),
        ("MSE, fixed: divided by the batch size", "/ (2 * v.shape[1])", "/ (2 * v.shape[0])"),
        (
            "FeatKD: a mean over dimensions",
            "jnp.mean(jnp.sum((given.features - given.zero_shot_features) ** 2, axis=1))",
            "jnp.mean((given.features - given.zero_shot_features) ** 2)",
        ),
        (
            "the teacher is the student",
            "embed_images(frozen.zero_shot.vision, frozen, batch)",
            "embed_images(classifier.vision, frozen, batch)",
        ),
        (
            "lambda left out",
            "fit + loss_weight(method, frozen.settings) * penalty",
            "fit + penalty",
        ),
        (
            "accumulation reads the first part again and again",
            "jax.lax.scan(add, zeros, split)[0]",
            "jax.lax.scan(add, zeros, {name: jnp.repeat(x[:1], parts, axis=0) for name, x in "
            "split.items()})[0]",
        ),
        ("accumulation: a sum over parts", "lambda total: total / parts", "lambda total: total"),
        (
            "the warm-up lasts a step too long",
            "[rise, fall], [warmup_steps])",
            "[rise, fall], [warmup_steps + 1])",
        ),
        ("the warm-up is rounded", "math.floor(warmup * steps)", "round(warmup * steps)"),
        ("the rate does not reach 0", "max(steps - warmup_steps, 1)", "max(steps, 1)"),
        ("Adam's second beta", "b2=0.999", "b2=0.99"),
        ("Adam's epsilon", "eps=1e-8)", "eps=1e-6)"),
        ("EMA: d and 1 - d", "decay * old + (1 - decay) * new", "(1 - decay) * old + decay * new"),
        (
            "EMA starts from zeros",
            "copy() if method.averaged else None",
            "jax.tree.map(jnp.zeros_like, classifier) if method.averaged else None",
        ),
        (
            "EMA averages the weights before the update",
            "moving_average(average, classifier, average_decay(settings))",
            "moving_average(average, state.classifier, average_decay(settings))",
        ),
        (
            "a step's key is the run's",
            "step_key = jax.random.fold_in(key, state.step)",
            "step_key = key",
        ),
        ("a fixed head is trained", "if settings.fixed_head:", "if False:"),
        (
            "the logged rate is the next step's",
            "rate = learning_rate(settings)(state.step)",
            "rate = learning_rate(settings)(state.step + 1)",
        ),
        (
            "the logged gradient norm is the update's",
            "norm = optax.tree.norm(gradient)\n",
            "norm = optax.tree.norm(updates)\n",
        ),
        (
            "the linear probe stops early",
            "(optax.tree.norm(gradient) > tolerance)",
            "(optax.tree.norm(gradient) > 30 * tolerance)",
        ),
        ("the linear probe returns tau W", "return scaled_head / tau,", "return scaled_head,"),
        (
            "WiSE: alpha and 1 - alpha",
            "(1 - alpha) * start + alpha * end",
            "alpha * start + (1 - alpha) * end",
        ),
        ("soup: later members weigh more", "mean + (new - mean) / count", "(mean + new) / 2"),
        (
            "greedy: a member without effect is kept",
            "accuracy_of([*members, index])) > best",
            "accuracy_of([*members, index])) >= best",
        ),
        ("greedy: one member too many", "len(members) < most and", "len(members) <= most and"),
        (
            "TPGM: one ball for all layers",
            "range(int(clip.is_stacked(clip.leaf_name(path))), leaf.ndim)",
            "range(leaf.ndim)",
        ),
        (
            "MARS: columns for rows",
            "in_row = axes[1:] if len(axes) > 1 else axes",
            "in_row = axes[:-1] if len(axes) > 1 else axes",
        ),
        (
            "TPGM: weights outside the fine-tuned ones' ball",
            "jnp.where(ratio < 1, ratio, 1)",
            "ratio",
        ),
        ("TPGM: the bare distance", "(distance + 1e-8)", "jnp.where(distance > 0, distance, 1)"),
        ("TPGM-C: a penalty on radii, not their squares", "jnp.sum(radius**2)", "jnp.sum(radius)"),
        (
            "TPGM: radii without an upper bound",
            "jnp.clip(radius, 1e-8, jnp.maximum(bound, 1e-8))",
            "jnp.maximum(radius, 1e-8)",
        ),
    ],
    "clip": [
        ("QuickGELU's constant", "1.702 * x", "1.7 * x"),
        ("GELU is the tanh approximation", "approximate=False", "approximate=True"),
        ("no causal mask", "        if self.causal:", "        if False:"),
        (
            "the last block's causal mask is the first token's",
            "rows = positions if only is None else only",
            "rows = positions[: len(queries)]",
        ),
        ("the last block adds the first token", "x[only]) + attended", "x[:1]) + attended"),
        ("softmax without a temperature", "scores / query.shape[-1] ** 0.5", "scores"),
        ("softmax over queries", "jax.nn.softmax(scores)", "jax.nn.softmax(scores, axis=-2)"),
        (
            "bfloat16: scores are rounded",
            "preferred_element_type=_at_least_float32(x)",
            "preferred_element_type=x.dtype",
        ),
        (
            "the perceptron reads the first LayerNorm",
            "self.mlp(jax.vmap(self.layer_norm2)(x))",
            "self.mlp(jax.vmap(self.layer_norm1)(x))",
        ),
        ("patches are transposed", ".transpose(0, 2, 4, 1, 3)", ".transpose(0, 2, 4, 3, 1)"),
        (
            "images: the first patch for the class token",
            "first = jnp.int32(0)",
            "first = jnp.int32(1)",
        ),
        (
            "short texts have the last positions",
            "self.position_embedding[: ids.size]",
            "self.position_embedding[-ids.size :]",
        ),
        ("the end token is the highest id", "jnp.argmax(ids == self.end_token)", "jnp.argmax(ids)"),
        (
            "the text tower's last LayerNorm ignores epsilon",
            "self.layer_norm_final = eqx.nn.LayerNorm(width, config.layer_norm_epsilon)",
            "self.layer_norm_final = eqx.nn.LayerNorm(width)",
        ),
        (
            "a new model has a logits' scale for its log",
            "jnp.log(jnp.float32(1 / 0.07))",
            "jnp.float32(1 / 0.07)",
        ),
        (
            "query and key are read from each other's weights",
            '"attn.in_proj_", 0),\n        ("key", "self_attn.k_proj", "attn.in_proj_", 1)',
            '"attn.in_proj_", 1),\n        ("key", "self_attn.k_proj", "attn.in_proj_", 0)',
        ),
        (
            "OpenAI's visual projection is not transposed",
            '"visual_projection.weight", "visual.proj", None, True)',
            '"visual_projection.weight", "visual.proj")',
        ),
        (
            "weights with some NaN are taken",
            "elif not np.all(np.isfinite(state[name])):",
            "elif not np.any(np.isfinite(state[name])):",
        ),
        (
            "one norm for a whole batch",
            "jnp.linalg.norm(x, axis=-1, keepdims=True)",
            "jnp.linalg.norm(x, keepdims=True)",
        ),
        (
            "bytes are divided by 256",
            "images.astype(jnp.float32) / 255",
            "images.astype(jnp.float32) / 256",
        ),
        (
            "the means of images are not subtracted",
            "return (images - per_channel(preparation.mean)) /",
            "return images /",
        ),
        (
            "bfloat16: LayerNorms are cast",
            "return node if isinstance(node, eqx.nn.LayerNorm) else node.astype(precision)",
            "return jax.tree.map(lambda leaf: leaf.astype(precision), node)",
        ),
        (
            "bfloat16: embeddings are normalised before the cast",
            "normalize(embeddings.astype(_at_least_float32(embeddings)))",
            "normalize(embeddings).astype(_at_least_float32(embeddings))",
        ),
        (
            "prompts are in another order than their embeddings",
            "for template in templates for name in classes]",
            "for name in classes for template in templates]",
        ),
        (
            "the zero-shot head is not normalised",
            "normalize(jnp.mean(features, axis=0)).T",
            "jnp.mean(features, axis=0).T",
        ),
        (
            "the context head is not normalised",
            "normalize(jnp.mean(features, axis=1)).T",
            "jnp.mean(features, axis=1).T",
        ),
        ("numbers are words, not single digits", "\\\\p{N}|[^", "\\\\p{N}+|[^"),
        (
            "HTML entities are unescaped once",
            "html.unescape(html.unescape(ftfy.fix_text(text)))",
            "html.unescape(ftfy.fix_text(text))",
        ),
        (
            "a truncated text loses its end token",
            "tokens = [config.start_token, *encoding.ids[:room], config.end_token]",
            "tokens = [config.start_token, *encoding.ids, config.end_token][: "
            "config.context_length]",
        ),
        ("texts are cut after the shortest one", "1 + np.max(np.argmax", "1 + np.min(np.argmax"),
    ],
    "data": [
        (
            "held-out images are trained on",
            "take(train, np.flatnonzero(~held_out), train.name)",
            "take(train, np.arange(len(order)), train.name)",
        ),
        (
            "held-out images are not spread over classes",
            "order[every - 1 :: every]",
            "order[: len(order) // every]",
        ),
        (
            "kept classes keep their old labels",
            "labels=np.searchsorted(kept, images.labels).astype(np.int32)",
            "labels=images.labels.astype(np.int32)",
        ),
        (
            "a class's only image is held out",
            "np.bincount(train.labels)[train.labels] > 1",
            "np.bincount(train.labels)[train.labels] > 0",
        ),
        ("images are not decoded by the check", "image.load()", "image.verify()"),
        (
            "the check takes the first images for a sample",
            "np.linspace(0, len(split) - 1, count)",
            "np.linspace(0, count - 1, count)",
        ),
        (
            "16-bit images are clipped",
            "np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255)",
            "np.clip(np.asarray(image).astype(np.int32), 0, 255)",
        ),
        (
            "the longer side is rounded",
            "int(edge * side / min(image.size))",
            "round(edge * side / min(image.size))",
        ),
        (
            "centre crop: ties are rounded up",
            "(round((side - size) / 2) for side in (width, height))",
            "((side - size + 1) // 2 for side in (width, height))",
        ),
        (
            "evaluation: a bilinear filter",
            "image.resize((width, height), preparation.resample)",
            "image.resize((width, height), Image.Resampling.BILINEAR)",
        ),
        (
            "squashed images keep their aspect ratio",
            "    if preparation.squash:",
            "    if not preparation:",
        ),
        (
            "training crops are always bicubic",
            ".resize((size, size), preparation.resample, box)",
            ".resize((size, size), Image.Resampling.BICUBIC, box)",
        ),
        ("crops of at least a quarter", "random.uniform(0.08, 1)", "random.uniform(0.25, 1)"),
        (
            "aspect ratios: uniform, not their logarithms",
            "math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))",
            "random.uniform(3 / 4, 4 / 3)",
        ),
        (
            "crops never touch the right edge",
            "int(random.integers(width - w + 1))",
            "int(random.integers(max(width - w, 1)))",
        ),
        (
            "images are turned upside down",
            "Image.Transpose.FLIP_LEFT_RIGHT",
            "Image.Transpose.FLIP_TOP_BOTTOM",
        ),
        (
            "a JPEG is decoded too small for its crop",
            "smallest = math.ceil(width * size / w), math.ceil(height * size / h)",
            "smallest = size, size",
        ),
        (
            "a drafted JPEG's scale is that of its rounded size",
            "drafted[1][2] / width if drafted else 1",
            "image.size[0] / width if drafted else 1",
        ),
        ("the seed does not reach the batches", ".seed(seed)", ".seed(0)"),
        (
            "every epoch has the same order and crops",
            ".repeat(epochs)",
            ".repeat(epochs, reseed_each_epoch=False)",
        ),
        (
            "a resumed run starts at the first batch",
            "parts[start * part.count + part.index ::",
            "parts[part.index ::",
        ),
        (
            "padding is valid",
            '"label": np.int32(0), "valid": np.bool_(False)',
            '"label": np.int32(0), "valid": np.bool_(True)',
        ),
        (
            "every process evaluates the first part",
            "return iter(parts[part.index :: part.count]",
            "return iter(parts[:: part.count]",
        ),
    ],
    "eval": [
        (
            "NLL of the predicted class",
            '"nll": negative_log_likelihood(label_log_probability),',
            '"nll": negative_log_likelihood(np.log(predictions.confidence)),',
        ),
        ("bins are closed below", "right=True", "right=False"),
        (
            "ECE: bins balance each other",
            "np.sum(np.abs(hits - expected_hits))",
            "np.abs(np.sum(hits - expected_hits))",
        ),
        ("H is the arithmetic mean", "2 * seen * unseen / (seen + unseen)", "(seen + unseen) / 2"),
        (
            "ensemble: log-probabilities are averaged",
            "jax.nn.logsumexp(per_member, axis=0) - math.log(len(members))",
            "jnp.mean(per_member, axis=0)",
        ),
        (
            "classes that are not compared have a logit of 0",
            "jnp.where(compared[None], u, -jnp.inf)",
            "jnp.where(compared[None], u, 0)",
        ),
        ("padding rows are counted", "[x[valid] for x in found]", "list(found)"),
        (
            "the last batch is lost",
            "    if pending is not None:\n        collect(pending)\n    return",
            "    return",
        ),
        (
            "the reference is called a shift",
            '"reference" if name == setup.sources.reference else "shift"',
            '"shift" if name == setup.sources.reference else "reference"',
        ),
        (
            "seen and unseen change places",
            "for x in (is_seen, ~is_seen)",
            "for x in (~is_seen, is_seen)",
        ),
        (
            "WiSE's models change places",
            "lipsum.wise(setup.zero_shot, run.classifier, alpha)",
            "lipsum.wise(run.classifier, setup.zero_shot, alpha)",
        ),
        ("TPGM trains on augmented images", 'augmentation="off"', 'augmentation="crop"'),
        (
            "an ensemble has any number of members",
            'combine_greedily(runs, "ensemble", 4, overwrite)',
            'combine_greedily(runs, "ensemble", len(runs.folders), overwrite)',
        ),
        (
            "the brute-force gap weighs parts equally",
            "np.average(gaps, weights=weights)",
            "np.average(gaps)",
        ),
        (
            "predict: tau is its logarithm",
            "jnp.exp(models[0].logit_scale)",
            "models[0].logit_scale",
        ),
    ],
    "train": [
        (
            "selection: a later tie wins",
            'if accuracy > progress["best_accuracy"]',
            'if accuracy >= progress["best_accuracy"]',
        ),
        (
            "the last step is not evaluated",
            "return step == last or (step > 0 and step % every == 0)",
            "return step > 0 and step % every == 0",
        ),
        (
            "EMA: the last weights are kept, not their average",
            "best = snapshot.evaluated",
            "best = snapshot.classifier",
        ),
        (
            "a resumed run trains on the first batches",
            "        execution.workers,\n        first,\n",
            "        execution.workers,\n        0,\n",
        ),
        (
            "a checkpoint is one step behind",
            "= step, earlier_seconds",
            "= max(step - 1, 0), earlier_seconds",
        ),
        (
            "a resumed run forgets its earlier seconds",
            "earlier_seconds + log.seconds()",
            "log.seconds()",
        ),
        (
            "the seed does not reach the random texts",
            "key = jax.random.key(run.seed)",
            "key = jax.random.key(0)",
        ),
        ("Scratch-FT starts from the zero-shot head", "0 * zero_shot.head", "zero_shot.head"),
        (
            "LP's tower is trained",
            "last = settings.steps if method.trained else 0",
            "last = settings.steps",
        ),
        (
            "a state that is not finite is saved",
            "                log.settle(written=saves)  # a state that is not finite is not saved\n"
            "",
            "",
        ),
        (
            "Lipsum-FT, exact ignores the user's texts",
            'if method.guidance == "averaged" and guidance_ids is not None:',
            "if False:",
        ),
        (
            "the selected step is the last one",
            '"step": progress["best_step"]}',
            '"step": progress["step"]}',
        ),
    ],
}


class Mutant(NamedTuple):
    """One replacement in a file."""

    module: Module
    what: str
    old: str
    new: str

    @property
    def file(self) -> str:
        """The name of the file in the repository."""
        return f"{self.module}.py"

    def problem(self) -> str:
        """Returns why the mutant does not fit its file, or ""."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            return f"what it replaces occurs {text.count(self.old)} times"
        try:
            ast.parse(text.replace(self.old, self.new))
        except SyntaxError as error:
            return f"the changed file cannot be parsed: {error}"
        return "it changes nothing" if self.old == self.new else ""

    def apply(self, folder: Path) -> None:
        """Changes the file in a copy of the repository."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        (folder / self.file).write_text(text.replace(self.old, self.new), encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


ALL = [Mutant(module, *row) for module, rows in TABLE.items() for row in rows]


def copy_repository(folder: Path) -> None:
    """Copies what git tracks, as it is in the checkout now."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, *arguments: str) -> tuple[list[str], bool]:
    """Runs pytest in the copy up to the first failure. Returns its output and whether it passed."""
    # Compiling takes most of the time, and a mutant changes few programs: a cache has the others.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Files that change within a second may have the time stamp of their stale bytecode.
    environment = os.environ | cache | {"PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1_800
        )
    except subprocess.TimeoutExpired:
        return ["FAILED by not ending"], False
    return [*done.stdout.splitlines(), *done.stderr.splitlines()], done.returncode == 0


def fastest_first(folder: Path, module: Module) -> list[str]:
    """Returns the ids of a file's tests by time, so that a mutant is caught early.

    Raises RuntimeError if one fails.
    """
    lines, passed = run_tests(folder, *TESTS[module], "--durations=0", "--durations-min=0")
    if not passed:
        raise RuntimeError("\n".join(["the tests fail without a mutant", *lines[-40:]]))
    seconds: dict[str, float] = defaultdict(float)
    for words in (line.split(maxsplit=2) for line in lines):
        if len(words) == 3 and words[1] in ("setup", "call", "teardown") and words[0].endswith("s"):
            seconds[words[2]] += float(words[0][:-1])
    return sorted(seconds, key=seconds.__getitem__)


def catching_test(folder: Path, mutant: Mutant, tests: list[str]) -> str:
    """Returns the first test that fails because of a mutant, or ""."""
    mutant.apply(folder)
    lines, passed = run_tests(folder, *tests)
    shutil.copy2(ROOT / mutant.file, folder / mutant.file)
    if passed:
        return ""
    failures = (line for line in lines if line.startswith(("FAILED ", "ERROR ")))
    return next(failures, lines[-1]).split(" - ")[0].partition(" ")[2]


def main(
    module: tuple[Module, ...] = tuple(TESTS),
    only: tuple[int, ...] = (),
    check: bool = False,
) -> int:
    """Run the chosen mutants and print what catches each. Return the exit code.

    Args:
        module: Only mutants of these files.
        only: Only the mutants with these numbers.
        check: Only list the mutants that do not fit their files.
    """
    chosen = {
        number: mutant
        for number, mutant in enumerate(ALL, start=1)
        if mutant.module in module and (not only or number in only)
    }
    misfits = [
        f"{number:3} {mutant}: {problem}"
        for number, mutant in chosen.items()
        if (problem := mutant.problem())
    ]
    print(f"{len(chosen) - len(misfits)} of {len(chosen)} mutants fit", *misfits, sep="\n")
    if check or misfits:
        return 1 if misfits else 0
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        tests = {name: fastest_first(folder, name) for name in {m.module for m in chosen.values()}}
        for number, mutant in chosen.items():
            start = time.monotonic()
            caught_by = catching_test(folder, mutant, tests[mutant.module])
            seconds = time.monotonic() - start
            line = f"{number:3} {mutant}: {caught_by or 'SURVIVED'} ({seconds:.0f} s)"
            print(line, flush=True)
            if not caught_by:
                survivors.append(line)
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} are caught", *survivors, sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tools.mutants"))
