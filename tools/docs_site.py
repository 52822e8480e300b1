"""A hook of mkdocs, for what the site does not know.

Links to files outside docs/: in the repository they lead somewhere, and tests/test_docs.py follows them. On
the site a link to a source file becomes its text, and a picture is copied. And roles such as :class: in
docstrings, which are Sphinx's: what they name is left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROLE = re.compile(r":(?:attr|class|func|math|meth|mod):(?=<code>)")
OUTSIDE = re.compile(r"(!?)\[([^]]*)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    def inside(link: re.Match[str]) -> str:
        is_picture, text, path = link.groups()
        if not is_picture:
            return text
        if files.get_file_from_path(path) is None:
            source = Path(config.config_file_path).parent / path
            files.append(File.generated(config, path, abs_src_path=str(source)))
        return f"![{text}]({path})"

    return OUTSIDE.sub(inside, markdown)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    return ROLE.sub("", html)
