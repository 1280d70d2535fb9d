"""The table of a benchmark, on the screen and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.benchmark.choose import PSNR_CAP, loses_score

if TYPE_CHECKING:
    from rich.console import Console

    from compress.benchmark.job import Job

MISSING = "–"
DOMINATED, BEST, LOSES = "×", "★", "▼"
Row = Mapping[str, Any]


def headings(result: Mapping[str, Any]) -> list[str]:
    """The columns' headings; CLIP scores bear their network's name, and are left out without one."""
    score = _network(result)
    of_clip = [f"{score} score ↑", "difference"] if score else []
    return ["row", "latency (s)", "pictures/s ↑", "memory (MB)", "PSNR (dB) ↑", "SSIM ↑", *of_clip]


def cells(result: Mapping[str, Any], row: Row) -> list[tuple[str, str]]:
    """A row's cells without its name: each number, and its interval or nothing."""
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
            (difference[0] + (f" {LOSES}" if loses_score(row) else ""), difference[1]),
        ]
    return found


def marks(result: Mapping[str, Any], row: Row) -> str:
    """The signs after a row's name."""
    best = BEST if row["name"] == result["best"] else ""
    return best + (DOMINATED if row.get("dominated_by") else "")


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the numbers and signs mean, one sentence each."""
    about = result["settings"]
    measured = [row for row in result["rows"] if row["status"] == "measured"]
    reference = next(row for row in measured if row["name"] == "reference")
    choices, cost = reference["choices"], reference["cost"]
    lines = [
        f"Each row differs from the reference ({choices['dtype']}, {choices['scheduler']} {choices['steps']} steps, "
        f"batch {choices['batch_size']}) in what its name says, and ran in a process of its own.",
        f"Latency: one call from prompt to pixels, median of {about['repeats']} and [5th, 95th percentile], after one "
        f"that is not timed; {about['resolution']} px, guidance {about['guidance']:g}, {about['device']}, "
        f"{about['threads']} threads.",
        f"Memory: peak of loading and sampling above what Python and the libraries take ({cost['memory_method']}).",
        f"PSNR, SSIM and the difference of scores compare {about['n']} pictures with the reference row's of the same "
        "prompts and noise; brackets are 95 % intervals. Another scheduler draws other pictures: its PSNR says how "
        "other, not how good; for that look at the score.",
    ]
    if any(row["metrics"]["psnr"] and row["metrics"]["psnr"]["equal"] for row in measured):
        lines.append(f"A picture equal to the reference row's to the bit counts {PSNR_CAP:g} dB.")
    if any(row.get("dominated_by") for row in measured):
        lines.append(
            f"{DOMINATED} nobody should choose this row: another is at least as good in latency, throughput, memory, "
            "PSNR and score, and clearly better in one of them."
        )
    if any(loses_score(row) for row in measured):
        lines.append(f"{LOSES} the score is below the reference row's by more than the noise.")
    return lines


def unmeasured(result: Mapping[str, Any]) -> list[str]:
    """The rows without numbers, with the reason."""
    return [f"{row['name']}: {row['status']}, {row['reason']}" for row in result["rows"] if row["status"] != "measured"]


def verdict(result: Mapping[str, Any]) -> str:
    """The best row and what it is the best of, or that there is none."""
    return f"best: {result['best']} ({result['best_of']})" if result["best"] else f"best: {result['best_of']}"


def markdown(result: Mapping[str, Any]) -> str:
    """The table, what could not be measured, and the notes."""
    head = headings(result)
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in result["rows"]:
        if row["status"] == "measured":
            name = f"{row['name']} {marks(result, row)}".strip().replace("|", "\\|")
            written = [" ".join(filter(None, cell)) for cell in cells(result, row)]
            lines.append("| " + " | ".join([name, *written]) + " |")
    listed = [*unmeasured(result), *notes(result), *_dominated(result)]
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {line}" for line in listed) + "\n"


def print_end(result: Mapping[str, Any], job: "Job", console: "Console") -> None:
    """Prints the table, the best row with its code, and where everything is."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for index, heading in enumerate(headings(result)):
        name, _, unit = heading.partition(" (")
        wrapped = f"{name}\n({unit}" if unit else heading
        table.add_column(wrapped, justify="right" if index else "left", overflow="fold")
    for row in result["rows"]:
        if row["status"] == "measured":
            numbers = [
                Text(value).append(f"\n{range_}" if range_ else "", style="dim") for value, range_ in cells(result, row)
            ]
            title = Text(row["name"], style="bold" if row["name"] == result["best"] else "")
            table.add_row(title.append(f" {marks(result, row)}"), *numbers)
    console.print(table)
    for line in (*unmeasured(result), *notes(result)):
        console.print(line, style="dim", markup=False, highlight=False)
    console.print(f"\n{verdict(result)}\n", style="bold", markup=False, highlight=False)
    if result["code"]:
        console.print(result["code"], markup=False, highlight=False, soft_wrap=True)
    found = sum(bool(row.get("cached")) for row in result["rows"])
    where = {
        "report": str(job.out / "report.md"),
        "store": f"{job.store} ({found} of {len(result['rows'])} rows were there)",
        "time": f"{result['seconds']:.0f} s",
    }
    for name, value in where.items():
        console.print(f"{name:11}{value}", markup=False, highlight=False, soft_wrap=True)


def _dominated(result: Mapping[str, Any]) -> list[str]:
    """Which row each dominated one is dominated by."""
    return [
        f"{row['name']} {DOMINATED}: {row['dominated_by']} is better"
        for row in result["rows"]
        if row.get("dominated_by")
    ]


def _network(result: Mapping[str, Any]) -> str | None:
    """Name of the CLIP score's network, where there is one."""
    scores: Sequence[Any] = [row["metrics"]["clip_score"] for row in result["rows"] if row["status"] == "measured"]
    return next((score["network"] for score in scores if score), None)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _cell(metric: Mapping[str, Any] | None, digits: int, signed: bool = False) -> tuple[str, str]:
    if metric is None:
        return MISSING, ""
    sign = "+" if signed else ""
    return (
        f"{metric['value']:{sign}.{digits}f}",
        f"[{metric['low']:{sign}.{digits}f}, {metric['high']:{sign}.{digits}f}]",
    )
