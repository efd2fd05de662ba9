"""Templates and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from ffl_deploy.markdown import fill, megabytes, percent, table, within


def test_a_template_is_filled_and_an_empty_paragraph_goes(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# $title\n\n$advice\n\n```python\nx = 1\n```\n")
    assert fill(page, title="A $5 cup", advice="") == "# A $5 cup\n\n```python\nx = 1\n```\n"
    assert fill(page, title="x", advice="Do.").startswith("# x\n\nDo.\n\n```")


@pytest.mark.parametrize("values", [{"title": "x"}, {"title": "x", "advice": "", "more": ""}])
def test_a_forgotten_name_or_value_is_an_error(values: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# $title\n\n$advice\n")
    with pytest.raises(ValueError, match=r"page\.md: .*(advice|more)"):
        fill(page, **values)


def test_a_table_has_as_many_cells_as_headings() -> None:
    assert table(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 |  |"
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        table(["a", "b"], [["1"]])


def test_numbers() -> None:
    assert (percent(0.71797), percent(0.98, 0), percent(None)) == ("71.80 %", "98 %", "-")
    assert within(0.7091, 0.7267) == "70.91 to 72.67"
    assert megabytes(970_499) == "0.97"
