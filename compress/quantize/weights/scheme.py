"""What a quantized layer looks like, independent of the library that stores or computes it."""

from dataclasses import dataclass

from compress.errors import bad_value

FORMATS = {"int": range(2, 9), "fp8": (8,), "nf4": (4,), "fp4": (4,), "palette": (1, 2, 3, 4, 5, 6, 7, 8)}
"""Name of a format to the numbers of bits that it has."""
GRANULARITIES = ("tensor", "channel", "group")
ACTIVATIONS = ("none", "dynamic", "static")


@dataclass(frozen=True)
class Scheme:
    """How the weights and the inputs of a layer are rounded.

    Attributes:
        format: Of a weight: ``int`` (equal steps), ``fp8`` (e4m3), ``nf4`` (levels at the quantiles of a normal
            distribution, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), ``fp4`` (e2m1), or ``palette``
            (levels found by k-means).
        bits: Of a weight, in [2, 8] for ``int`` and [1, 8] for ``palette``; 8 for ``fp8``; 4 for ``nf4`` and ``fp4``.
        granularity: Which weights share a scale (or a palette): those of a layer (``tensor``), of an output channel, or
            a ``group`` of neighbors within an output channel.
        group_size: Weights in a group, at least 2; the last group of a channel may be smaller.
        symmetric: Whether 0 is the middle of the levels of ``int``; else each scale has a level of zero too.
        activations: Whether inputs of layers are rounded to 8 bits: ``none``, ``dynamic`` (a range for each call) or
            ``static`` (a range that is found beforehand).
    """

    format: str = "int"
    bits: int = 8
    granularity: str = "channel"
    group_size: int = 64
    symmetric: bool = True
    activations: str = "none"

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            UserError: Naming the key, its value and what would be right.
        """
        if self.format not in FORMATS:
            raise bad_value("format", self.format, "one of " + ", ".join(FORMATS))
        if isinstance(self.bits, bool) or self.bits not in FORMATS[self.format]:
            allowed = ", ".join(map(str, FORMATS[self.format]))
            raise bad_value("bits", self.bits, f"{allowed} with format={self.format}")
        if self.granularity not in GRANULARITIES:
            raise bad_value("granularity", self.granularity, "one of " + ", ".join(GRANULARITIES))
        if isinstance(self.group_size, bool) or self.group_size < 2:
            raise bad_value("group_size", self.group_size, "a whole number of at least 2")
        if self.activations not in ACTIVATIONS:
            raise bad_value("activations", self.activations, "one of " + ", ".join(ACTIVATIONS))
        if self.format != "int" and not self.symmetric:
            raise bad_value("symmetric", self.symmetric, f"true with format={self.format}")

    def __str__(self) -> str:
        name = {"int": f"int{self.bits}", "palette": f"palette of {2**self.bits}"}.get(self.format, self.format)
        shared = f"groups of {self.group_size}" if self.granularity == "group" else f"a scale per {self.granularity}"
        inputs = {"none": "", "dynamic": ", dynamic int8 inputs", "static": ", int8 inputs"}[self.activations]
        return f"{name}, {shared}{'' if self.symmetric else ', asymmetric'}{inputs}"
