"""Runs ablations and keeps what came out: ``python -m tools.results NAME ... [KEY=VALUE ...]`` writes ``results/NAME``.

The runs stay in ``runs/ablations/NAME`` and in the store, so the same command continues and repeats nothing. What is
kept is small: the tables (``report.md``), the numbers (``points.json``) and a chart of them (``quality.png``).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"fid": "FID", "clip_score": "CLIP score", "psnr": "PSNR to the teacher (dB)"}


def main(arguments: list[str]) -> int:
    """Runs the named ablations with the given overrides; the exit code of the first that fails, else 0."""
    names = [text for text in arguments if "=" not in text]
    overrides = [text for text in arguments if "=" in text]
    known = sorted(file.stem for file in (ROOT / "recipes" / "ablations").glob("*.yaml"))
    if unknown := set(names) - set(known) or not names:
        print(f"expected names of {', '.join(known)}, found {unknown if names else 'none'}", file=sys.stderr)
        return 2
    for name in names:
        runs = ROOT / "runs" / "ablations" / name
        command = [sys.executable, "-m", "compress", f"recipe=ablations/{name}", f"out={runs}", "track=none"]
        code = subprocess.run([*command, *overrides], cwd=ROOT, check=False).returncode
        if (runs / "points.json").is_file():  # points that failed are named in it
            keep(runs, ROOT / "results" / name)
        if code:
            return code
    return 0


def keep(runs: Path, folder: Path) -> None:
    """Writes what is worth keeping of a multirun's folder into another, which is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    found = json.loads((runs / "points.json").read_text())
    left_out = ("config", "folder")  # long, and of one machine
    each = [{key: value for key, value in run.items() if key not in left_out} for run in found["runs"]]
    numbers = {"points": found["points"], "runs": each}
    (folder / "points.json").write_text(json.dumps(_short(numbers)) + "\n")
    shutil.copyfile(runs / "report.md", folder / "report.md")
    draw(found, folder / "quality.png")


def draw(found: dict[str, Any], file: Path) -> None:
    """A row for each point: its mean with the interval over seeds, and a small dot for each run."""
    from matplotlib.figure import Figure

    points = found["points"][::-1]
    shown = {key: label for key, label in METRICS.items() if any(key in point["metrics"] for point in points)}
    figure = Figure(figsize=(2.5 + 2.6 * len(shown), 1 + 0.28 * len(points)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    rows = {point["name"]: row for row, point in enumerate(points)}
    for panel, (key, label) in zip(panels, shown.items(), strict=True):
        for point in points:
            if metric := point["metrics"].get(key):
                row, ends = rows[point["name"]], [metric["low"], metric["high"]]
                panel.plot(ends, [row, row], color="#9aa5b1", linewidth=2, solid_capstyle="round", zorder=1)
                panel.scatter(metric["value"], row, s=28, color="#0072b2", zorder=3)
        for run in found["runs"]:
            at = [row for name, row in rows.items() if run["name"] in (name, f"{name}, seed={run['seed']}")]
            if at and key in run["metrics"]:
                panel.scatter(run["metrics"][key]["value"], at[0], s=7, color="#d55e00", zorder=4)
        panel.set_xlabel(label)
        panel.set_yticks(list(rows.values()), list(rows), fontsize=8)
        panel.grid(axis="x", color="#e5e5e5")
        panel.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file, dpi=110)


def _short(value: Any) -> Any:
    """The same with numbers of six digits."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
