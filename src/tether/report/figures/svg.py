"""Turn matplotlib's SVG into one that a page with a strict policy can hold.

No style attributes (the policy refuses them), no addresses, ids of its own; colours become classes
that the page gives their values, so that light and dark both work.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

INK, SOFT, LINE, ACCENT = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0101", "#0a0202", "#0a0303", "#0a0404", "#0a0505", "#0a0606")
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
_CLASSES = {INK: "ink", SOFT: "soft", LINE: "line", ACCENT: "accent"} | {
    color: f"s{number}" for number, color in enumerate(SERIES, start=1)
}
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_KEPT = {
    "stroke-width",
    "stroke-linecap",
    "stroke-linejoin",
    "stroke-dasharray",
    "stroke-dashoffset",
    "stroke-opacity",
    "fill-opacity",
    "fill-rule",
    "opacity",
    "text-anchor",
    "font-size",
    "font-weight",
}
_SIZE = re.compile(r"([0-9.]+)px")
_REFERENCE = re.compile(r"url\(#([^)]*)\)")


@dataclass(frozen=True, slots=True)
class Mark:
    """What a page knows of a part of a picture.

    Attributes:
        titles: hover values.
        each: whether there is one for each point, in order.
        opens: index of the choice that a click makes.
    """

    titles: tuple[str, ...]
    each: bool = False
    opens: int | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """A line with dots that is shown with one choice. Drawn here: there may be a thousand.

    Attributes:
        choice: index of the choice.
        color: one of the colours above.
        title: hover value of the line.
        points: of the line, in the picture's own coordinates.
        dots: (x, y, hover value).
    """

    choice: int
    color: str
    title: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float, str]]


def clean(
    text: str,
    name: str,
    marks: Mapping[str, Mark],
    curves: Sequence[Curve] = (),
    chosen: int = 0,
) -> str:
    """Rewrite a picture.

    Args:
        text: SVG as matplotlib writes it.
        name: begins every id.
        marks: id in `text` -> what belongs to it.
        curves: drawn on top.
        chosen: index of the choice that is shown at first.

    Returns:
        an <svg> element for a page of HTML.
    """
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    used = _references(root)
    for element in root.iter():
        mark = marks.get(element.get("id", ""))
        _rename(element, name, used)
        _restyle(element)
        if mark is not None:
            _annotate(element, mark)
    root.extend(_drawn(curve, curve.choice == chosen) for curve in curves)
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    root.set("class", "plot")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-alt")
    root.set("width", root.get("viewBox", "").split()[2])
    return _plain(root)


def _references(root: ElementTree.Element) -> set[str]:
    found = {element.get(_LINK, "")[1:] for element in root.iter()}
    for element in root.iter():
        for value in element.attrib.values():
            found.update(_REFERENCE.findall(value))
    return found - {""}


def _rename(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Keep the ids that something refers to, under names of this picture's own."""
    own = element.attrib.pop("id", None)
    if own in used:
        element.set("id", f"{name}-{own}")
    target = element.attrib.pop(_LINK, None)
    if target is not None:
        element.set("href", f"#{name}-{target[1:]}")
    for attribute in ("clip-path", "mask"):
        if attribute in element.attrib:
            element.set(attribute, _REFERENCE.sub(rf"url(#{name}-\1)", element.attrib[attribute]))


def _restyle(element: ElementTree.Element) -> None:
    """A style attribute as classes and plain attributes."""
    classes = []
    for item in element.attrib.pop("style", "").split(";"):
        key, _, value = (part.strip() for part in item.partition(":"))
        if key in ("fill", "stroke") and value in _CLASSES:
            classes.append(f"{key[0]}-{_CLASSES[value]}")
        elif key in ("fill", "stroke"):
            element.set(key, value)
        elif key == "font":
            size = _SIZE.search(value)
            element.set("font-size", size[1] if size else "10")
        elif key in _KEPT:
            element.set(key, value.removesuffix("px"))
        elif key == "clip-path":
            element.set(key, value)
    if classes:
        element.set("class", " ".join(classes))


def _annotate(element: ElementTree.Element, mark: Mark) -> None:
    points = list(element.iter(f"{_SVG}use")) if mark.each else [element]
    for point, text in zip(points, mark.titles, strict=False):
        if text:
            title = ElementTree.Element(f"{_SVG}title")
            title.text = text
            point.insert(0, title)
    if mark.opens is not None:
        element.set("data-opens", str(mark.opens))


def _drawn(curve: Curve, shown: bool) -> ElementTree.Element:
    group = ElementTree.Element(f"{_SVG}g", {"data-choice": str(curve.choice)})
    if not shown:
        group.set("class", "off")
    path = " ".join(f"{x:.1f} {y:.1f}" for x, y in curve.points)
    line = ElementTree.SubElement(
        group,
        f"{_SVG}path",
        {"class": f"s-{_CLASSES[curve.color]}", "d": f"M{path}", "fill": "none"}
        | {"stroke-width": "1.8"},
    )
    ElementTree.SubElement(line, f"{_SVG}title").text = curve.title
    dots = ElementTree.SubElement(group, f"{_SVG}g", {"class": f"f-{_CLASSES[curve.color]}"})
    for x, y, text in curve.dots:
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "2.2"}
        ElementTree.SubElement(
            ElementTree.SubElement(dots, f"{_SVG}circle", place), f"{_SVG}title"
        ).text = text
    return group


def _plain(root: ElementTree.Element) -> str:
    """In HTML the elements of an <svg> need no namespace."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))
