"""OpenVINO on CPUs: a module becomes a graph of fused kernels, int8 where its layers are fake-quantized.

A module is traced once for each structure of its arguments, with free batch and image sizes, and compiled for each
shape. What a graph computes for new shapes is compared with the module itself before it is used. Graphs are kept in a
folder under the hash of everything that decides them, so that a second start only compiles, which takes seconds.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten, treespec_dumps, treespec_loads

from compress.errors import UserError
from compress.models.quantized import plain_tensors
from compress.runtime.arguments import Arguments, Flat
from compress.runtime.fake import float_model
from compress.system.bf16 import bf16_pays
from compress.system.files import file_hash, replace_folder_with, write_text

VERSION = 1  # raised when another graph is made of the same module
# Largest root mean square error of a graph's output, as a share of the module's: a wrong graph is off by more.
TOLERANCE = {"f32": 1e-3, "bf16": 0.2}
TOLERANCE_INT8 = 0.3
VERIFIED = "verified.txt"  # shapes, precisions and processors
FILES = ("graph.xml", "graph.bin")
KERNELS = ("Convolution", "FullyConnected", "MatMul")

logger = logging.getLogger(__name__)


def missing() -> str | None:
    """What OpenVINO lacks to run here; None if nothing."""
    try:
        importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return "needs the package openvino: pip install openvino"
    return None


@lru_cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def precision(asked: str) -> str:
    """``f32`` or ``bf16``: what is computed in outside of int8 layers; ``auto`` is bf16 where that is faster."""
    if asked == "auto":
        has_it = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        asked = "bf16" if has_it and bf16_pays("cpu") else "f32"
    return {"fp32": "f32"}.get(asked, asked)


@dataclass
class Graph:
    """A converted module.

    Attributes:
        model: Of OpenVINO, with free sizes or for one set of shapes.
        output: How its outputs are nested.
        free: Whether batch and image sizes are free.
        verified: Shapes, precisions and processors for which it computes what the module does.
        folder: Where it is kept, or None.
    """

    model: Any
    output: TreeSpec
    free: bool
    verified: list[str] = field(default_factory=list)
    folder: Path | None = None


@dataclass
class OpenVINOModule:
    """Runs a module's calls.

    Attributes:
        module: On the CPU; stays as it was.
        name: Of the component, for messages.
        precision: ``f32`` or ``bf16``.
        ranges: Of the inputs of quantized layers.
        cache: Folder for graphs; None: every process makes its own.
        kernels: After the first call, how many layers of which kind compute in what: ``{"Convolution i8": 71}``.
    """

    module: nn.Module
    name: str
    precision: str
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    cache: Path | None = None
    kernels: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Converts nothing yet."""
        self._graphs: dict[str, Graph] = {}
        self._known: dict[str, tuple[Any, TreeSpec]] = {}

    def __deepcopy__(self, memo: Any) -> "OpenVINOModule":
        return self  # compiled graphs cannot be copied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output.

        Raises:
            UserError: The module cannot be converted, or its graph computes something else.
        """
        call = Arguments.of(args, kwargs)
        key = f"{call.structure} {call.shapes}"
        if key not in self._known:
            self._known[key] = self._prepared(call)
        compiled, output = self._known[key]
        tensors = _run(compiled, call)
        dtype = next((tensor.dtype for tensor in call.tensors if tensor.is_floating_point()), torch.float32)
        return tree_unflatten([t.to(dtype) if t.is_floating_point() else t for t in tensors], output)

    def _prepared(self, call: Arguments) -> tuple[Any, TreeSpec]:
        """A graph compiled for a call's shapes, and how its outputs are nested."""
        why = ""
        for free in (True, False):  # a graph traced with free sizes may have kept those of its first call
            key = call.structure if free else f"{call.structure} {call.shapes}"
            graph = self._graphs.get(key)
            try:
                if graph is None:
                    graph = self._graphs[key] = self._graph(call, free)
                return self._compiled(graph, call), graph.output
            except (RuntimeError, TypeError) as error:
                why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"engine=openvino: the {self.name} ({type(self.module).__name__}) cannot be run: {why}")

    def _compiled(self, graph: Graph, call: Arguments) -> Any:
        """The graph compiled for a call's shapes.

        Raises:
            RuntimeError: It cannot be compiled, or does not compute what the module does.
        """
        model = graph.model.clone()
        model.reshape(dict(zip(model.inputs, call.shapes, strict=True)))
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = _core().compile_model(model, "CPU", settings)
        if not self.kernels:
            self.kernels.update(_kernels(compiled))
        name = f"{call.shapes} {self.precision} {_core().get_property('CPU', 'FULL_DEVICE_NAME')}"
        if name not in graph.verified:
            self._verify(compiled, call)
            graph.verified.append(name)
            _keep_verified(graph)
        return compiled

    def _verify(self, compiled: Any, call: Arguments) -> None:
        plain = float_model(self.module, self.ranges)
        with torch.no_grad():
            expected = Flat(plain, call)(*[_plain(tensor) for tensor in call.tensors])
        allowed = TOLERANCE_INT8 if self.ranges else TOLERANCE[self.precision]
        for theirs, ours in zip(_run(compiled, call), expected, strict=True):
            if theirs.shape != ours.shape:
                raise RuntimeError(f"its outputs have the shape {list(theirs.shape)}, not {list(ours.shape)}")
            if not ours.is_floating_point():
                continue
            error = float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt().clamp(min=1e-12))
            if not error <= allowed:  # NaN is no agreement
                raise RuntimeError(f"its outputs differ by {error:.2g} of their size")

    def _graph(self, call: Arguments, free: bool) -> Graph:
        """Traces the module, or reads what an earlier process traced."""
        folder = None if self.cache is None else self.cache / self._key(call, free)
        if folder is not None and (found := _read(folder, free)) is not None:
            return found
        import openvino
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        flat = Flat(float_model(self.module, self.ranges), call)
        examples = [_plain(tensor) for tensor in call.tensors]
        shapes = [openvino.PartialShape(_free(list(t.shape)) if free else list(t.shape)) for t in examples]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # traces warn of every Python number that they keep
            # Not traced again to check the trace, which takes twice the time of the trace: _verify compares the graph.
            traced = TorchScriptPythonDecoder(flat, example_input=tuple(examples), trace_kwargs={"check_trace": False})
            model = openvino.convert_model(traced, example_input=tuple(examples), input=shapes)
        assert flat.output is not None
        graph = Graph(model, flat.output, free)
        if folder is None:
            return graph
        try:
            _write(folder, graph)
        except OSError as error:
            logger.warning("%s cannot be kept (%s): the next start makes it again", folder, error)
            return graph
        return _read(folder, free) or graph  # from the file, so that its weights are not in memory twice

    def _key(self, call: Arguments, free: bool) -> str:
        shapes = [_free(shape) for shape in call.shapes] if free else call.shapes
        versions = [importlib.metadata.version(name) for name in ("openvino", "torch", "diffusers", "transformers")]
        text = repr((VERSION, versions, self._fingerprint, sorted(self.ranges.items()), call.structure, shapes))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def _fingerprint(self) -> str:
        """Of the module's class, config and weights."""
        digest = hashlib.sha256(f"{type(self.module).__qualname__} {getattr(self.module, 'config', '')}".encode())
        for name, tensor in plain_tensors(self.module):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def _free(shape: list[int]) -> list[int]:
    """-1 for the sizes that vary from call to call: the batch, and height and width of an image."""
    varying = {4: (0, 2, 3)}.get(len(shape), (0,))
    return [-1 if index in varying else size for index, size in enumerate(shape)]


def _run(compiled: Any, call: Arguments) -> list[Tensor]:
    found = compiled([_plain(tensor).numpy() for tensor in call.tensors], share_inputs=True, share_outputs=True)
    return [torch.from_numpy(found[index]).clone() for index in range(len(found))]


def _kernels(compiled: Any) -> Counter[str]:
    counted: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        kind = info["layerType"].value
        if kind in KERNELS:
            counted[f"{kind} {info['runtimePrecision'].value}"] += 1
    return counted


def _write(folder: Path, graph: Graph) -> None:
    import openvino

    folder.parent.mkdir(parents=True, exist_ok=True)
    with replace_folder_with(folder) as beside:
        beside.mkdir()
        try:
            openvino.save_model(graph.model, beside / "graph.xml", compress_to_fp16=False)
        except RuntimeError as error:  # how OpenVINO says that the disk is full
            raise OSError(str(error)) from error
        hashes = {name: file_hash(beside / name) for name in FILES}
        entry = {"output": treespec_dumps(graph.output), "files": hashes}
        (beside / "graph.json").write_text(json.dumps(entry), encoding="utf-8")


def _read(folder: Path, free: bool) -> Graph | None:
    """The graph in a folder; None if there is none, or none that can be trusted."""
    if not folder.is_dir():
        return None
    try:
        entry = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
        if any(file_hash(folder / name) != entry["files"][name] for name in FILES):
            raise ValueError("a file has changed")
        model = _core().read_model(folder / "graph.xml")
        output = treespec_loads(entry["output"])
        known = folder / VERIFIED
        verified = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        logger.warning("%s is damaged (%s): it is made again", folder, error)
        return None
    return Graph(model, output, free, verified, folder)


def _keep_verified(graph: Graph) -> None:
    if graph.folder is not None:
        with contextlib.suppress(OSError):
            write_text(graph.folder / VERIFIED, "\n".join(graph.verified))


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, in float32 if it is a float."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
