"""Candidates per second of the gradient-matching loss, beside what people use now.

    python -m benchmarks.matching                       # 32x32, population 50, five defenses
    python -m benchmarks.matching --image-size 224 --population 10
    python -m benchmarks.matching --quick               # a smoke run

What is timed is one generation of a population search: N candidate images in, N distances to an
observed (defended) gradient of ResNet-18 out. The contestants:

(a) ``torch loop``: PyTorch, one candidate at a time, in the style of the published attack code;
(b) ``torch vmap``: PyTorch, ``torch.func.vmap(grad)`` in the best of several chunk sizes;
(c) ``jax vmap``: JAX, ``jax.vmap(jax.grad)``, likewise;
(d) ``ggl_jax``: :func:`ggl_jax.adversary.matching.matching_loss`.

Each runs in a process of its own. In every repetition all of them run once, one after another, and
so does each framework's large matrix product, whose best speed is the machine's ceiling. All must
agree on the losses. A candidate's arithmetic is counted directly: forward pass, derivative with
respect to the activations and with respect to the weights, each as many multiplications as the
forward pass. torch is needed only for (a) and (b).
"""

import argparse
import contextlib
import datetime
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

SETTINGS = ("none", "noise:0.1", "clip:4", "sparsify:0.9", "soteria:0.8,representation=False")
CONTESTANTS = ("torch loop", "torch vmap", "jax vmap", "ggl_jax")
CHUNKS = (5, 10, 25, 50)
RESULTS = Path(__file__).parent / "results"


# --------------------------------------------------------------------------------------------------
# The problem, shared as files: arrays by name
# --------------------------------------------------------------------------------------------------


def flat(tree) -> dict[str, np.ndarray]:
    """A nested dict of arrays as one dict by path."""
    result = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            result |= {f"{name}/{path}": array for path, array in flat(value).items()}
        else:
            result[name] = np.asarray(value)
    return result


def nested(arrays: dict[str, np.ndarray]) -> dict:
    """The inverse of :func:`flat`."""
    tree: dict = {}
    for path, array in arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = array
    return tree


def make_problem(folder: str, size: int, population: int, settings: list[str]) -> dict:
    """Write variables, candidates, observed updates and what is estimated from them; count work."""
    import jax
    import jax.numpy as jnp

    import ggl_jax as gx
    from ggl_jax.adversary.matching.program import trace

    model = gx.resnet18(num_classes=2 if size <= 64 else 1000, image_shape=(size, size, 3))
    variables = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = rng.random((population + 1, 1, size, size, 3), np.float32)
    label = jnp.zeros((1,), jnp.int32)
    update = jax.jit(gx.gradient, static_argnums=0)(model, variables, images[0], label)
    np.savez(f"{folder}/variables.npz", **flat(variables))
    np.savez(f"{folder}/images.npz", images=images[1:])
    for number, spec in enumerate(settings):
        # Soteria in the code's form: a mask on the plain gradient, which all contestants can copy.
        defense = gx.parse(spec)
        context = gx.Context(model, variables, jnp.asarray(images[0]), label)
        observed, _ = defense.apply(jax.random.key(1), update, context)
        estimated = defense.view.estimate(observed, model.head)
        np.savez(f"{folder}/observed{number}.npz", **flat(observed))
        np.savez(f"{folder}/estimated{number}.npz", **flat(estimated))
    program = trace(model, variables, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    work = sum(s.layer.positions * math.prod(s.layer.kernel_shape) for s in program.sites)
    return {"flop": 6 * work}


def load(path: str) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


# --------------------------------------------------------------------------------------------------
# Workers: each answers requests over a pipe
# --------------------------------------------------------------------------------------------------


def serve(connection, kind: str, folder: str, size: int, settings: list[str]) -> None:
    """A worker process: ``(method, arguments)`` in, results (or the error's text) out."""
    worker = (TorchWorker if kind.startswith("torch") else JaxWorker)(kind, folder, size, settings)
    while True:
        request = connection.recv()
        if request is None:
            return
        method, arguments = request
        try:
            connection.send(("ok", getattr(worker, method)(*arguments)))
        except Exception as error:
            connection.send(("error", f"{type(error).__name__}: {error}"))


class Worker:
    """A worker seen from the parent."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, method, *arguments):
        self.connection.send((method, arguments))
        status, result = self.connection.recv()
        if status == "error":
            raise RuntimeError(result)
        return result

    def stop(self):
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(None)
        self.process.join(timeout=10)


def reset_peak_memory() -> None:
    """Start the process's peak memory anew, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak resident memory of this process, GB."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e9
    return math.nan


class JaxWorker:
    """Contestants (c) and (d)."""

    def __init__(self, kind, folder, size, settings):
        import jax
        import jax.numpy as jnp

        import ggl_jax as gx

        self.jax, self.jnp, self.gx, self.kind, self.folder = jax, jnp, gx, kind, folder
        classes = 2 if size <= 64 else 1000
        self.model = gx.resnet18(num_classes=classes, image_shape=(size, size, 3))
        put = lambda path: jax.tree.map(jnp.asarray, nested(load(path)))  # noqa: E731
        self.variables = put(f"{folder}/variables.npz")
        self.images = jnp.asarray(load(f"{folder}/images.npz")["images"])
        self.problems = {
            spec: (
                gx.parse(spec),
                put(f"{folder}/observed{number}.npz"),
                put(f"{folder}/estimated{number}.npz"),
            )
            for number, spec in enumerate(settings)
        }
        self.functions: dict = {}
        side = 2048 if jax.default_backend() == "cpu" else 16384
        self.square = jnp.ones((side, side), jnp.float32)
        self.product = jax.jit(jnp.matmul)
        self.product(self.square, self.square).block_until_ready()

    def about(self):
        jax = self.jax
        return {
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(),
        }

    def ceiling(self):
        start = time.perf_counter()
        self.product(self.square, self.square).block_until_ready()
        return 2 * self.square.shape[0] ** 3 / (time.perf_counter() - start)

    def naive(self, defense, chunk):
        """(c): the gradient under ``vmap``, chunk after chunk from the host."""
        jax, jnp = self.jax, self.jnp

        def distances(variables, observed, estimated, images):
            def one(images):
                label = jnp.zeros((1,), jnp.int32)
                update = self.gx.gradient(self.model, variables, images, label)
                update = defense.view.simulate(estimated, update)
                squares = jax.tree.map(lambda g, y: jnp.sum((y - g) ** 2), update, observed)
                return sum(jax.tree.leaves(squares))

            return jax.vmap(one)(images)

        compiled = jax.jit(distances)

        def run(variables, observed, estimated, images):
            parts = range(0, images.shape[0], chunk)
            done = [compiled(variables, observed, estimated, images[i : i + chunk]) for i in parts]
            return jnp.concatenate(done)

        return run

    def ours(self, defense):
        """(d)."""

        def losses(variables, observed, estimated, images):
            loss = self.gx.matching_loss(
                self.model, variables, observed, view=defense.view, estimated=estimated
            )
            return loss(images, self.jnp.zeros((1,), self.jnp.int32))

        return self.jax.jit(losses)

    def prepare(self, spec, population, chunk=None):
        """Compile; return the losses, the seconds it took, and the first timing."""
        defense, observed, estimated = self.problems[spec]
        images = self.images[:population]
        chosen = self.naive(defense, chunk) if self.kind == "jax vmap" else self.ours(defense)
        self.current = lambda: chosen(self.variables, observed, estimated, images)
        start = time.perf_counter()
        losses = np.asarray(self.current())
        compiling = time.perf_counter() - start
        return losses, compiling, self.time()[0]

    def prepare_instances(self, instances, population):
        """(d) on several observed updates at once, by ``vmap``."""
        jax, jnp = self.jax, self.jnp
        defense, observed, estimated = self.problems["none"]
        several = jax.tree.map(lambda y: jnp.stack([y] * instances), observed)
        images = jnp.stack([self.images[:population]] * instances)
        losses = jax.jit(jax.vmap(self.ours(defense), in_axes=(None, 0, None, 0)))
        self.current = lambda: losses(self.variables, several, estimated, images)
        self.current().block_until_ready()
        return self.time()[0]

    def time(self):
        """Seconds and peak memory in GB of one evaluation."""
        reset_peak_memory()
        start = time.perf_counter()
        self.current().block_until_ready()
        seconds = time.perf_counter() - start
        stats = self.jax.local_devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use")
        return seconds, peak_memory() if peak is None else peak / 1e9


class TorchWorker:
    """Contestants (a) and (b)."""

    def __init__(self, kind, folder, size, settings):
        import torch

        self.torch, self.kind = torch, kind
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(os.cpu_count() or 1)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        variables = load(f"{folder}/variables.npz")
        self.stem = "cifar" if size <= 64 else "imagenet"
        self.names = sorted(name for name in variables if name.startswith("params/"))
        self.params = {name: self.tensor(variables[name]) for name in self.names}
        self.buffers = {
            name: self.tensor(array)
            for name, array in variables.items()
            if not name.startswith("params/")
        }
        images = load(f"{folder}/images.npz")["images"].transpose(0, 1, 4, 2, 3)
        self.images = torch.tensor(images, device=self.device)
        self.label = torch.zeros(1, dtype=torch.long, device=self.device)
        self.problems = {}
        for number, spec in enumerate(settings):
            observed = load(f"{folder}/observed{number}.npz")
            estimated = load(f"{folder}/estimated{number}.npz")
            targets = {f"params/{name}": self.tensor(array) for name, array in observed.items()}
            self.problems[spec] = (targets, estimated)
        side = 2048 if self.device == "cpu" else 16384
        self.square = torch.ones((side, side), device=self.device)
        self.ceiling()

    def tensor(self, array):
        """Flax's axes to torch's."""
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        return self.torch.tensor(np.ascontiguousarray(array), device=self.device)

    def synchronise(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def about(self):
        torch = self.torch
        name = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        return {"torch": torch.__version__, "torch_device": name}

    def ceiling(self):
        self.synchronise()
        start = time.perf_counter()
        self.square @ self.square
        self.synchronise()
        return 2 * self.square.shape[0] ** 3 / (time.perf_counter() - start)

    def loss(self, params, images):
        """Cross-entropy of ResNet-18 with BatchNorm in evaluation mode."""
        torch = self.torch
        f = torch.nn.functional

        def norm(x, path):
            mean, var = (self.buffers[f"batch_stats/{path}/{key}"] for key in ("mean", "var"))
            scale, bias = (params[f"params/{path}/{key}"] for key in ("scale", "bias"))
            return f.batch_norm(x, mean, var, scale, bias, training=False)

        def conv(x, path, stride, padding):
            return f.conv2d(x, params[f"params/{path}/kernel"], stride=stride, padding=padding)

        x = 2 * images - 1
        if self.stem == "cifar":
            x = f.relu(norm(conv(x, "conv1", 1, 1), "bn1"))
        else:
            x = f.max_pool2d(f.relu(norm(conv(x, "conv1", 2, 3), "bn1")), 3, 2, 1)
        for stage in range(1, 5):
            for block in range(2):
                path = f"layer{stage}_{block}"
                stride = 2 if stage > 1 and block == 0 else 1
                y = f.relu(norm(conv(x, f"{path}/conv1", stride, 1), f"{path}/bn1"))
                y = norm(conv(y, f"{path}/conv2", 1, 1), f"{path}/bn2")
                if f"params/{path}/shortcut_conv/kernel" in params:
                    x = norm(conv(x, f"{path}/shortcut_conv", stride, 0), f"{path}/shortcut_bn")
                x = f.relu(x + y)
        logits = f.linear(x.mean((2, 3)), params["params/fc/kernel"], params["params/fc/bias"])
        return f.cross_entropy(logits, self.label)

    def simulate(self, spec, name, g, estimated, batched):
        """A defense on one tensor: as published for one candidate, vectorised for a batch."""
        torch = self.torch
        own = name.removeprefix("params/")
        if spec.startswith("clip"):
            bound = float(estimated[f"layer_bounds/{own}"])
            norm = g.flatten(1).norm(dim=1) if batched else g.norm()
            scale = torch.clamp(bound / torch.clamp(norm, min=1e-12), max=1.0)
            return g * (scale.view(-1, *[1] * (g.dim() - 1)) if batched else scale)
        if spec.startswith("sparsify"):
            rate = float(estimated[f"layer_counts/{own}"]) / (g[0] if batched else g).numel()
            if not batched:
                magnitudes = np.abs(g.detach().cpu().numpy())
                threshold = float(np.percentile(magnitudes, 100 * rate))
                return torch.where(g.abs() < threshold, torch.zeros_like(g), g)
            flattened = g.flatten(1).abs()
            count = round(rate * flattened.shape[1])
            if count == 0:
                return g
            threshold = torch.kthvalue(flattened, count, dim=1).values
            return torch.where(g.abs() <= threshold.view(-1, *[1] * (g.dim() - 1)), 0.0, g)
        if spec.startswith("soteria") and own == "fc/kernel":
            return g * self.tensor(estimated["mask/fc/kernel"])
        return g

    def prepare(self, spec, population, chunk=None):
        torch = self.torch
        targets, estimated = self.problems[spec]
        images = self.images[:population]

        def loop():
            params = {k: v.clone().requires_grad_() for k, v in self.params.items()}
            losses = []
            for candidate in images:
                gradients = torch.autograd.grad(self.loss(params, candidate), params.values())
                total = 0.0
                for (name, target), g in zip(targets_in_order, gradients, strict=True):
                    g = self.simulate(spec, name, g, estimated, batched=False)
                    total += ((target - g) ** 2).sum()
                losses.append(total.item())
            return np.array(losses)

        gradient = torch.func.vmap(torch.func.grad(self.loss), in_dims=(None, 0))

        def vectorised():
            losses = []
            for start in range(0, len(images), chunk):
                with torch.no_grad():
                    gradients = gradient(self.params, images[start : start + chunk])
                    total = 0.0
                    for name, target in targets_in_order:
                        g = self.simulate(spec, name, gradients[name], estimated, batched=True)
                        total = total + ((target - g) ** 2).flatten(1).sum(1)
                losses.append(total)
            return torch.cat(losses).cpu().numpy()

        targets_in_order = [(name, targets[name]) for name in self.params]
        self.current = loop if self.kind == "torch loop" else vectorised
        start = time.perf_counter()
        losses = self.current()
        warming = time.perf_counter() - start
        return losses, warming, self.time()[0]

    def time(self):
        reset_peak_memory()
        if self.device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        self.synchronise()
        start = time.perf_counter()
        self.current()
        self.synchronise()
        seconds = time.perf_counter() - start
        if self.device == "cuda":
            return seconds, self.torch.cuda.max_memory_allocated() / 1e9
        return seconds, peak_memory()


# --------------------------------------------------------------------------------------------------
# The parent
# --------------------------------------------------------------------------------------------------


def in_a_process(function, *arguments):
    """Run a function in a process of its own, so that its memory and threads are gone after."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def slug(device: str) -> str:
    """This machine's part of a results file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + f"-{os.cpu_count()}"


def save(out: Path | None, name: str, about: dict, content: dict) -> None:
    """Write a benchmark's JSON, with the date and the machine.

    Args:
        out: where to; None for ``results/NAME.json``.
        name: without ``.json``.
        about: of the machine: device, versions.
        content: what was measured.
    """
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    processor = platform.processor() or platform.machine()
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"processor": processor, "cores": os.cpu_count(), **about},
        **content,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(f"written to {path}")


def agree(losses: dict[str, np.ndarray]) -> float:
    """Largest relative disagreement with (d)."""
    ours = losses["ggl_jax"]
    return max(float(np.max(np.abs(other / ours - 1))) for other in losses.values())


def compare(workers, options, flop, console) -> list[dict]:
    """Time all contestants on all settings, interleaved."""
    rows = []
    for spec in options.settings:
        losses, chunks, compiling = {}, {}, {}
        for name, worker in workers.items():
            if name.endswith("vmap"):
                tried = {}
                for chunk in sorted({min(c, options.population) for c in options.chunks}):
                    tried[chunk] = worker("prepare", spec, options.population, chunk)[2]
                chunks[name] = min(tried, key=tried.get)
            result = worker("prepare", spec, options.population, chunks.get(name))
            losses[name], compiling[name], _ = result
        times = {name: [] for name in workers}
        peaks = dict.fromkeys(workers, 0.0)
        ceilings = []
        for _ in range(options.repetitions):
            for name, worker in workers.items():
                ceilings.append(worker("ceiling"))
                seconds, peak = worker("time")
                times[name].append(seconds)
                peaks[name] = max(peaks[name], peak)
        for name in workers:
            median = statistics.median(times[name])
            rate = options.population / median
            rows.append(
                {
                    "defense": spec,
                    "contestant": name,
                    "candidates_per_second": rate,
                    "seconds": times[name],
                    "times_torch_loop": None,
                    "chunk": chunks.get(name),
                    "peak_memory_gb": peaks[name],
                    "ceiling_tflops": max(ceilings) / 1e12,
                    "share_of_ceiling": rate * flop / max(ceilings),
                    "first_call_seconds": compiling[name],
                    "disagreement": agree(losses),
                }
            )
        base = next((r for r in rows if (r["defense"], r["contestant"]) == (spec, "torch loop")), 0)
        for row in rows:
            if base and row["defense"] == spec:
                ratio = row["candidates_per_second"] / base["candidates_per_second"]
                row["times_torch_loop"] = ratio
        console.log(f"{spec}: done")
    return rows


def scaling(options, console) -> list[dict]:
    """(d) over population, instances and image size."""
    rows = []

    def measure(kind, value, size, population, request):
        with tempfile.TemporaryDirectory() as folder:
            in_a_process(make_problem, folder, size, population, ["none"])
            worker = Worker("ggl_jax", folder, size, ["none"])
            worker(*request)
            seconds, peak = zip(*(worker("time") for _ in range(3)), strict=True)
            worker.stop()
        count = population * (value if kind == "instances" else 1)
        rows.append(
            {
                "over": kind,
                "value": value,
                "population": population,
                "image_size": size,
                "candidates_per_second": count / statistics.median(seconds),
                "peak_memory_gb": max(peak),
            }
        )
        console.log(f"{kind} {value}: {rows[-1]['candidates_per_second']:.1f} candidates/s")

    for population in options.populations:
        request = ("prepare", "none", population)
        measure("population", population, options.image_size, population, request)
    for instances in options.instances:
        request = ("prepare_instances", instances, options.population)
        measure("instances", instances, options.image_size, options.population, request)
    for size in options.image_sizes:
        population = max(1, options.population * 32**2 // size**2)
        measure("image size", size, size, population, ("prepare", "none", population))
    return rows


def show(rows, console) -> None:
    table = Table(title="Gradient matching, ResNet-18: one generation")
    columns = ("defense", "contestant", "cand./s", "x torch loop", "of ceiling", "peak GB", "chunk")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for row in rows:
        ratio, chunk = row["times_torch_loop"], row["chunk"]
        table.add_row(
            row["defense"],
            row["contestant"],
            f"{row['candidates_per_second']:.1f}",
            "" if ratio is None else f"{ratio:.1f}",
            f"{100 * row['share_of_ceiling']:.0f} %",
            f"{row['peak_memory_gb']:.2f}",
            "" if chunk is None else str(chunk),
            end_section=row["contestant"] == rows[-1]["contestant"],
        )
    console.print(table)


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.matching",
        description=__doc__.split("\n\n")[0],
    )
    whole = lambda text: [int(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--image-size", type=int, default=32, help="side of the images (32 or 224)")
    parser.add_argument("--population", type=int, default=50, help="candidates per generation")
    parser.add_argument("--repetitions", type=int, default=5, help="timings of each")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="defenses")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument(
        "--chunks", type=whole, default=list(CHUNKS), help="chunk sizes that (b) and (c) may try"
    )
    parser.add_argument("--scaling", action="store_true", help="measure (d)'s scaling as well")
    parser.add_argument("--populations", type=whole, default=[1, 8, 50, 200, 512])
    parser.add_argument("--instances", type=whole, default=[1, 2, 4])
    parser.add_argument("--image-sizes", type=whole, default=[32, 64, 128, 224])
    parser.add_argument("--quick", action="store_true", help="small counts: does it run at all?")
    parser.add_argument("--out", type=Path, help="results file; by default named for the device")
    options = parser.parse_args(argv)
    if options.quick:
        options.population, options.repetitions, options.chunks = 4, 1, [4]
        options.populations, options.instances, options.image_sizes = [1, 4], [2], [32]
    if "ggl_jax" not in options.contestants:
        options.contestants.append("ggl_jax")
    return options


def main(argv=None) -> None:
    """Run the benchmark, print its table and write its JSON."""
    options = arguments(argv)
    console = Console()
    contestants = [name for name in CONTESTANTS if name in options.contestants]
    with tempfile.TemporaryDirectory() as folder:
        problem = (folder, options.image_size, options.population, options.settings)
        counted = in_a_process(make_problem, *problem)
        workers = {}
        for name in contestants:
            worker = Worker(name, folder, options.image_size, options.settings)
            try:
                worker("about")
            except (EOFError, RuntimeError):
                console.log(f"{name}: cannot start here (is torch installed?); left out")
                continue
            workers[name] = worker
        about: dict = {}
        for worker in workers.values():
            about |= worker("about")
        rows = compare(workers, options, counted["flop"], console)
        for worker in workers.values():
            worker.stop()
    show(rows, console)
    result = {
        "image_size": options.image_size,
        "population": options.population,
        "gflop_per_candidate": counted["flop"] / 1e9,
        "comparison": rows,
        "scaling": scaling(options, console) if options.scaling else [],
    }
    suffix = "-quick" if options.quick else ""
    save(options.out, f"{slug(about['device'])}-{options.image_size}{suffix}", about, result)


if __name__ == "__main__":
    main()
