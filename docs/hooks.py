"""What the site takes from outside of docs/: committed figures, and the notebooks, executed where `make book` has run.

Links in the Markdown are those that hold in the repository; here they become those of the site.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

BOOK = Path("build/book")


def on_files(files, config):
    """Add figures, notebooks and, if it was built, the book."""
    root = Path(config.config_file_path).parent
    outside = {f"figures/{path.name}": path for path in (root / "figures").glob("*.png")}
    outside |= {f"notebooks/{path.name}": path for path in (root / "notebooks").glob("*.ipynb")}
    outside |= {f"book/{path.name}": path for path in (root / BOOK).glob("*.html")}
    for name, path in sorted(outside.items()):
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links that leave docs/ to their targets on the site; a notebook's to its executed copy, if there is one."""
    # from docs/ a figure lies one folder up, on the site beside the pages
    markdown = re.sub(r"\]\(\.\./((?:\.\./)*(?:figures|notebooks)/)", r"](\1", markdown)

    def executed(link: re.Match) -> str:
        up, name = link.groups()
        return f"]({up}book/{name}.html)" if files.get_file_from_path(f"book/{name}.html") else link.group()

    return re.sub(r"\]\(((?:\.\./)*)notebooks/(\w+)\.ipynb\)", executed, markdown)
