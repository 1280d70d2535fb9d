"""A table of written numbers, as Markdown, LaTeX and CSV; the page's template writes it as HTML."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "–"
LONG = 60  # letters that LaTeX breaks into lines


@dataclass(frozen=True)
class Cell:
    """One number of the table.

    Attributes:
        value: The number as written.
        interval: ``"[low, high]"`` or empty.
        ratio: Share of the teacher's number, ``"0.58x"``, or empty.
        mark: Whether the difference from the teacher, or from the teacher with other seeds, lies inside the noise:
            :data:`compress.report.footer.NOISE`, :data:`compress.report.footer.NO_NEARER` or empty.
        best: Whether it is the best of its column, beyond the noise.
        number: The bare number in the stored unit, to sort by; None for texts and what is missing.
    """

    value: str = MISSING
    interval: str = ""
    ratio: str = ""
    mark: str = ""
    best: bool = False
    number: float | None = None

    def line(self) -> str:
        """The cell in one line."""
        parts = (self.value + self.mark, self.interval, self.ratio and f"({self.ratio})")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Table:
    """A table: a name and cells in each row.

    Attributes:
        title: What it shows.
        headings: Of the first column and of the cells'.
        rows: Name and cells, as many as headings in all.
        text: Whether the cells are texts, which stand on the left.
        note: What its numbers are, if the table does not say it.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    text: bool = False
    note: str = ""


def markdown(table: Table) -> str:
    """The table as Markdown, without its title; the best of a column is bold."""
    lines = ["| " + " | ".join(map(_bar, table.headings)) + " |"]
    lines.append("|---|" + ("---|" if table.text else "---:|") * (len(table.headings) - 1))
    for name, cells in table.rows:
        texts = [f"**{cell.line()}**" if cell.best else _bar(cell.line()) for cell in cells]
        lines.append("| " + " | ".join([_bar(name), *texts]) + " |")
    return "\n".join(lines) + "\n"


def _bar(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


SYMBOLS = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "→": r"$\to$", "≈": r"$\approx$", "°": r"$^\circ$", "∞": r"$\infty$",
    "–": "--", "−": "$-$", "±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "·": r"$\cdot$",
}  # fmt: skip


def latex(tables: Iterable[Table], source: str, notes: Sequence[str] = ()) -> str:
    r"""The tables as LaTeX with booktabs, to be read by ``\input``; a table that is too wide is scaled down.

    Args:
        tables: With their titles and notes as captions.
        source: What the tables are of, for a comment.
        notes: What the numbers mean, for a list below the tables.
    """
    lines = [f"% {' '.join(source.split())}", r"% In the preamble: \usepackage{booktabs,graphicx}"]
    for table in tables:
        caption = f"{table.title}. {table.note}" if table.note else table.title
        lines += ["", r"\begin{table}", r"\centering", f"\\caption{{{_tex(caption)}}}"]
        lines.append(r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%")
        lines.append(f"\\begin{{tabular}}{{l{''.join(_tex_columns(table))}}}")
        lines += [r"\toprule", " & ".join(map(_tex, table.headings)) + r" \\", r"\midrule"]
        # A [ or * after the break of a line would belong to it.
        lines += [" & ".join([f"{{}}{_tex(name)}", *map(_tex_cell, cells)]) + r" \\" for name, cells in table.rows]
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
    if notes:
        lines += [
            "",
            r"{\footnotesize",
            r"\begin{itemize}",
            *(f"\\item {_tex(note)}" for note in notes),
            r"\end{itemize}}",
        ]
    return "\n".join(lines) + "\n"


def _tex_columns(table: Table) -> list[str]:
    """The kinds of the columns of cells: numbers on the right, texts on the left, long ones in lines."""
    if not table.text:
        return ["r"] * (len(table.headings) - 1)
    longest = [
        max(len(cell.line()) for cell in column) for column in zip(*(cells for _, cells in table.rows), strict=True)
    ]
    return [r"p{0.4\textwidth}" if letters > LONG else "l" for letters in longest]


def _tex_cell(cell: Cell) -> str:
    value = _tex(cell.value + cell.mark)
    parts = [f"\\textbf{{{value}}}" if cell.best else value]
    parts += [f"{{\\scriptsize {_tex(text)}}}" for text in (cell.interval, cell.ratio) if text]
    return " ".join(parts)


def _tex(text: str) -> str:
    """The text for LaTeX; what its standard fonts lack becomes a question mark."""
    return "".join(SYMBOLS.get(sign, sign if " " <= sign <= "~" or "¡" <= sign <= "ÿ" else "?") for sign in text)


def csv_text(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV; None is empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return stream.getvalue()
