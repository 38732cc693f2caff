"""A Griffe extension for `make docs`: it turns our docstrings into Markdown."""  # noqa: INP001  # not a package

import re
from typing import Any

from griffe import Extension, Object

_PARAMETER = re.compile(r"^(?=\*\w+\*(?:(?:,| and) \*\w+\*)*: )", re.MULTILINE)
_CODE_FOLLOWS = re.compile(r"^::$\n?|(?<=\w)::$(?=\n\n)", re.MULTILINE)


class Markdown(Extension):
    """Makes a list of the parameters of a docstring, and removes the "::" before its code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _CODE_FOLLOWS.sub("", obj.docstring.value)
            obj.docstring.value = _PARAMETER.sub("\n- ", text)
