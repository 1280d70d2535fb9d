"""The table of ``recipe=score``: one metric per row, with its interval and network."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compress.evaluate.config import EXTRAPOLATED_FROM
from compress.report.footer import UNBIASED_FROM

if TYPE_CHECKING:
    from rich.console import Console

# Title, decimals and the direction of better values; other metrics use their name as title. Retrieval is in percent.
TITLES = {
    "fid": ("FID", 2, "↓"),
    "fid_teacher": ("FID to the teacher", 2, "↓"),
    "kid": ("KID", 5, "↓"),
    "precision": ("precision", 3, "↑"),
    "recall": ("recall", 3, "↑"),
    "cmmd": ("CMMD", 3, "↓"),
    "clip_score": ("CLIP score", 2, "↑"),
    "r_at_1": ("R@1 (%)", 1, "↑"),
    "r_at_5": ("R@5 (%)", 1, "↑"),
    "psnr": ("PSNR (dB)", 2, "↑"),
    "ssim": ("SSIM", 4, "↑"),
    "ms_ssim": ("MS-SSIM", 4, "↑"),
    "lpips": ("LPIPS", 4, "↓"),
}
RETRIEVAL = {"r_at_1": 1, "r_at_5": 5}
FAMILIES = {"fd": ("Fréchet distance", 3, "↓"), "mmd": ("MMD", 3, "↓")}


def print_scores(result: Mapping[str, Any], console: "Console") -> None:
    """Prints the metrics of a ``score.json`` and the notes.

    Args:
        result: ``{"metrics", "manifest"}``.
        console: Where to.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("metric", style="bold", no_wrap=True)
    for heading in ("value", "95 % interval", "N → ∞"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, metric in result["metrics"].items():
        title, digits, better = described(name, metric["network"])
        value, low, high, far = (
            None if metric.get(part) is None else f"{metric[part] * (100 if name in RETRIEVAL else 1):.{digits}f}"
            for part in ("value", "low", "high", "infinite")
        )
        ends = "–" if low is None else f"[{low}, {high}]"
        table.add_row(f"{title} {better}", value, ends, "< 0" if (far or "").startswith("-") else far)
    console.print(table)
    for line in notes(result):
        console.print(line, style="dim", markup=False, highlight=False)


def described(name: str, network: str | None) -> tuple[str, int, str]:
    """A metric's title, decimals and the direction of better values; ``network`` names the CLIP of a CLIP score."""
    family, _, encoder = name.partition("_")
    if name not in TITLES and family in FAMILIES and encoder:
        title, digits, better = FAMILIES[family]
        return f"{title}, {encoder}", digits, better
    title, digits, better = TITLES.get(name, (name, 3, "↑"))
    return f"{network} score" if name == "clip_score" else title, digits, better


def notes(result: Mapping[str, Any]) -> list[str]:
    """The meaning of the numbers, one sentence each."""
    manifest, metrics = result["manifest"], result["metrics"]
    lines = [f"{_images('Scored', manifest['images'])}."]
    if manifest["reference"] is not None:
        lines.append(f"{_images('Compared with', manifest['reference'])}{', pair by pair' * manifest['paired']}.")
    lines.append(
        "Intervals are for the same number on fresh draws of as many images, "
        + ("with the reference fixed." if manifest["reference"] is not None else "with their captions.")
    )
    lines += _networks(metrics)
    for name, metric in metrics.items():
        if metric.get("why"):
            lines.append(f"{described(name, metric['network'])[0]} has no interval: {metric['why']}.")
    if "fid" in metrics:
        fid = metrics["fid"]
        lines.append(f"Images are resized for Inception by {fid['preprocessing']} (evaluate.fid_resize).")
        if min(fid["n"], fid["n_reference"]) < UNBIASED_FROM:
            lines.append(
                f"FID below {UNBIASED_FROM:,} images is biased: compare it with FIDs of equal N and reference only."
            )
        lines.append(
            f"N → ∞ extrapolates from subsets of {fid['infinite_from']:,} images on; published ones start at "
            f"{EXTRAPOLATED_FROM:,}. With fewer images than features it is a rough guess."
        )
    if "cmmd" in metrics:
        lines.append(
            "CMMD compares with published values only through CLIP ViT-L/14 at 336 px. Published values also have a "
            "bias that shrinks with N; this estimate has none."
        )
    if "r_at_1" in metrics:
        among = metrics["r_at_1"]["among"]
        lines.append(f"R@1 and R@5 are among {among} distinct captions.")
        if certain := [name for name, first in RETRIEVAL.items() if name in metrics and first >= among]:
            titles = " and ".join(TITLES[name][0].partition(" (")[0] for name in certain)
            lines.append(f"With so few captions {titles} counts every image.")
    equal = (metrics.get("psnr") or {}).get("equal")
    if equal:
        lines.append(f"{equal} pairs are equal to the bit; their PSNR counts as {metrics['psnr']['cap']:g} dB.")
    return lines


def _networks(metrics: Mapping[str, Any]) -> list[str]:
    """Networks with the first digits of their hashes, and the metrics that use them."""
    users: dict[str, list[str]] = {}
    for name, metric in metrics.items():
        if metric["network"]:
            known = metric["network_sha256"]
            through = metric["network"] + (f" ({known[:8]})" if known else "")
            users.setdefault(through, []).append(described(name, metric["network"])[0].removesuffix(" (%)"))
    text = "; ".join(f"{', '.join(titles)}: {network}" for network, titles in users.items())
    return [f"Networks, with the first digits of their SHA-256: {text}."] if text else []


def _images(verb: str, about: Mapping[str, Any]) -> str:
    size = about["largest"] if about["sizes"] == 1 else f"{about['smallest']} to {about['largest']}"
    white = f", {about['on_white']} of them composited on white" if about["on_white"] else ""
    return f"{verb} {about['n']} images of {size} px in {about['folder']}{white}"
