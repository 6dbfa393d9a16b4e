"""Benchmarks of the training step: its speed here, beside PyTorch's, and its memory on TPUs that are not here.

python -m tools.bench step --model ViT-B/32 --method lipsum --vs torch
python -m tools.bench run
python -m tools.bench compile --topology v5e:2x4 --model ViT-L/14 --batch-size 128 --precision bfloat16
"""

import dataclasses
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import clip
import data
import eval as evaluation
import lipsum
from support import devices, weights
from support.errors import InputError, check_positive, exit_code, unknown
from support.layouts import minidomain
from support.run import processes
from support.run import setup as opening
from support.run.options import DEFAULTS

GIB = 2**30
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

    def config(self) -> clip.Config:
        """The sizes of the model. Raises InputError for an unknown model or method."""
        trained = [name for name, method in lipsum.METHODS.items() if method.trained]
        if self.method not in trained:
            raise unknown("training method", self.method, trained)
        if self.model == "tiny":
            return weights.load("tiny")[0].config
        if self.model not in clip.PRESETS:
            raise unknown("model preset", self.model, [*clip.PRESETS, "tiny"])
        return clip.PRESETS[self.model]

    def heads(self, dim: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A zero-shot and a context head."""
        zero_shot, context = (
            clip.normalize(jax.random.normal(key, (count, dim))).T for count in (self.classes, 80)
        )
        return zero_shot, context

    def start(
        self, model: clip.CLIP, heads: tuple[jax.Array, jax.Array]
    ) -> tuple[lipsum.State, lipsum.Frozen]:
        """The state, and what is frozen."""
        method = lipsum.METHODS[self.method]
        dim = model.config.embedding_size
        frozen = lipsum.Frozen(
            lipsum.Classifier(model.vision, heads[0]), model.text, heads[1], jnp.float32(100),
            lipsum.Settings(weight=method.weight), lipsum.Computation(self.precision, self.accumulate, self.remat),
            second_moment=jnp.eye(dim) / dim,
        )  # fmt: skip
        return lipsum.initial_state(frozen, averaged=method.averaged), frozen

    def shapes(self, config: clip.Config) -> tuple[lipsum.State, lipsum.Frozen]:
        """The shapes of `start`."""
        key = jax.random.key(0)
        return jax.eval_shape(
            lambda: self.start(clip.CLIP(config, key), self.heads(config.embedding_size, key))
        )


# ------------------------------------------------------------------------------------------------------------ compiling


def topology_mesh(name: str) -> Mesh:
    """A mesh of all cores of a TPU topology. Raises InputError if libtpu is missing or does not know the name."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    os.environ.setdefault(
        "ALLOW_MULTIPLE_LIBTPU_LOAD", "1"
    )  # two of these commands may run at once
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:
        advice = f"pip install 'jax[tpu]=={jax.__version__}', and give a topology such as v5e:2x4 or v3:2x2"
        raise InputError(
            f"--topology {name} is not known here ({str(error).splitlines()[0]}): {advice}"
        ) from error
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def batch_shapes(
    case: Case, config: clip.Config, sharding: NamedSharding | None = None
) -> dict[str, Any]:
    """The shapes of a batch."""
    image = (case.batch_size, config.image_size, config.image_size, 3)
    return {
        "image": jax.ShapeDtypeStruct(image, jnp.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct(image[:1], jnp.int32, sharding=sharding),
    }


def compiled_step(case: Case, config: clip.Config, mesh: Mesh) -> jax.stages.Compiled:
    """The step as compiled for the mesh's devices, from shapes alone."""
    shapes = case.shapes(config)
    shardings = devices.shardings(shapes, mesh, case.fsdp)
    state, frozen = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings
    )
    batch = batch_shapes(case, config, NamedSharding(mesh, PartitionSpec("data")))
    key = jax.eval_shape(lambda: jax.random.key(0)).update(
        sharding=NamedSharding(mesh, PartitionSpec())
    )
    step: Any = lipsum.training_step(lipsum.METHODS[case.method].loss, shardings[0])
    return step.lower(state, frozen, batch, key).compile()


COLLECTIVES = ("all-reduce", "reduce-scatter", "all-gather", "all-to-all", "collective-permute")


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Counts the collective operations in a program by kind. One in a loop over layers counts once."""
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text() or "")
    return dict(Counter(found))


def matmul_flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products in a jaxpr; those in a scan count once per iteration."""
    total = 0
    for equation in jaxpr.eqns:
        inner = sum(
            matmul_flops(each) for each in jax.tree.leaves(equation.params) if hasattr(each, "eqns")
        )
        total += inner * equation.params.get("length", 1)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod(
                [equation.invars[0].aval.shape[axis] for axis in contracted], dtype=np.int64
            )
            total += 2 * int(depth) * equation.outvars[0].aval.size
    return total


def step_flops(case: Case, config: clip.Config) -> int:
    """Floating-point operations of the matrix products of one step."""
    step = lipsum.training_step(lipsum.METHODS[case.method].loss)
    return matmul_flops(
        jax.make_jaxpr(step)(*case.shapes(config), batch_shapes(case, config), jax.random.key(0))
    )


def compile_command(
    case: Annotated[Case, tyro.conf.OmitArgPrefixes], topology: str = "v5e:2x4", cost: bool = False
) -> None:
    """Compile the step for a TPU topology, by TPU's own compiler and without a TPU, and print what it needs.

    Args:
        case: What to compile.
        topology: Name and shape of the TPU, such as v3:2x2 (8 cores), v4:2x2x1, v5e:2x4, v6e:2x4.
        cost: Also count operations and memory traffic, which compiles three more programs.
    """
    config = case.config()
    mesh = topology_mesh(topology)
    if case.batch_size % (mesh.size * case.accumulate):
        raise InputError(
            f"--batch-size {case.batch_size} does not divide among {mesh.size} cores: give a multiple"
        )
    options = "".join(f" --{name}" for name in ("fsdp", "remat") if getattr(case, name))
    options += f" --accumulate {case.accumulate}" if case.accumulate > 1 else ""
    print(
        f"{case.model} {case.method}, {case.batch_size} images, {case.precision}, {mesh.size} x {topology}{options}"
    )
    start = time.perf_counter()
    try:
        compiled = compiled_step(case, config, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"([\d.]+)G\)? (?:of|exceeds available HBM) \(?([\d.]+)G", str(error))
        if not needed:
            raise
        print(f"  does not fit: it needs {needed[1]} GiB a core to compute in, of {needed[2]} GiB")
        return
    memory: Any = compiled.memory_analysis()
    held, computing = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
    print(
        f"  fits: {held:.2f} GiB a core of weights, optimizer and images, {computing:.2f} to compute in"
    )
    kinds = ", ".join(f"{count} {kind}" for kind, count in collectives(compiled).items())
    print(f"  collectives: {kinds or 'none'}; compiled in {time.perf_counter() - start:.0f} s")
    if cost:
        flops, traffic = unrolled_cost(case, config, mesh)
        print(
            f"  {flops / 1e12:.2f} TFLOP and {traffic / 1e9:.1f} GB of memory traffic a core and step"
        )


def unrolled_cost(case: Case, config: clip.Config, mesh: Mesh) -> tuple[float, float]:
    """FLOPs and bytes of memory traffic a core and step, by the compiler's own account.

    That account counts a loop's body once. So three shallow models are compiled without loops, and their differences
    are added up per layer.
    """

    def cost(vision: int, text: int) -> np.ndarray:
        sizes = {"vision": vision, "text": text}
        towers = {
            name: dataclasses.replace(getattr(config, name), layers=count)
            for name, count in sizes.items()
        }
        with mock.patch.object(jax.lax, "scan", partial(jax.lax.scan, unroll=True)):
            found: Any = compiled_step(
                case, dataclasses.replace(config, **towers), mesh
            ).cost_analysis()
        return np.array([found["flops"], found["bytes accessed"]])

    base = cost(1, 1)
    layers = (cost(2, 1) - base) * (config.vision.layers - 1) + (cost(1, 2) - base) * (
        config.text.layers - 1
    )
    return tuple((base + layers).tolist())


# -------------------------------------------------------------------------------------------------------------- running


def random_images(case: Case, config: clip.Config) -> dict[str, np.ndarray]:
    """One batch, the same in every process."""
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
    save_file(
        {name: np.array(array, order="C") for name, array in arrays.items()}, folder / WEIGHTS
    )
    return lambda: 0.0


def jax_step(case: Case, folder: Path) -> Advance:
    """The step of this project, compiled into a cache in `folder`, with the settings of train.py."""
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
    step = lipsum.training_step(
        lipsum.METHODS[case.method].loss, devices.shardings(state, mesh, case.fsdp)
    )
    key = jax.random.key(0)

    def advance() -> float:
        nonlocal state
        state, metrics = step(state, frozen, batch, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return advance


def torch_step(case: Case, folder: Path) -> Advance:
    """The same step in PyTorch: `transformers`' towers and fused Adam, on the same weights and images."""
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
    mean, deviation = (
        torch.tensor(x).reshape(1, 3, 1, 1) for x in (config.image_mean, config.image_deviation)
    )

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


def seconds_per_call(repeats: int, compute: Callable[[], Any]) -> list[float]:
    """The times of calls, after one that compiles."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        compute()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def matmul_rate(precision: str) -> float:
    """FLOP/s of a large matrix product on the same devices: the best of ten."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), precision)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / min(seconds_per_call(10, lambda: product(x, x).block_until_ready()))


def worker(kind: str, case: Case, folder: Path) -> None:
    """Answers each line of standard input with the measurements of one more step, as a line of JSON."""
    advance = {"draw": draw_weights, "jax": jax_step, "torch": torch_step}[kind](case, folder)
    for line in sys.stdin:
        if line.strip() == "rate":
            print(json.dumps(matmul_rate(case.precision)), flush=True)
            continue
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = advance()
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if jax.default_backend() != "cpu" and kind == "jax":
            peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / GIB
        print(json.dumps({"seconds": seconds, "cpu": cpu, "loss": loss, "peak": peak}), flush=True)


class Worker:
    """A process of its own that makes steps one by one when asked."""

    def __init__(self, kind: str, case: Case, folder: Path):
        arguments = ["--worker", kind, json.dumps(dataclasses.asdict(case)), str(folder)]
        command = [sys.executable, "-m", "tools.bench", *arguments]
        self.process: Any = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.first = self.ask()

    def ask(self, what: str = "step") -> Any:
        """The answer to a line. Raises InputError if the process has ended, which prints why."""
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise InputError("a benchmarked process ended: see above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


def summary(
    steps: list[dict[str, float]], first: dict[str, float], batch_size: int
) -> dict[str, float]:
    """The columns of the table that every implementation has."""
    seconds = [step["seconds"] for step in steps]
    quarters = statistics.quantiles(seconds, n=4)
    median = statistics.median(seconds)
    return {
        "s/step": median, "spread": quarters[2] - quarters[0], "CPU s": statistics.median(x["cpu"] for x in steps),
        "images/s": batch_size / median, "first step, s": first["seconds"], "peak GiB": steps[-1]["peak"],
        "first loss": first["loss"],
    }  # fmt: skip


def step_command(
    case: Annotated[Case, tyro.conf.OmitArgPrefixes], steps: int = 10, vs: Literal["torch"] | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:  # fmt: skip
    """Time the training step here, after one step that compiles. A step of each implementation in turn.

    Args:
        case: What to time.
        steps: Steps to time.
        vs: torch: also the same step in PyTorch (extra `reference`), with the ratio; for ft, lipsum, lipsum-exact,
            the last against PyTorch's lipsum.
        as_json: Print JSON.
    """
    check_positive(steps=steps)
    config = case.config()
    if vs and case.method not in ("ft", "lipsum", "lipsum-exact"):
        raise InputError(f"--vs torch has no {case.method}: give ft, lipsum or lipsum-exact")
    with tempfile.TemporaryDirectory() as folder:
        Worker("draw", case, Path(folder)).close()
        workers = {"this project": Worker("jax", case, Path(folder))}
        if vs:
            workers["PyTorch"] = Worker("torch", case, Path(folder))
        times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for _ in range(steps):
            for name, each in workers.items():
                times[name].append(each.ask())
        rate = workers["this project"].ask("rate")
        for each in workers.values():
            each.close()
        again = Worker("jax", case, Path(folder))
        again.close()
    rows = {
        name: summary(times[name], each.first, case.batch_size) for name, each in workers.items()
    }
    ours = rows["this project"]
    ours["share of matmul peak"] = step_flops(case, config) / ours["s/step"] / rate
    ours["first step, warm cache, s"] = again.first["seconds"]
    if vs:
        rows["ratio"] = {name: ours[name] / value for name, value in rows["PyTorch"].items()}
    if as_json:
        print(json.dumps({"case": dataclasses.asdict(case), **rows}))
        return
    print(
        f"{case.model} {case.method}, {case.batch_size} images, {case.precision}, {os.cpu_count()} CPU cores"
    )
    print(f"{'':28}" + "".join(f"{name:>14}" for name in rows))
    for name in ours:
        cells = (f"{row[name]:.3f}" if name in row else "" for row in rows.values())
        print(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))


def run_command(method: str = "lipsum", steps: int = 100) -> None:
    """Time the embedded run: its start, its training loop beside the bare step, and its evaluation.

    Args:
        method: A method of train.py that trains.
        steps: Steps of the run.
    """
    case = Case(
        "tiny",
        method,
        DEFAULTS["minidomain"].settings.batch_size[0],
        classes=len(minidomain.CLASSES),
    )
    case.config()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "runs" / method / "seed-0"
        command = [
            "train.py",
            "--method",
            method,
            "--steps",
            str(steps),
            "--out",
            str(run.parents[1]),
        ]
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        log = run / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.stat().st_size):
            time.sleep(0.01)
        first_step = time.perf_counter() - start
        if process.wait():
            raise InputError(f"python {' '.join(command)} failed: run it to see why")
        whole = time.perf_counter() - start
        loop = json.loads((run / "results.json").read_text())["seconds_per_step"]
        Worker("draw", case, Path(folder)).close()
        each = Worker("jax", case, Path(folder))
        bare = statistics.median(each.ask()["seconds"] for _ in range(20))
        each.close()

    command = DEFAULTS["minidomain"]
    sources = dataclasses.replace(command.sources, reference="real")
    setup = opening.prepare(
        sources, dataclasses.replace(command.execution, precision="float32"), case.batch_size
    )
    split = setup.data.reports["real"]
    evaluator = evaluation.Evaluator(setup)
    evaluated = statistics.median(
        seconds_per_call(3, lambda: evaluator.predict([setup.zero_shot], split))
    )
    size = devices.evaluation_batch_size(case.batch_size)
    batches = list(
        data.evaluation_batches(split, setup.zero_shot.vision.image_size, size, workers=1)
    )
    images = [devices.shard_batch(batch, setup.mesh)["image"] for batch in batches]
    forward = jax.jit(clip.image_features)
    vision = setup.zero_shot.vision
    passes = seconds_per_call(
        3, lambda: jax.block_until_ready([forward(vision, x) for x in images])
    )
    passed = statistics.median(passes)
    print(f"start to first step {first_step:.1f} s, whole run {whole:.1f} s")
    print(f"training loop {loop:.4f} s a step, bare step {bare:.4f} s: ratio {loop / bare:.3f}")
    print(
        f"evaluation {len(split) / evaluated:.0f} images/s, bare forward pass {len(split) / passed:.0f}: "
        f"ratio {passed / evaluated:.3f}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        _, _, kind, case, folder = sys.argv
        worker(kind, Case(**json.loads(case)), Path(folder))
        sys.exit()
    app = tyro.extras.SubcommandApp()
    app.command(name="step")(step_command)
    app.command(name="run")(run_command)
    app.command(name="compile")(compile_command)
    options = {"prog": "python -m tools.bench", "config": (tyro.conf.FlagCreatePairsOff,)}
    sys.exit(exit_code(lambda: app.cli(**options)))
