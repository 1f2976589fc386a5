"""What a reader must be able to read: one check for all figures."""

from collections.abc import Mapping
from itertools import combinations

from matplotlib.figure import Figure
from matplotlib.text import Text

SMALLEST, WIDEST = 8, 7
"""Font size in points; width in inches."""


def assert_legible(figures: Mapping[str, Figure], ticks: bool = True) -> None:
    """Every text is large enough, inside of its figure and apart from every other; `ticks` includes tick labels."""
    for name, figure in figures.items():
        figure.draw_without_rendering()
        assert figure.get_size_inches()[0] <= WIDEST, name
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
            if ticks:
                labels = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
                texts += [label for label in labels if label.get_visible()]
        texts = [text for text in texts if text.get_text()]
        assert all(text.get_fontsize() >= SMALLEST for text in figure.findobj(Text) if text.get_text()), name
        boxes = [Text.get_window_extent(text) for text in texts]
        for text, box in zip(texts, boxes, strict=True):
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
            assert inside, (name, text.get_text())
        for (one, first), (other, second) in combinations(zip(texts, boxes, strict=True), 2):
            across = min(first.x1, second.x1) - max(first.x0, second.x0)
            down = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert across <= 1 or down <= 1, (name, one.get_text(), other.get_text())
