"""Pictures of measurements: real files, the same bytes every time, nothing left behind."""

import os
import sys
import xml.etree.ElementTree

import pytest
from PIL import Image

from flowturbo_jax import plots
from flowturbo_jax.interfaces import InputError


def drawn():
    with plots.style():
        figure, (left, right) = plots.panels(2)
        left.plot([0, 1], [1, 2], color=plots.BLUE, label="up")
        left.fill_between([0, 1], [0.5, 1.5], [1.5, 2.5], color=plots.BLUE, alpha=plots.BAND)
        left.legend()
        right.plot([0, 1], [2, 1], color=plots.VERMILION)
    return figure


def test_a_figure_is_written_as_png_and_svg(tmp_path):
    png, svg = plots.save(drawn(), tmp_path / "new" / "v0.5")
    assert sorted(os.listdir(tmp_path / "new")) == ["v0.5.png", "v0.5.svg"]
    assert (png.name, svg.name) == ("v0.5.png", "v0.5.svg")
    width, height = plots.PANEL
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.size == (2 * width * plots.DOTS_PER_INCH, height * plots.DOTS_PER_INCH)
    assert xml.etree.ElementTree.parse(svg).getroot().tag.endswith("}svg")


def test_equal_figures_are_equal_files_whatever_the_user_has_set(tmp_path):
    import matplotlib

    first = plots.save(drawn(), tmp_path / "first")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None}):
        second = plots.save(drawn(), tmp_path / "second")
        assert matplotlib.rcParams["font.size"] == 30
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_picture_that_cannot_be_written_is_refused_and_leaves_no_draft(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*; choose another place"):
        plots.save(drawn(), tmp_path / "file" / "picture")
    (tmp_path / "picture.svg").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        plots.save(drawn(), tmp_path / "picture")
    assert sorted(os.listdir(tmp_path)) == ["file", "picture.png", "picture.svg"]


def test_drawing_needs_no_display_and_no_global_figures():
    drawn()
    assert "matplotlib.pyplot" not in sys.modules
