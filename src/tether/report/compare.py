"""The page of a comparison of adapters."""

import math
from importlib.metadata import version
from pathlib import Path

from tether import fs
from tether.compare import ROUNDING, Comparison, SiteDifference
from tether.report import figures
from tether.report.compared import Compared
from tether.report.page import Cell, Facts, Page, Part, Section, Table, Text, render
from tether.report.values import kind_of
from tether.sites import layer_index


def write(values: Compared, path: Path) -> Path:
    """Write the page of a comparison.

    Args:
        values: of the comparison.
        path: of the page.

    Returns:
        the same path.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        WriteError: the page cannot be written.
    """
    fs.write_text(path, render(page_of(values)))
    return path


def page_of(values: Compared) -> Page:
    """Lay out a comparison.

    Args:
        values: of the comparison.

    Returns:
        the page.
    """
    names = [about.name for about in values.adapters.values()]
    return Page(
        title=f"{', '.join(names[:-1])} and {names[-1]}",
        summary=tuple(
            f"{values.label(letter)} against A: {pair.verdict}."
            for letter, pair in values.pairs.items()
        ),
        sections=(
            Section("Adapters", (_adapters(values), _pairs(values), *_alone(values))),
            Section("Where they differ", tuple(_maps(values))),
            Section("What fewer ranks and fewer bits would cost", tuple(_costs(values))),
            Section("On the base", tuple(_on_base(values))),
            Section("Texts", tuple(_texts(values))),
            Section("Sites", (_sites(values),)),
        ),
        foot=f"Made by tether {version('tether')}. Norms are Frobenius norms, computed in float64 "
        "from the factors; with DoRA they are those of the low-rank part.",
    )


def _adapters(values: Compared) -> Table:
    return Table(
        name="adapters",
        title="What they are",
        caption="Rank is that of the trained factors; an anchored adapter needs twice that as a "
        "plain LoRA. Size is that of its files.",
        columns=("adapter", "form", "method", "sites", "rank", "size, MB"),
        rows=tuple(
            (
                Cell.word(values.label(letter)),
                Cell.word(about.form),
                Cell.word(about.method),
                Cell.number(about.sites, "d"),
                Cell(about.rank, about.ranks[1]),
                Cell.number(about.bytes / 1e6, ".2f"),
            )
            for letter, about in values.adapters.items()
        ),
    )


def _pairs(values: Compared) -> Table:
    return Table(
        name="pairs",
        title="Against A",
        caption="Relative error is |ΔA − ΔW|/|ΔA|, over all sites and at the worst one. Cosine is "
        "that of the two changes as vectors. Overlap is the mean squared cosine of the principal "
        "angles between their leading directions, φ of arXiv 2106.09685; beside it what random "
        "directions would have.",
        columns=(
            *("adapter", "sites shared", "relative error", "worst site", "its error"),
            *("cosine", "overlap", "by chance"),
        ),
        rows=tuple(
            (
                Cell.word(values.label(letter)),
                Cell.number(len(pair.shared), "d"),
                _error(pair.error),
                Cell.word(pair.worst),
                _error(pair.sites[pair.worst].error),
                Cell.number(pair.cosine, ".6f"),
                Cell.number(pair.overlap, ".4f"),
                Cell.number(pair.chance, ".4f"),
            )
            for letter, pair in values.pairs.items()
        ),
    )


def _alone(values: Compared) -> list[Part]:
    """What only one of a pair has."""
    parts: list[Part] = []
    for letter, pair in values.pairs.items():
        for which, names in (("A", pair.only_a), (letter, pair.only_b)):
            if names:
                parts.append(Text(f"Only in {values.label(which)}: {', '.join(names)}."))
    return parts


def _maps(values: Compared) -> list[Part]:
    """One map of relative errors for each pair, where there is more to see than rounding."""
    parts: list[Part] = []
    for letter, pair in values.pairs.items():
        cells = [
            figures.Cell(kind_of(path), _layer(path), _finite(site.error), path)
            for path, site in sorted(pair.sites.items(), key=lambda item: _order(item[0]))
        ]
        if all(cell.value is None for cell in cells):
            parts.append(Text(f"{values.label(letter)} shares no changed site with A."))
            continue
        if all(site.error <= ROUNDING["float32"] for site in pair.sites.values()):
            parts.append(Text(f"{values.label(letter)} is A at every site, but for rounding."))
            continue
        parts.append(
            figures.heatmap(
                f"errors-{letter.lower()}",
                f"Relative error of ΔW, {values.label(letter)} against A",
                "The stronger the colour, the further apart, up to the largest of this map: "
                f"{_number(max(cell.value or 0.0 for cell in cells))}. Empty where A has no "
                "change.",
                cells,
                _number,
            )
        )
    return parts


def _costs(values: Compared) -> list[Part]:
    labels = {letter: values.label(letter) for letter in values.adapters}
    # The letters alone: a legend has no room for more.
    curves = {letter: about.energy for letter, about in values.adapters.items()}
    forms = list(next(iter(values.adapters.values())).losses)
    series = {
        form: [100 * _held(about.losses[form].error) for about in values.adapters.values()]
        for form in forms
    }
    return [
        figures.energies(curves),
        figures.bars(
            "precision",
            "What fewer bits would cost",
            "The relative error of ΔW after casting the factors of the plain LoRA that tether "
            "writes. int8 is symmetric, scaled by the largest value of each row.",
            tuple(labels.values()),
            series,
            unit=" %",
        ),
    ]


def _on_base(values: Compared) -> list[Part]:
    """Logits and losses, where they were measured."""
    if values.behaviour is None:
        return []
    scores = values.behaviour.scores
    rows = []
    for letter in (None, *values.adapters):
        mean = scores.mean(letter)
        row = [Cell.word(values.label(letter)), Cell.number(mean.value, ".6f")]
        row.append(Cell.number(mean.error, ".4f"))
        if letter == "A":
            rows.append((*row, *(Cell("–", None) for _ in range(5))))
            continue
        apart = scores.difference(letter, "A")
        near = values.behaviour.agreements[letter]
        row += [
            Cell(f"{apart.value:+.3g}", apart.value),
            Cell(interval(apart.low, apart.high), apart.low),
            Cell.number(near.largest, ".3g"),
            Cell.number(near.divergence, ".3g"),
            Cell.number(near.same, ".2%"),
        ]
        rows.append(tuple(row))
    tokens = next(iter(values.behaviour.agreements.values())).tokens
    return [
        Table(
            name="base",
            title="Losses and logits",
            caption=f"Loss in nats per token over {len(scores.counts)} sequences, "
            f"{int(scores.counts.sum())} tokens, with its standard error; minus A over the same "
            "sequences, with the 95% interval of a paired bootstrap. Logits over the first "
            f"{tokens} tokens: largest difference, mean KL(A ‖ other) in nats, and how often the "
            "most likely next token is the same.",
            columns=(
                *("adapter", "loss", "±", "minus A", "95% interval"),
                *("max |Δlogit|", "KL, nats", "same first choice"),
            ),
            rows=tuple(rows),
        )
    ]


def _texts(values: Compared) -> list[Part]:
    parts: list[Part] = []
    for each in values.behaviour.generations if values.behaviour is not None else ():
        parts.append(Text(f"After “{each.prompt}”, the most likely next tokens:"))
        parts.append(
            Facts({values.label(letter): f"“{text}”" for letter, text in each.texts.items()})
        )
    return parts


def _sites(values: Compared) -> Table:
    paths = dict.fromkeys(path for pair in values.pairs.values() for path in pair.sites)
    columns = ["site", "|ΔA|"]
    for letter in values.pairs:
        columns += [f"{letter}: {what}" for what in ("|ΔW|", "error", "cosine", "overlap", "rank")]
    return Table(
        name="sites",
        title="All sites",
        caption="A click on a heading sorts. Error, cosine and overlap are against A; rank is the "
        "number of directions of ΔW, singular values above 1e-5 of the largest.",
        columns=tuple(columns),
        rows=tuple(_row(path, list(values.pairs.values())) for path in paths),
    )


def _row(path: str, pairs: list[Comparison]) -> tuple[Cell, ...]:
    found = [pair.sites.get(path) for pair in pairs]
    first = next(site for site in found if site is not None)
    cells = [Cell.word(path), Cell.number(first.norm_a)]
    for site in found:
        cells += _of_pair(site)
    return tuple(cells)


def _of_pair(site: SiteDifference | None) -> list[Cell]:
    if site is None:
        return [Cell("–", None)] * 5
    return [
        Cell.number(site.norm_b),
        _error(site.error),
        Cell.number(site.cosine, ".4f"),
        Cell.number(None if site.overlap is None else site.overlap.mean, ".4f"),
        Cell.number(site.directions_b, "d"),
    ]


def _error(value: float) -> Cell:
    return Cell("∞", None) if math.isinf(value) else Cell(_number(value), value)


def _number(value: float) -> str:
    return f"{value:.2e}" if 0 < value < 1e-3 else f"{value:.3g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _held(value: float) -> float:
    """What does not fit is lost whole."""
    return value if math.isfinite(value) else 1.0


def interval(low: float | None, high: float | None) -> str:
    """The two ends of an interval.

    Args:
        low: the lower, if there is one.
        high: the upper.

    Returns:
        both, with their signs.
    """
    return "–" if low is None or high is None else f"{low:+.3g} … {high:+.3g}"


def _layer(path: str) -> str:
    index = layer_index(path)
    return "–" if index is None else str(index)


def _order(path: str) -> tuple[bool, int]:
    index = layer_index(path)
    return index is None, index or 0
