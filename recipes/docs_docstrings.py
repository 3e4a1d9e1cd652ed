"""An extension of griffe, named in mkdocs.yml: docstrings that name two things on one line are shown with two lines."""

from typing import Any

from griffe import Extension

from recipes.docs_reference import with_a_line_each


class LineEach(Extension):
    """Rewrites docstrings before they are parsed into sections."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_a_line_each(obj.docstring.value)
