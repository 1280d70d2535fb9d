"""``report.html``: one page without a network, from tables, charts and pictures."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compress.report.charts import CURVES, Curve, curve_chart, curve_styles, embed, front_chart
from compress.report.formats import Table
from compress.report.pareto import Front
from compress.report.pictures import PictureGrid

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Content:
    """What a page shows, from the top down; what is empty is left out.

    Attributes:
        title: Of the page.
        lead: What it says in a sentence or two.
        facts: Name and text of what one asks first.
        tables: Of numbers.
        each: Of the numbers of every run, where the first tables are means; folded up.
        failures: Points that have no numbers, and why.
        fronts: Quality over cost.
        pictures: The same prompts for all rows; each teacher stands above its rows.
        curves: Title to name to losses.
        stages: Times, and what came from the store.
        differences: Between the configs.
        notes: What the numbers mean.
        config: The config as text.
    """

    title: str
    lead: str = ""
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    each: Sequence[Table] = ()
    failures: Table | None = None
    fronts: Sequence[Front] = ()
    pictures: PictureGrid | None = None
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    stages: Table | None = None
    differences: Table | None = None
    notes: Sequence[str] = ()
    config: str = ""

    def all_tables(self) -> list[Table]:
        """Every table, in the order of the page."""
        return [*self.tables, *self.each, *(table for table in (self.failures, self.stages, self.differences) if table)]


def render(content: Content) -> str:
    """The page as HTML: styles, scripts, charts and pictures are inside."""
    from jinja2 import Environment, FileSystemLoader

    figures = [*map(front_chart, content.fronts), *map(curve_chart, content.curves.values())]
    library, script, divs = embed(figures)
    losses = [
        f"{title}, {CURVES} of {len(of)} rows" if len(of) > CURVES else title for title, of in content.curves.items()
    ]
    charts = list(zip([*(front.title for front in content.fronts), *losses], divs, strict=True))
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "template"), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["breakable"] = _breakable
    template = templates.get_template("page.html")
    curves = [
        (*chart, curve_styles(of))
        for chart, of in zip(charts[len(content.fronts) :], content.curves.values(), strict=True)
    ]
    return template.render(
        content=content, library=library, script=script, fronts=charts[: len(content.fronts)], curves=curves
    )


def _breakable(name: str) -> "Markup":
    """A name whose lines may break after an underscore, and not inside of a word."""
    from markupsafe import Markup, escape

    return Markup(re.sub("(_)", r"\1<wbr>", str(escape(name))))
