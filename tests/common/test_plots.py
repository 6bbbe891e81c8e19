"""Figures say where and when they were measured."""

import pytest

from hotlap.common.plots import caption, new_figure

pytest.importorskip("matplotlib")


def test_a_caption_stands_below_what_is_drawn_and_takes_any_text(tmp_path):
    figure = new_figure(figsize=(4, 2))
    axes = figure.subplots()
    axes.set_xlabel("tokens")
    caption(figure, "a $machine, 2 $threads", "", "2026-01-02 03:04 UTC")
    figure.savefig(tmp_path / "figure.png")
    (text,) = figure.texts
    assert text.get_text() == "a $machine, 2 $threads, 2026-01-02 03:04 UTC"
    assert text.get_window_extent().y1 <= axes.get_tightbbox().y0
