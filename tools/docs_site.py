"""What `make docs` does beside MkDocs's own: pages from files outside docs/, and links to what is not a page.

README.md and its neighbours are read where they are, so that nothing is said twice. In every page, a relative link is
taken as it works in the repository; where it leads to a page, it leads to the page of the site, and to a picture, to a
copy of it; any other file or folder is shown on the project's own page. A link to nothing fails the build.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path, PurePosixPath

from griffe import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

# Pages that are files of the repository.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
PICTURES = {".png", ".svg", ".jpg", ".gif"}

# [text](target) and ![text](target), outside of code as far as the pages have any.
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    texts = {ROOT / source for source in PAGES.values()} | set((ROOT / "docs").glob("**/*.md"))
    for text in sorted(texts):
        for _, target, _ in _LINK.findall(text.read_text(encoding="utf-8")):
            picture = _in_repository(text, target)
            is_outside = picture and PurePosixPath(picture).suffix in PICTURES and not picture.startswith("docs/")
            if is_outside and files.get_file_from_path(picture) is None:
                files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    source = ROOT / PAGES[uri] if uri in PAGES else ROOT / "docs" / uri

    def rewritten(match: re.Match) -> str:
        before, target, after = match.groups()
        path, hash_sign, anchor = target.partition("#")
        found = _in_repository(source, path)
        if found is None:
            return match[0]
        if not (ROOT / found).exists():
            raise PluginError(f"{source.relative_to(ROOT)} links to {target}, which does not exist")
        site_path = {file: name for name, file in PAGES.items()}.get(found, found.removeprefix("docs/"))
        if files.get_file_from_path(site_path) is not None:
            new = os.path.relpath(site_path, PurePosixPath(uri).parent)
        else:
            new = f"{config.repo_url}/{'tree' if (ROOT / found).is_dir() else 'blob'}/main/{found}"
        return f"{before}{new}{hash_sign}{anchor}{after}"

    return _LINK.sub(rewritten, markdown)


class Examples(Extension):
    """Shows what docstrings have under "Example:" as code; the reader of docstrings knows "Examples:" only."""

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def _in_repository(source: Path, target: str) -> str | None:
    """The path in the repository that a relative link in `source` leads to; None for any other link."""
    path = target.partition("#")[0]
    if not path or ":" in path or path.startswith("/"):
        return None
    return os.path.relpath(source.parent / path, ROOT)
