"""The generated tables of the docs agree with the code."""

import pytest

from recipes.docs_tables import DOCS, TABLES, steering_fields, with_table
from steermoe.steering.spec import NAMES


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_up_to_date(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for table in TABLES[page]:
        assert text == with_table(text, table), f"a table in docs/{page} is out of date: run `make docs`"


def test_the_table_has_every_field_of_a_plan():
    _, _, *rows = steering_fields().splitlines()
    assert [row.split('"')[1] for row in rows] == list(NAMES)
    assert all(len(row.replace("\\|", "").split("|")) == 6 and "| |" not in row for row in rows)


def test_only_the_text_between_the_comments_is_replaced():
    begin, end = "<!-- steering_fields: written by `make docs` -->", "<!-- end -->"
    text = f"before\n{begin}old{end}\nafter <!-- end -->\n"
    assert with_table(text, steering_fields) == f"before\n{begin}\n\n{steering_fields()}\n\n{end}\nafter <!-- end -->\n"
    with pytest.raises(ValueError, match="no place for its table"):
        with_table("before", steering_fields)
