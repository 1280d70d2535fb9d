"""What a method declares, what its stage is given and what it gives back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from compress.data import Data


@dataclass(frozen=True)
class Stage:
    """What a method declares, once, as the constant ``STAGE`` of its module.

    All but ``version`` stands in the stage's entry of ``compress.json`` as ``"declared"``, where the model card, the
    read-back and later stages find it.

    Attributes:
        version: Of the algorithm; raised when the result changes for the same config. Part of the key in the store.
        needs: ``"float"`` weights, or ``"any"``.
        leaves: ``"float"`` or ``"quantized"`` weights; ``"artifact"``: float weights, and files beside them,
            such as an export, in ``context.artifact``. Nothing can follow that one.
        distributed: Whether every process of the run calls it; else the first alone.
        sampled: Whether images are sampled from what it leaves; else cost alone is measured.
        exact: Whether the checkpoint has to read back bit for bit; else within 1e-5 of the largest output.
        libraries: Packages, by their names on PyPI, that loading the checkpoint needs besides diffusers'.
        imports: Modules that code has to import before it loads the checkpoint.
        extra: The extra of this package that installs them; empty if it always does.
        keeps_names: Whether every layer keeps its name, though weights or examples decide how wide it becomes.
        by_names: Whether ``check`` looks at the names and kinds of layers alone, so that it can be asked where their
            widths are not known yet.
        few_steps: Whether the student draws in its own few steps afterwards.
        any_steps: Whether it trains for any number of steps, which undoes a training for few.
        zeros: Whether weights that are zero afterwards are zero on purpose, so that training leaves them so.
        tag: For the model card, such as ``"pruned"``.
        usage: A sentence for the model card on how to load the checkpoint.
        limits: Sentences for the model card on what the result is not good for.
    """

    version: int
    needs: Literal["float", "any"] = "float"
    leaves: Literal["float", "quantized", "artifact"] = "float"
    distributed: bool = False
    sampled: bool = True
    exact: bool = False
    libraries: tuple[str, ...] = ()
    extra: str = ""
    imports: tuple[str, ...] = ()
    keeps_names: bool = False
    by_names: bool = False
    few_steps: bool = False
    any_steps: bool = False
    zeros: bool = False
    tag: str = ""
    usage: str = ""
    limits: tuple[str, ...] = ()

    def declared(self) -> dict[str, Any]:
        """What the stage's entry of ``compress.json`` says of it."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        del values["version"]
        return values

    def check_installed(self, method: str) -> None:
        """Looks for the packages that the method needs, without loading them.

        Args:
            method: Its name, for the message.

        Raises:
            UserError: One is missing; names it and the extra.
        """
        from importlib.metadata import PackageNotFoundError, version  # slow

        for library in self.libraries:
            try:
                version(library)
            except PackageNotFoundError:
                how = f': pip install "compress[{self.extra}]"' if self.extra else ""
                raise UserError(f"method={method}: needs the package {library}, which is not installed{how}") from None


def declares(stages: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """What stages declared, one value for each that says something, without repetition.

    Args:
        stages: Entries of ``compress.json``.
        key: An attribute of :class:`Stage`; of a list its items count.
    """
    values = [(stage.get("declared") or {}).get(key) for stage in stages]
    found = [item for value in values for item in (value if isinstance(value, list) else [value]) if item]
    return list(dict.fromkeys(found))


@dataclass
class StageContext:
    """What a stage may use besides the pipeline it changes.

    Attributes:
        load_teacher: Gives the uncompressed pipeline, frozen, on ``device``; the same one each time.
        data: Training images and captions.
        folder: A folder of this stage alone that outlives a crash; training states go here.
        examples: Gives a folder for encoded examples of this teacher and data, which stages and runs share; None: there
            is none.
        graphs: A folder for graphs that an engine compiles, shared by all stages and runs; None: none are kept.
        show: Takes uint8 images ``(n, 3, h, w)`` that the stage drew along the way, their prompts and a step; None: the
            stage keeps them in ``folder``.
        artifact: A folder for the files of a stage that leaves an artifact; they become the folder
            ``artifact`` of its checkpoint. None for other stages.
        history: The entries of the stages before, as ``compress.json`` holds them.
        before: What was done to the teacher by earlier runs, where its folder says so: ``name``, ``kind``, ``method``
            and ``declared`` of each stage.
        seed: Seed of everything random in the stage.
        device: Where to compute.
        dtype: The precision of the run.
        log: Takes metrics and a step; they become curves.
    """

    load_teacher: "Callable[[], DiffusionPipeline]"
    data: "Data"
    folder: Path
    history: list[dict[str, Any]]
    seed: int
    device: "torch.device"
    dtype: "torch.dtype"
    log: Callable[[dict[str, float], int], None]
    before: list[dict[str, Any]] = field(default_factory=list)
    artifact: Path | None = None
    examples: Callable[[], Path] | None = None
    graphs: Path | None = None
    show: "Callable[[torch.Tensor, Sequence[str], int], None] | None" = None

    @property
    def teacher(self) -> "DiffusionPipeline":
        """The uncompressed pipeline, which takes memory from when it is asked for."""
        return self.load_teacher()


@dataclass(frozen=True)
class StageReport:
    """What a stage did.

    Attributes:
        coverage: Shares of the denoiser's ``params`` and ``macs`` that were touched, in [0, 1], the number of
            ``modules`` touched and those ``skipped`` with the reason.
        details: Whatever later stages or readers need, ready for JSON.
        curves: Name to ``[[step, value], ...]``.
    """

    coverage: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        shares = {name: self.coverage[name] for name in ("params", "macs") if self.coverage.get(name) is not None}
        return one_line(self, self.coverage.get("modules", 0), **shares)


def one_line(report: object, modules: int, **facts: Any) -> str:
    """A report in one line, as its ``repr``: the number of layers it touched and a few facts, no tensors and no lists.

    Args:
        report: Gives its class's name.
        modules: Number of layers.
        facts: Name to a number or a short text.
    """
    texts = [f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in facts.items()]
    return f"{type(report).__name__}({', '.join([f'{modules} modules', *texts])})"
