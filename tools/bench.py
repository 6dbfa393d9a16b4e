"""Benchmarks: steps and image reading beside PyTorch's, memory on absent TPUs, image checks.

python -m tools.bench step --model ViT-B/32 --method lipsum --vs torch
python -m tools.bench compile --topology v5e:2x4 --model ViT-L/14 --batch-size 128
python -m tools.bench decode --vs torch
python -m tools.bench images

Developers run it for the tables of docs/speed.md and docs/scaling.md, and for docs/data.md.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image
from safetensors.numpy import load_file, save_file

import clip
import data
import lipsum
from support import devices, weights
from support.errors import InputError, exit_code, unknown
from support.run import processes

GIB = 2**30
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step on random images and weights."""

    model: str = "ViT-B/32"
    """A preset, such as ViT-B/16, or tiny. Its weights are random."""
    method: str = "lipsum"
    """A method of train.py that trains."""
    batch_size: int = 8
    """Images per step, over all devices."""
    precision: Precision = "float32"
    """Type that the towers compute in."""
    accumulate: int = 1
    """Parts that a batch is split into."""
    remat: bool = False
    """Compute each block again in the backward pass."""
    fsdp: bool = False
    """Spread weights and optimizer over the devices."""
    classes: int = 345
    """Classes; DomainNet's are 345."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())

    def config(self) -> clip.Config:
        """Returns the sizes of the model. Raises InputError for an unknown model or method."""
        trained = [name for name, method in lipsum.METHODS.items() if method.trained]
        if self.method not in trained:
            raise unknown("training method", self.method, trained)
        if self.model == "tiny":
            return weights.load("tiny")[0].config
        if self.model not in clip.PRESETS:
            raise unknown("model preset", self.model, [*clip.PRESETS, "tiny"])
        return clip.PRESETS[self.model]

    def heads(self, dim: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws a zero-shot head and a context head."""
        zero_shot, context = (
            clip.normalize(jax.random.normal(key, (count, dim))).T for count in (self.classes, 80)
        )
        return zero_shot, context

    def start(
        self, model: clip.CLIP, heads: tuple[jax.Array, jax.Array]
    ) -> tuple[lipsum.State, lipsum.Frozen]:
        """Returns the state that training starts at, and what is frozen."""
        method = lipsum.METHODS[self.method]
        dim = model.config.embedding_size
        frozen = lipsum.Frozen(
            lipsum.Classifier(model.vision, heads[0]),
            model.text,
            jnp.float32(100),
            lipsum.Settings(weight=method.weight),
            lipsum.Computation(self.precision, self.accumulate, self.remat),
            context_head=heads[1],
            second_moment=jnp.eye(dim) / dim,
        )
        return lipsum.initial_state(method, frozen), frozen

    def shapes(self, config: clip.Config) -> tuple[lipsum.State, lipsum.Frozen]:
        """Returns the shapes of what `start` returns."""
        key = jax.random.key(0)
        return jax.eval_shape(
            lambda: self.start(clip.CLIP(config, key), self.heads(config.embedding_size, key))
        )

    def batch_shapes(self, config: clip.Config, sharding: NamedSharding | None = None) -> Any:
        """Returns the shapes of a batch."""
        image = (self.batch_size, config.image_size, config.image_size, 3)
        return {
            "image": jax.ShapeDtypeStruct(image, jnp.uint8, sharding=sharding),
            "label": jax.ShapeDtypeStruct(image[:1], jnp.int32, sharding=sharding),
        }


# -------------------------------------------------------------------------------------- compiling


def topology_mesh(name: str) -> Mesh:
    """Returns a mesh of all cores of a TPU topology.

    Raises InputError if libtpu is missing or does not know the name.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    # Two of these commands may run at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        cores = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        raise InputError(
            f"--topology {name} is not known here ({str(error).splitlines()[0]}): pip install "
            f"'jax[tpu]=={jax.__version__}', and give a topology such as v5e:2x4 or v3:2x2"
        ) from error
    return Mesh(np.array(cores), ("data",), axis_types=(AxisType.Auto,))


def compiled_step(case: Case, config: clip.Config, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the step for the mesh's devices, from shapes alone."""
    shapes = case.shapes(config)
    shardings = devices.shardings(shapes, mesh, case.fsdp)
    state, frozen = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings
    )
    batch = case.batch_shapes(config, NamedSharding(mesh, PartitionSpec("data")))
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = key.update(sharding=NamedSharding(mesh, PartitionSpec()))
    step: Any = lipsum.training_step(lipsum.METHODS[case.method], shardings[0])
    return step.lower(state, frozen, batch, key).compile()


def collectives(program: str) -> dict[str, list[int]]:
    """Returns per kind of collective the bytes of each one's result on a device, from HLO's text.

    One in a loop counts once. On TPU, `all-reduce-scatter` is an all-reduce of which each device
    keeps a part: it is fused, and its result is the part.
    """
    kinds = "all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute"
    found: dict[str, list[int]] = {}
    counted = set()
    fused = ""  # result of the all-reduce-scatter that the lines are of, if they are of one
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            start = re.match(r"%all-reduce-scatter\S* .* -> (.*) {$", line)
            fused = start[1] if start else ""
        # The result of a `-start` has the operands, too.
        operation = re.search(rf" = (.*?) ({kinds})(?:-done)?\(", line)
        if not operation:
            continue
        result, kind = (fused, "all-reduce-scatter") if fused else operation.groups()
        channel = re.search(r"channel_id=\d+", line)
        if channel and not fused:  # fused ones may share a channel and are whole
            if (kind, channel[0]) in counted:  # parts of one that overlaps with computing
                continue
            counted.add((kind, channel[0]))
        arrays = re.findall(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", result)
        bits = (
            int(width or 8) * math.prod(map(int, filter(None, shape.split(","))))
            for width, shape in arrays
        )
        found.setdefault(kind, []).append(sum(bits) // 8)
    return found


def compile_command(
    case: Annotated[Case, tyro.conf.OmitArgPrefixes], topology: str = "v5e:2x4"
) -> None:
    """Compile the step by TPU's own compiler, without a TPU, and print the memory it needs.

    Args:
        case: What to compile.
        topology: Name and shape of the TPU, such as v3:2x2 (8 cores), v4:2x2x1, v5e:2x4, v6e:2x4.
    """
    config = case.config()
    mesh = topology_mesh(topology)
    if case.batch_size % (mesh.size * case.accumulate):
        raise InputError(
            f"--batch-size {case.batch_size} does not divide among {mesh.size} cores and "
            f"--accumulate {case.accumulate}: give a multiple of {mesh.size * case.accumulate}"
        )
    print(f"{topology}, {mesh.size} cores: {case}")
    try:
        compiled = compiled_step(case, config, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G", str(error))
        if not needed:
            raise
        print(f"  does not fit: it needs {needed[1]} GiB a core to compute in, of {needed[2]} GiB")
        return
    memory: Any = compiled.memory_analysis()
    held = memory.argument_size_in_bytes / GIB
    computing = memory.temp_size_in_bytes / GIB
    print(f"  fits: {held:.2f} GiB a core of weights, optimizer and images, {computing:.2f} to use")
    print("  collectives, MiB of results a core, in a loop over layers those of one layer:")
    for kind, sizes in collectives(compiled.as_text() or "").items():
        print(f"    {len(sizes)} {kind}, {sum(sizes) / 2**20:.2f} MiB")


# ----------------------------------------------------------------------------------------- timing


def matmul_flops(jaxpr: Any) -> int:
    """Counts the floating-point operations of matrix products, for a scan once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        parameters = jax.tree.leaves(equation.params)
        inner = sum(matmul_flops(each) for each in parameters if hasattr(each, "eqns"))
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = np.prod([shape[axis] for axis in contracted], dtype=np.int64)
            total += 2 * int(depth) * equation.outvars[0].aval.size
    return total


def matmul_rate(precision: str) -> float:
    """Measures the FLOP/s of a large matrix product: the best of ten."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), precision)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(11):  # the first, which compiles, is never the best
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def random_images(case: Case, config: clip.Config) -> dict[str, np.ndarray]:
    """Draws one batch, the same in every process."""
    random = np.random.default_rng(0)
    shape = (case.batch_size, config.image_size, config.image_size, 3)
    labels = random.integers(0, case.classes, case.batch_size, dtype=np.int32)
    return {"image": random.integers(0, 256, shape, dtype=np.uint8), "label": labels}


Advance = Callable[[], float]  # one step; returns its loss
WEIGHTS = "weights.safetensors"
HEADS = ("head", "context head")


def draw_weights(case: Case, folder: Path) -> Advance:
    """Writes random weights and heads to the file that both implementations read."""
    config = case.config()

    @eqx.filter_jit
    def draw(key: jax.Array) -> tuple[clip.CLIP, tuple[jax.Array, jax.Array]]:
        return clip.CLIP(config, key), case.heads(config.embedding_size, key)

    model, heads = draw(jax.random.key(0))
    arrays = clip.to_state_dict(model, "hugging_face") | dict(zip(HEADS, heads, strict=True))
    contiguous = {name: np.array(array, order="C") for name, array in arrays.items()}
    save_file(contiguous, folder / WEIGHTS)
    return lambda: 0.0


def jax_step(case: Case, folder: Path) -> Advance:
    """Prepares this project's step, with the settings of train.py and a compilation cache."""
    processes.keep_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    config = case.config()
    mesh = devices.device_mesh(case.batch_size, case.accumulate)
    arrays = load_file(folder / WEIGHTS)
    zero_shot, context = (jnp.asarray(arrays.pop(name)) for name in HEADS)
    start = clip.from_state_dict(arrays, config, "hugging_face", WEIGHTS), (zero_shot, context)
    del arrays
    state, frozen = devices.place(case.start(*start), mesh, case.fsdp)
    del start
    batch = devices.shard_batch(random_images(case, config), mesh)
    shardings = devices.shardings(state, mesh, case.fsdp)
    step = lipsum.training_step(lipsum.METHODS[case.method], shardings)
    key = jax.random.key(0)

    def advance() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return advance


def torch_step(case: Case, folder: Path) -> Advance:
    """Prepares PyTorch's step: `transformers`' towers and fused Adam, same weights and images."""
    import torch  # the extra `reference`
    import transformers

    config = case.config()
    hub_config = transformers.CLIPConfig.from_dict(weights.hugging_face_json(config))
    arrays = {name: torch.from_numpy(array) for name, array in load_file(folder / WEIGHTS).items()}
    head = arrays.pop(HEADS[0]).requires_grad_()
    models = [transformers.CLIPModel(hub_config) for _ in range(2)]
    for model in models:
        model.load_state_dict(arrays, strict=False)
    trained, frozen = models
    frozen.requires_grad_(False)
    del trained.text_model, trained.text_projection, frozen.logit_scale
    parameters = [*trained.vision_model.parameters(), *trained.visual_projection.parameters(), head]
    adam = torch.optim.Adam(parameters, lr=1e-5, fused=True)
    batch = random_images(case, config)
    pixels = torch.from_numpy(batch["image"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(batch["label"]).long()
    statistics = config.preparation.mean, config.preparation.deviation
    mean, deviation = (torch.tensor(x).reshape(1, 3, 1, 1) for x in statistics)

    def features(model: Any, images: Any) -> Any:
        pooled = model.visual_projection(model.vision_model(images).pooler_output)
        return torch.nn.functional.normalize(pooled, dim=-1)

    def penalty(x: Any, images: Any) -> Any:
        ids = torch.randint(0, config.vocabulary_size - 2, (80, 10))
        ids[:, 0], ids[:, -1] = config.start_token, config.end_token
        with torch.no_grad():
            before = features(frozen, images)
            pooled = frozen.text_projection(frozen.text_model(ids).pooler_output)
            texts = torch.nn.functional.normalize(pooled, dim=-1)
        return ((100 * (x - before) @ texts.T) ** 2).sum(dim=1).mean() / (2 * len(texts))

    def advance() -> float:
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bfloat16"):
            images = (pixels / 255 - mean) / deviation
            x = features(trained, images)
            loss = torch.nn.functional.cross_entropy(100 * x.float() @ head, labels)
            if case.method != "ft":
                loss = loss + penalty(x, images)
        loss.backward()
        adam.step()
        return loss.item()

    return advance


PREPARE = {"draw": draw_weights, "jax": jax_step, "torch": torch_step}


def work(kind: str, case: Case, folder: Path) -> None:
    """Answers each line of standard input with one more step's measurements, a line of JSON."""
    advance = PREPARE[kind](case, folder)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = advance()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
        if kind == "jax" and jax.default_backend() != "cpu":
            peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        print(json.dumps({"seconds": seconds, "loss": loss, "peak": peak / GIB}), flush=True)


class Worker:
    """A process of its own, whose memory is its own, that makes steps one by one when asked."""

    def __init__(self, kind: str, case: Case, folder: Path):
        arguments = ["--worker", kind, json.dumps(dataclasses.asdict(case)), str(folder)]
        self.process: Any = subprocess.Popen(
            [sys.executable, "-m", "tools.bench", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.first = self.step()

    def step(self) -> dict[str, float]:
        """Returns a step's measurements. Raises InputError if the process ended, as it printed."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise InputError("a benchmarked process ended: see above")
        return json.loads(answer)

    def close(self) -> None:
        """Waits for the process to end."""
        self.process.communicate()


def time_step(case: Case, steps: int = 10, vs_torch: bool = False) -> dict[str, dict[str, float]]:
    """Times the step of each implementation in turn. Returns a column of named values for each.

    Raises InputError for an unknown model or method, or if a timed process ended.
    """
    config = case.config()
    kinds = {"this project": "jax"} | ({"PyTorch": "torch"} if vs_torch else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Worker("draw", case, folder).close()
        workers = {name: Worker(kind, case, folder) for name, kind in kinds.items()}
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(steps):
            for name, worker in workers.items():
                measured[name].append(worker.step())
        for worker in workers.values():
            worker.close()
        again = Worker("jax", case, folder)  # its compiled step is in the cache
        again.close()
    columns = {}
    for name, worker in workers.items():
        median = statistics.median(step["seconds"] for step in measured[name])
        columns[name] = {
            "s/step": median,
            "images/s": case.batch_size / median,
            "peak GiB": measured[name][-1]["peak"],
            "first loss": worker.first["loss"],
            "first step, s": worker.first["seconds"],
        }
    ours = columns["this project"]
    step = lipsum.training_step(lipsum.METHODS[case.method])
    arguments = (*case.shapes(config), case.batch_shapes(config), jax.random.key(0))
    flops = matmul_flops(jax.make_jaxpr(step)(*arguments))
    ours["first step, warm cache, s"] = again.first["seconds"]
    ours["share of matmul peak"] = flops / ours["s/step"] / matmul_rate(case.precision)
    if vs_torch:
        torch = columns["PyTorch"]
        columns["ratio"] = {name: ours[name] / value for name, value in torch.items()}
    return columns


def step_command(
    case: Annotated[Case, tyro.conf.OmitArgPrefixes],
    steps: int = 10,
    vs: Literal["torch"] | None = None,
) -> None:
    """Time the training step here, after one step that compiles.

    Args:
        case: What to time.
        steps: Steps to time.
        vs: torch: also the same step in PyTorch (extra `reference`), with the ratio; for ft,
            lipsum, lipsum-exact, the last against PyTorch's lipsum.
    """
    if vs and case.method not in ("ft", "lipsum", "lipsum-exact"):
        raise InputError(f"--vs torch has no {case.method}: give ft, lipsum or lipsum-exact")
    columns = time_step(case, steps, vs == "torch")
    print(f"{os.cpu_count()} CPU cores: {case}")
    print(f"{'':28}" + "".join(f"{name:>14}" for name in columns))
    for name in columns["this project"]:
        cells = (f"{column[name]:.3f}" if name in column else "" for column in columns.values())
        print(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))


# ----------------------------------------------------------------------------------------- images


def our_batches(folder: Path, batch_size: int, workers: int) -> Iterator:
    """Yields augmented batches of a folder's JPEGs, as in training."""
    files = [data.ListedFile(path) for path in sorted(folder.glob("*/*.jpg"))]
    split = data.Split("train", ("one",), files, np.zeros(len(files), np.int32))
    return data.training_batches(split, clip.Preparation(224), batch_size, 0, workers)


def torch_batches(folder: Path, batch_size: int, workers: int) -> Iterator:
    """Yields the same in PyTorch, with processes as workers and torchvision's transforms."""
    import torch
    from torchvision import datasets, transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
        ]
    )
    images = datasets.ImageFolder(str(folder), augment)
    # Forked processes would inherit JAX's threads, stopped in the middle.
    context = "forkserver" if workers else None
    return iter(
        torch.utils.data.DataLoader(
            images, batch_size, True, num_workers=workers, multiprocessing_context=context
        )
    )


def decode_command(
    workers: int = 2,
    batch_size: int = 32,
    batches: int = 64,
    rounds: int = 7,
    vs: Literal["torch"] | None = None,
) -> None:
    """Time the reading of JPEGs, 500 x 375 pixels at quality 90, into augmented batches of 224.

    The first four batches per worker are not timed: they start the workers and fill the buffers.

    Args:
        workers: Threads, and in PyTorch processes.
        batch_size: Images per batch.
        batches: Batches to time per round.
        rounds: Rounds of each implementation, in turn.
        vs: torch: also PyTorch's DataLoader and torchvision (extra `decode`), with the ratio.
    """
    if vs and not all(map(importlib.util.find_spec, ("torch", "torchvision"))):
        raise InputError("--vs torch needs the extra decode: pip install '.[decode]'")
    random = np.random.default_rng(0)
    untimed = 4 * workers
    readers = {"this project": our_batches} | ({"PyTorch": torch_batches} if vs else {})
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "one").mkdir()
        for index in range(batch_size * (untimed + batches)):
            coarse = Image.fromarray(random.integers(0, 256, (75, 100, 3), np.uint8))
            photo = coarse.resize((500, 375), Image.Resampling.BICUBIC)
            photo.save(folder / "one" / f"{index}.jpg", quality=90)
        size = statistics.mean(path.stat().st_size for path in folder.glob("*/*.jpg")) / 1024
        for _ in range(rounds):
            for name, read in readers.items():
                reader = read(folder, batch_size, workers)
                for _ in itertools.islice(reader, untimed):
                    pass
                start = time.perf_counter()
                for _ in itertools.islice(reader, batches):
                    pass
                seconds[name].append((time.perf_counter() - start) / batches)
                del reader
    print(f"JPEGs of {size:.0f} KB, {workers} workers, batches of {batch_size}")
    rates = {name: batch_size / statistics.median(each) for name, each in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:14} {rate:7.1f} images/s")
    if vs:
        print(f"ratio {rates['this project'] / rates['PyTorch']:.2f}")


def images_command(
    count: int = 2000, workers: int = os.cpu_count() or 1, million: float = 0.6
) -> None:
    """Time the check of image files before a run, on drawn files that are in the disk's cache.

    Args:
        count: Files of each kind.
        workers: Threads.
        million: Millions of files to extrapolate to.
    """
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (50, 50, 3), np.uint8))
    photo = coarse.resize((400, 400), Image.Resampling.BICUBIC)
    drawing = Image.fromarray(np.uint8(255) * (random.random((16, 16)) < 0.8)).resize((256, 256))
    kinds = {"photo.jpg": photo, "photo.png": photo, "drawing.png": drawing}
    with tempfile.TemporaryDirectory() as name:
        for kind, image in kinds.items():
            files = [data.ListedFile(Path(name) / f"{index} {kind}") for index in range(count)]
            for file in files:
                image.save(file.path)
            labels = np.zeros(count, np.int32)
            start = time.perf_counter()
            data.check_images([data.Split("train", ("one",), files, labels)], workers)
            seconds = (time.perf_counter() - start) / count
            size = f"{image.width} x {image.height}, {files[0].path.stat().st_size / 1024:.0f} KB"
            minutes = f"{million * 1e6 * seconds / 60:.1f} min for {million} million"
            print(
                f"{kind} ({size}): {1e3 * seconds:.2f} ms a file with {workers} threads, {minutes}"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, kind, case, folder = sys.argv
        work(kind, Case(**json.loads(case)), Path(folder))
        sys.exit()
    app = tyro.extras.SubcommandApp()
    app.command(name="step")(step_command)
    app.command(name="compile")(compile_command)
    app.command(name="decode")(decode_command)
    app.command(name="images")(images_command)
    options = {"prog": "python -m tools.bench", "config": (tyro.conf.FlagCreatePairsOff,)}
    sys.exit(exit_code(lambda: app.cli(**options)))
