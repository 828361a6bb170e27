"""The page of one training run."""

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from tether import fs
from tether.checkpoint import Checkpoint
from tether.report import figures
from tether.report.base import with_base
from tether.report.page import Facts, Page, Part, Section, render
from tether.report.read import PAGE, adapter_of, read
from tether.report.sections import beside_base, change, one_site, site_table
from tether.report.values import RunValues
from tether.training.report import Reporter

BASE_SITES = 14  # whose weight is decomposed, unless said otherwise


def write(
    run: Path,
    path: Path | None = None,
    *,
    base: Path | None = None,
    base_sites: int = BASE_SITES,
    verify: bool = True,
    reporter: Reporter | None = None,
) -> Path:
    """Write the page of a run.

    Args:
        run: folder of `tether train`, or output_dir of an adapted Trainer. Only read, but for the
            page.
        path: of the page; None for report.html in the run's folder.
        base: folder of the base model, for what needs its weights; None to leave that out.
        base_sites: most sites whose weight is read; 0 for all.
        verify: check that the weights read are those the adapter was made on.
        reporter: shows progress.

    Returns:
        where the page is.

    Raises:
        ConfigError: there is no run.
        FormatError: a file of it is damaged.
        BaseMismatchError: the base is another model.
        MissingExtraError: matplotlib or jinja2 is not installed.
        WriteError: the page cannot be written.
    """
    if (missing := figures.missing_library()) is not None:
        raise missing
    reporter = reporter or Reporter()
    adapter = adapter_of(run)
    with reporter.task("Measuring the sites") as task:
        values = read(run, adapter, task)
    if base is not None:
        with reporter.task("Reading the base") as task:
            sites = with_base(
                adapter,
                values.sites,
                Checkpoint.open(base),
                base_sites,
                verify=verify,
                progress=task,
            )
        values = replace(values, sites=tuple(sites))
    target = run / PAGE if path is None else path
    with reporter.task("Drawing the page"):
        fs.write_text(target, render(page_of(values)))
    return target


def page_of(values: RunValues) -> Page:
    """Lay out a run.

    Args:
        values: of the run.

    Returns:
        the page.
    """
    return Page(
        title=f"Training run “{values.name}”",
        summary=tuple(_summary(values)),
        sections=(
            Section("Training", tuple(_training(values))),
            Section("Where the weights changed", tuple(change(values.sites))),
            Section("One site", tuple(one_site(values.sites))),
            Section("Beside the base's own directions", tuple(beside_base(values.sites))),
            Section("Sites", (site_table(values.sites),)),
            Section("Size on disk", tuple(_sizes(values))),
            Section("Settings", (Facts(values.facts),)),
        ),
        foot=f"Made by tether {version('tether')}. All numbers are computed from the files of the "
        "run; norms are Frobenius norms.",
    )


def _summary(values: RunValues) -> list[str]:
    sentences = []
    training, held_out = values.curves.get("training loss"), values.curves.get("held-out loss")
    if training:
        (first, began), (last, ended) = training[0], training[-1]
        sentences.append(f"Training loss {began:.4g} at step {first}, {ended:.4g} at step {last}.")
    if held_out and len(held_out) > 1:
        (first, began), (last, ended) = held_out[0], held_out[-1]
        sentences.append(f"Held-out loss {began:.4g} at step {first}, {ended:.4g} at step {last}.")
    if values.drift and values.drift[-1].relative is not None:
        end = values.drift[-1]
        sentences.append(
            f"The adapted weights moved by {end.relative:.3%} of their norm, with a mean effective "
            f"rank of {end.effective_rank:.1f}."
        )
    moved = [site for site in values.sites if site.relative]
    if moved:
        most = max(moved, key=lambda site: site.relative or 0.0)
        sentences.append(f"Most changed: {most.path}, by {most.relative:.3%}.")
    return sentences + list(values.notes)


def _training(values: RunValues) -> list[Part]:
    parts: list[Part] = []
    losses = {n: values.curves[n] for n in ("training loss", "held-out loss") if n in values.curves}
    if losses:
        caption = "Training loss is that of one step's batch; held-out loss that of text that is "
        parts.append(figures.curves("loss", "Loss", caption + "not trained on.", losses))
    parts += _drift(values)
    for key, name, caption in (
        ("learning rate", "learning-rate", "As it was at each step."),
        ("gradient norm", "gradient-norm", "Before clipping."),
        ("seconds per step", "time", "Mean since the run began, or was resumed."),
    ):
        if key in values.curves:
            title = key.capitalize()
            parts.append(figures.curves(name, title, caption, {key: values.curves[key]}, zero=True))
    return parts


def _drift(values: RunValues) -> list[Part]:
    if len(values.drift) < 2:
        return []
    parts: list[Part] = []
    if all(point.relative is not None for point in values.drift):
        points = [(point.step, 100 * (point.relative or 0.0)) for point in values.drift]
        parts.append(
            figures.curves(
                "drift",
                "Drift",
                "|ΔW|/|W| of all sites together.",
                {"|ΔW|/|W|": points},
                unit=" %",
                zero=True,
            )
        )
    ranks = [(point.step, point.effective_rank) for point in values.drift if point.step > 0]
    if len(ranks) > 1:
        parts.append(
            figures.curves(
                "drift-rank",
                "Effective rank over training",
                "Mean over the sites.",
                {"effective rank": ranks},
                zero=True,
            )
        )
    return parts


def _sizes(values: RunValues) -> list[Part]:
    if not values.sizes:
        return []
    sizes = {"size": [size / 1e6 for size in values.sizes.values()]}
    caption = "Each file or folder of the run, but for this page."
    return [
        figures.bars("sizes", "Files of the run", caption, tuple(values.sizes), sizes, unit=" MB")
    ]
