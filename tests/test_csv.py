"""Cells of CSV files: text that a spreadsheet would run is quoted, numbers are not."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe.files import FORMULA_SIGNS, csv_cell


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ('=HYPERLINK("http://a")', '\'=HYPERLINK("http://a")'),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t=1"),
        ("\uff1d1", "'\uff1d1"),
        ("-1.2345", "-1.2345"),
        ("+3e-5", "+3e-5"),
        (-3, -3),
        (-0.5, -0.5),
        (None, None),
        ("", ""),
        ("a=b", "a=b"),
        ("[news]", "[news]"),
    ],
)
def test_a_cell(value, cell):
    assert csv_cell(value) == cell


@pytest.mark.fuzz
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_no_cell_is_a_formula_and_none_is_lost(text):
    file = io.StringIO(newline="")
    csv.writer(file).writerow([csv_cell(text), "end"])
    cell, end = next(csv.reader(io.StringIO(file.getvalue(), newline="")))
    assert end == "end"
    assert cell in (text, f"'{text}")
    if cell.startswith(FORMULA_SIGNS):
        float(cell)
