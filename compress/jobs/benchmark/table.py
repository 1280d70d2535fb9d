"""The table of a benchmark, its notes, and both as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress.jobs.benchmark.choose import PSNR_CAP, loses_score, within_noise
from compress.report.footer import NOISE, NOISE_FLOOR

MISSING = "–"
DOMINATED, BEST, LOSES = "×", "★", "▼"
Row = Mapping[str, Any]


def headings(result: Mapping[str, Any]) -> list[str]:
    """The columns' headings; CLIP scores have their network's name, and are left out without a network."""
    score = _network(result)
    of_clip = [f"{score} score ↑", "difference"] if score else []
    return ["row", "latency of a call (s)", "images/s ↑", "memory (MB)", "PSNR (dB) ↑", "SSIM ↑", *of_clip]


def cells(result: Mapping[str, Any], row: Row) -> list[tuple[str, str]]:
    """A row's cells without its name: each number with its interval or an empty string."""
    if row["status"] != "measured":
        return []
    cost, metrics = row["cost"], row["metrics"]
    found = [
        (_short(cost["latency_s"]), f"[{_short(cost['latency_low_s'])}, {_short(cost['latency_high_s'])}]"),
        (_short(cost["throughput"]), ""),
        (f"{cost['peak_memory_bytes'] / 1e6:.0f}", ""),
        _cell(metrics["psnr"], 1),
        _cell(metrics["ssim"], 3),
    ]
    if _network(result):
        difference = _cell(metrics["clip_difference"], 1, signed=True)
        found += [
            _cell(metrics["clip_score"], 1),
            (
                difference[0] + (f" {LOSES}" if loses_score(row) else f" {NOISE}" if within_noise(row) else ""),
                difference[1],
            ),
        ]
    return found


def marks(result: Mapping[str, Any], row: Row) -> str:
    """The marks after a row's name."""
    best = BEST if row["name"] == result["best"] else ""
    return best + (DOMINATED if row.get("dominated_by") else "")


def notes(result: Mapping[str, Any]) -> list[str]:
    """The meaning of numbers and marks, one sentence each."""
    about = result["settings"]
    measured = [row for row in result["rows"] if row["status"] == "measured"]
    reference = next(row for row in measured if row["name"] == "reference")
    choices, cost = reference["choices"], reference["cost"]
    lines = [
        f"Each row differs from the reference ({choices['dtype']}, {choices['scheduler']} {choices['steps']} steps, "
        f"batch {choices['batch_size']}) as its name says, and ran in a separate process.",
        f"Latency: one call from prompt to pixels, median of {_calls(measured)} and [5th, 95th percentile], after "
        f"a warm-up call; {about['resolution']} px, guidance {about['guidance']:g}, {about['device']}, "
        f"{about['threads']} threads.",
        f"Memory: peak of loading and sampling above that of Python and the libraries ({cost['memory_method']}).",
        f"PSNR, SSIM and the difference of scores compare {about['n']} images with the reference row's of the same "
        "prompts and noise; brackets are 95 % intervals. Another scheduler samples other images: PSNR shows the "
        "difference, not the quality; compare the score.",
        _floor(result),
    ]
    if result["truncated"]:
        lines.append("Some prompts are longer than the text encoder's input: they were truncated in every row.")
    if any(row["metrics"]["psnr"] and row["metrics"]["psnr"]["equal"] for row in measured):
        lines.append(
            f"PSNR is equal if all images are the reference row's to the bit; one such image counts {PSNR_CAP:g} dB."
        )
    if any(row.get("dominated_by") for row in measured):
        lines.append(
            f"{DOMINATED} do not choose this row: another is at least as good in latency, throughput, memory, PSNR and "
            "score, and clearly better in one of them."
        )
    if any(loses_score(row) for row in measured):
        lines.append(f"{LOSES} the score is below the reference row's by more than the noise.")
    if any(within_noise(row) for row in measured):
        lines.append(f"{NOISE} the difference of scores is within the noise: its interval contains 0.")
    return lines


def _floor(result: Mapping[str, Any]) -> str:
    """The metrics of images with other noise."""
    floor, score = result["noise_floor"], _network(result)
    parts = [f"PSNR {' '.join(_cell(floor['psnr'], 1))} dB", f"SSIM {' '.join(_cell(floor['ssim'], 3))}"]
    if score:
        parts.append(f"{score} score {' '.join(_cell(floor['clip_difference'], 1, signed=True))} from its own")
    return (
        f"{NOISE_FLOOR.capitalize()}, the reference row with other noise: {', '.join(parts)}. Another image of the "
        "same prompt gets as much."
    )


def _calls(rows: Sequence[Row]) -> str:
    """The number of timed calls per row."""
    counts = {row["cost"]["latency_repeats"] for row in rows}
    few, many = min(counts), max(counts)
    return str(few) if few == many else f"{few} (the slowest rows) to {many} calls"


def unmeasured(result: Mapping[str, Any]) -> list[str]:
    """The rows without numbers, with their reasons."""
    return [f"{row['name']}: {row['status']}, {row['reason']}" for row in result["rows"] if row["status"] != "measured"]


def verdict(result: Mapping[str, Any]) -> str:
    """The best row with its criterion, and the row of most images per second; or that there is none."""
    if not result["best"]:
        return f"best: {result['best_of']}"
    chosen, most = f"best: {result['best']} ({result['best_of']})", result["most_images"]
    if most == result["best"]:
        return chosen
    throughput = next(row["cost"]["throughput"] for row in result["rows"] if row["name"] == most)
    return f"{chosen}; most images a second within the same limits: {most} ({_short(throughput)})"


def markdown(result: Mapping[str, Any]) -> str:
    """The table, the rows without numbers, and the notes."""
    head = headings(result)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in result["rows"]:
        if row["status"] == "measured":
            name = f"{row['name']} {marks(result, row)}".strip().replace("|", "\\|")
            written = [" ".join(filter(None, cell)) for cell in cells(result, row)]
            lines.append("| " + " | ".join([name, *written]) + " |")
    listed = [*unmeasured(result), *notes(result), *_dominated(result)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in listed) + "\n"


def _dominated(result: Mapping[str, Any]) -> list[str]:
    """For each dominated row, the row that dominates it."""
    return [
        f"{row['name']} {DOMINATED}: {row['dominated_by']} is better"
        for row in result["rows"]
        if row.get("dominated_by")
    ]


def _network(result: Mapping[str, Any]) -> str | None:
    """Name of the CLIP score's network, if there is one."""
    scores: Sequence[Any] = [row["metrics"]["clip_score"] for row in result["rows"] if row["status"] == "measured"]
    return next((score["network"] for score in scores if score), None)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _cell(metric: Mapping[str, Any] | None, digits: int, signed: bool = False) -> tuple[str, str]:
    if metric is None:
        return MISSING, ""
    if metric.get("equal") == metric["n"]:
        return "equal", ""
    sign = "+" if signed else ""
    # Adding 0 turns -0 into 0.
    value, low, high = (f"{round(metric[key], digits) + 0.0:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return value, f"[{low}, {high}]"
