"""What mkdocs does beside its own work when it builds the site: files outside docs/ become pages, and links follow them.

On a code host, links in the docs lead to files of the checkout, such as `../README.md`; they stay as they are there. In the
site, the files in OUTSIDE are pages of their own. A link to any other file outside docs/ goes to the repository that
pyproject.toml names under `[project.urls]`; where it names none, such a link is a warning, which `make docs` makes an error.
"""

import logging
import os.path
import posixpath
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.hooks.kvfold")
ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "repository/changes.md",
    "results/README.md": "repository/results.md",
    **{
        f"kvfold/assets/adapters/smollm2-135m-{one}/README.md": f"repository/smollm2-135m-{one}.md"
        for one in ("dms-4x", "fold-4x", "dms-8x", "fold-8x")
    },
}
"""File of the checkout -> page of the site."""

_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!\w+:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The repository's address, from pyproject.toml, where it names one."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"].get("urls", {})
    config.repo_url = config.repo_url or urls.get("Repository")
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The site's files, with those of OUTSIDE among them."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page's text with its links as the site has them; blocks of code stay as they are."""
    here = page.file.src_uri
    source = next((name for name, made in OUTSIDE.items() if made == here), f"docs/{here}")
    if here == "cli.md":
        markdown = markdown.replace("][+", "]\\[+")  # grammars such as dmc[:W][+S] are no links
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_relinked(markdown[end : fence.start()], source, here, config.repo_url), fence[0]]
        end = fence.end()
    return "".join([*parts, _relinked(markdown[end:], source, here, config.repo_url)])


def _relinked(text: str, source: str, here: str, repository: str | None) -> str:
    """Text of the file `source`, which is the page `here`, with links between pages."""

    def link(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["target"]))
        page = OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None and repository:
            return f"]({repository.rstrip('/')}/blob/main/{path}{match['anchor'] or ''})"
        if page is None:
            LOG.warning("%s links to %s, which is no page: add it to OUTSIDE in docs/site_hook.py", source, path)
            return match[0]
        target = os.path.relpath(page, posixpath.dirname(here) or ".").replace(os.sep, "/")
        return f"]({target}{match['anchor'] or ''})"

    return _LINK.sub(link, text)
