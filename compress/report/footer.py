"""What the numbers of the table mean, in a few lines below it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compress.evaluate.config import EXTRAPOLATED_FROM

NOISE = "≈"
NO_NEARER = "°"
NOISE_FLOOR = "noise floor"
MARKS = {
    NOISE: f"{NOISE} no difference from the teacher beyond the noise",
    NO_NEARER: f"{NO_NEARER} no nearer to the teacher's images than those of other seeds",
}
PAIRED = ("fid_teacher", "psnr", "ssim", "ms_ssim", "lpips", "latent_psnr")
UNBIASED_FROM = 10_000
"""Images from which FID's bias is small enough to compare with other tables."""

NAMED = 8
"""Rows whose number formats are named one by one; of more only how many have each."""

Entry = Mapping[str, Any]


def footer(
    rows: Sequence[tuple[str, Entry]], titles: Mapping[str, str], marks: Iterable[str], manifest: Entry | None = None
) -> list[str]:
    """N, sampling settings, networks with hashes, what cost was measured on, bias and noise; one sentence each.

    Args:
        rows: Name and entry (``cost``, ``metrics``) of each row.
        titles: Key and heading of the metrics shown.
        marks: Those behind numbers, :data:`NOISE` and :data:`NO_NEARER`.
        manifest: See :func:`compress.evaluate.manifest.manifest`.
    """
    entries = [entry for _, entry in rows]
    sampled = [entry for name, entry in rows if not name.startswith(NOISE_FLOOR)]  # its seeds are others, on purpose
    usual = [entry for entry in sampled if not how_sampled(entry)] or sampled
    lines = [_protocol(manifest or {}) + _images(usual, manifest or {}), _networks(entries, titles), _cost(entries)]
    lines += [f"{name}: {how_sampled(entry)}." for name, entry in rows if entry in sampled and entry not in usual]
    lines += [_formats(rows), *_sparse(rows), *counted(rows), *_model_files(rows)]
    paired = [title.partition(" (")[0] for key, title in titles.items() if key in PAIRED]
    if paired:
        lines.append(f"{', '.join(paired)}: to the teacher's images of the same prompts and seeds.")
    if any(name.startswith(NOISE_FLOOR) for name, _ in rows):
        lines.append(
            f"{NOISE_FLOOR}: the teacher with other seeds: what chance alone does to a metric, and what a different "
            "image of the same prompt gets."
        )
    if "fid" in titles:
        n = values(entries, "n", ("fid",))
        if not n or min(int(value) for value in n) < UNBIASED_FROM:
            lines.append(
                f"FID below {UNBIASED_FROM:,} images is biased: compare it within this table only, never with "
                "published numbers."
            )
    if "fid.infinite" in titles:
        first = values(entries, "infinite_from", ("fid",))
        begin = f"published ones begin at {EXTRAPOLATED_FROM:,}"
        rough = f", here from subsets of {' or '.join(first)} on, which is rough: {begin}"
        few = any(int(value) < EXTRAPOLATED_FROM for value in first)
        lines.append(f"FID∞ is FID extrapolated to infinitely many images (Chong & Forsyth 2020){rough * few}.")
    if level := values(entries, "interval"):  # a mean over seeds has one of its own
        of = values(entries, "interval_of", [k for k in titles if k not in PAIRED])
        share = f"{100 * float(level[0]):g} % interval" if len(level) == 1 else "interval"
        lines.append(f"[low, high] is the {share} of a metric{f': {of[0]}' if of else ''}.")
    for key, title in titles.items():
        lines += [f"{title} without an interval: {why}." for why in values(entries, "why", (key,))]
    if NOISE in marks:
        lines.append(
            f"{NOISE} marks a difference from the teacher within the noise: at most half the 95 % interval of the "
            "difference of two independent draws."
        )
    if NO_NEARER in marks:
        lines.append(
            f"{NO_NEARER} marks what is no nearer to the teacher's images than those of other seeds (the "
            f"{NOISE_FLOOR}), within the difference of two independent draws."
        )
    return [line for line in lines if line]


def values(entries: Iterable[Entry], key: str, names: Iterable[str] | None = None) -> list[str]:
    """The distinct values of a setting in all rows' metrics (or those named), in order; usually one."""
    found: dict[str, None] = {}
    for entry in entries:
        metrics = entry.get("metrics") or {}
        for name in metrics if names is None else names:
            metric = metrics.get(name)
            if isinstance(metric, Mapping) and metric.get(key) is not None:
                found[_text(metric[key])] = None
    return list(found)


def _protocol(manifest: Entry) -> str:
    if not manifest:
        return ""
    changed = f" with other {', '.join(manifest['changed'])}" if manifest.get("changed") else ""
    return f"Protocol {manifest['protocol']} version {manifest['version']}{changed}. "


def _images(entries: Sequence[Entry], manifest: Entry) -> str:
    labels = {
        "n": "N =",
        "resolution": "resolution",
        "scheduler": "scheduler",
        "steps": "steps",
        "guidance": "guidance",
        "dtype": "dtype",
        "seed": "seed",
    }
    names = [name for entry in entries for name in entry.get("metrics") or {} if name != "latent_psnr"]  # of fewer
    found = [(label, values(entries, key, names)) for key, label in labels.items()]
    text = ", ".join(f"{label} {' / '.join(texts)}" for label, texts in found if texts)
    real = values(entries, "n_reference")
    name = (manifest.get("reference") or {}).get("name") or "the real images"
    return f"Images: {text}{f'; compared with {real[0]} of {name}' if real else ''}." if text else ""


def how_sampled(entry: Entry) -> str:
    """Scheduler, steps and guidance of a row that is sampled as it was trained to be; empty for others."""
    if not values([entry], "passes"):
        return ""
    scheduler, steps, guidance = (" / ".join(values([entry], key)) for key in ("scheduler", "steps", "guidance"))
    return f"sampled with {scheduler}, {steps} steps, and guidance {guidance} in one pass, as it was trained to be"


def _networks(entries: Sequence[Entry], titles: Mapping[str, str]) -> str:
    """Networks with the beginning of their hashes; metrics of the same network share an entry."""
    users: dict[str, list[str]] = {}
    for key, title in titles.items():
        names, hashes = values(entries, "network", (key,)), values(entries, "network_sha256", (key,))
        if names:
            network = " / ".join(names) + (f" ({' / '.join(text[:8] for text in hashes)})" if hashes else "")
            users.setdefault(network, []).append(title)
    text = "; ".join(f"{', '.join(of)}: {network}" for network, of in users.items())
    return f"Networks, with the beginning of their SHA256: {text}." if text else ""


def _cost(entries: Sequence[Entry]) -> str:
    found: dict[str, dict[str, None]] = {}
    ranges = False
    for entry in entries:
        cost = entry.get("cost") or {}
        ranges = ranges or ("latency_low_s" in cost and "interval_of" not in cost)
        settings = (entry.get("cost") or {}).get("settings") or {}
        for key, value in settings.items():
            if isinstance(value, Mapping):  # such as the kernels of a compiled graph
                continue
            text = "x".join(map(str, value)) if isinstance(value, list | tuple) else _text(value)
            found.setdefault(key, {})[text] = None
    of = " / ".join(found.pop("of", {}))
    text = ", ".join(f"{key.replace('_', ' ')} {' / '.join(texts)}" for key, texts in found.items())
    if not text:
        return ""
    spread = "; latency is the median, its interval the 5th to 95th percentile" if ranges else ""
    return f"Cost{f' of the {of} alone' if of else ''}: {text}{spread}."


def _formats(rows: Sequence[tuple[str, Entry]]) -> str:
    """The main number format of each row's file, if they differ: half precision halves a file."""
    found = {}
    for name, entry in rows:
        by_dtype = (entry.get("cost") or {}).get("bytes_by_dtype")
        if by_dtype:
            found[name] = max(by_dtype, key=lambda dtype: by_dtype[dtype])
    if len(set(found.values())) < 2:
        return ""
    cast = len({dtype for dtype in found.values() if "F" in dtype}) > 1  # F32, F16, BF16
    also = " A cast from 32 to 16 bits alone halves a file." if cast else ""
    if len(found) > NAMED:
        counts = Counter(found.values())
        return f"On disk, mostly: {', '.join(f'{dtype} in {count} rows' for dtype, count in counts.items())}.{also}"
    return f"On disk, mostly: {', '.join(f'{name} {dtype}' for name, dtype in found.items())}.{also}"


def _sparse(rows: Sequence[tuple[str, Entry]]) -> list[str]:
    """What zeros save, if a row has many."""
    costs = {name: entry.get("cost") or {} for name, entry in rows}
    sparse = {name: cost for name, cost in costs.items() if cost.get("sparse_bytes") is not None}
    if not sparse:
        return []
    lines = [
        "Zeros are weights of convolutions and linear layers. They are stored and computed like other numbers, so "
        "files are no smaller and passes no faster. Stored sparse is the file's size with one bit a number and the "
        "nonzero values; diffusers reads no such file."
    ]
    grouped = {name: cost["sparsity_2_4"] for name, cost in sparse.items() if cost.get("sparsity_2_4", 0) > 0.01}
    if grouped:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in grouped.items())
        lines.append(
            f"2:4, of these weights: {shares}. Linear layers of that pattern run on sparse tensor cores of NVIDIA GPUs "
            "after torchao's sparsify_ (docs/pruning.md), which was not measured here."
        )
    return lines


def counted(rows: Sequence[tuple[str, Entry]]) -> list[str]:
    """Rows with images that make the averages misleading: with a single color, or equal to the teacher's."""
    lines = []
    for name, entry in rows:
        metrics = {key: metric for key, metric in (entry.get("metrics") or {}).items() if isinstance(metric, Mapping)}
        blank = max((metric.get("blank") or 0 for metric in metrics.values()), default=0)
        if blank:
            lines.append(f"{name}: {blank} images have a single color.")
        psnr = metrics.get("psnr", {})  # latents may be equal where images are not: another decoder
        if psnr.get("equal"):
            lines.append(
                f"{name}: {psnr['equal']} images equal the teacher's to the bit, their PSNR counted as "
                f"{psnr['cap']:g} dB."
            )
    return lines


def _model_files(rows: Sequence[tuple[str, Entry]]) -> list[str]:
    """Rows whose checkpoint carries a model file."""
    carriers: dict[str, list[str]] = {}
    for name, entry in rows:
        if entry.get("model_file"):
            carriers.setdefault(str(entry["model_file"]), []).append(name)
    return [f"{', '.join(names)}: {how_to_load(file)}" for file, names in carriers.items()]


def how_to_load(model_file: str) -> str:
    """How to load a checkpoint with a model file."""
    return (
        f"a stock config cannot express these layers, so the checkpoint carries {model_file}; diffusers loads it with "
        "trust_remote_code=True, or without that flag after `import compress`."
    )


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
