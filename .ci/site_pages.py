"""Pages of the site that are made while it is built: they say what the code says, and nothing else.

The files under docs/ link to each other and, by ``../``, to the rest of the repository, as a forge
shows them. Here those links lead to the pages that stand for these files in the site, and files of
docs/ are called by the titles of their pages. Names in code break only where a name may.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
STANDS_FOR = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples": "examples/index.md",
}
KEPT = re.compile(r"(<pre.*?</pre>|<a .*?</a>)", re.DOTALL)  # neither code blocks nor links change
NAMED = re.compile(r"(<a [^>]*>)(?:docs/)?(\w+\.md)</a>")
BARE = re.compile(r"(<code>)?docs/(\w+\.md)(?(1)</code>)")
OPTION = re.compile(r"(?<![\w`-])--[a-z][\w-]*")
WHOLE = 22  # letters of a name that leaves room for other columns
PROSE, WORDS = 40, 12  # letters from which a cell is a text or a few words, and needs a width
LOADED_BY = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file holds."""
    for path, text in generated_pages():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links out of docs/ to the pages that stand for their targets."""
    if page.file.generated_by:
        return markdown

    def inside(found: re.Match[str]) -> str:
        target = found[1].rstrip("/")
        if target in STANDS_FOR:
            return f"]({STANDS_FOR[target]}"
        if target.startswith("examples/") and (ROOT / target).is_file():
            return f"]({target.removesuffix('.py')}.md"
        raise PluginError(f"{page.file.src_uri}: no page stands for ../{target}")

    return OUTSIDE.sub(inside, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Call pages by their titles, and let code and tables be read on a narrow screen."""

    def titled(found: re.Match[str]) -> str:
        return f"{found[1]}{title(files, found[2])}</a>"

    def linked(found: re.Match[str]) -> str:
        address = get_relative_url(target(files, found[2]).url, page.url)
        return f'<a href="{address}">{title(files, found[2])}</a>'

    parts = KEPT.split(html)
    parts[::2] = [readable(BARE.sub(linked, part)) for part in parts[::2]]
    return prose(NAMED.sub(titled, "".join(parts)))


def target(files: Files, name: str) -> File:
    """Return the file of the page that a file of the repository is shown as."""
    found = files.get_file_from_path(STANDS_FOR.get(name, name))
    if found is None:
        raise PluginError(f"no page stands for {name}")
    return found


def title(files: Files, name: str) -> str:
    """Return the heading of a page."""
    return target(files, name).content_string.partition("\n")[0].removeprefix("# ").strip()


def readable(html: str) -> str:
    """Keep short names in code whole, and let long ones break where their parts end."""

    def word(found: re.Match[str]) -> str:
        text = found[0]
        if len(unescape(text)) > WHOLE:
            return re.sub(r"([/_.,=]|::)(?=\w)", r"\1<wbr>", text)
        return f'<span class="whole">{text}</span>' if re.search(r"[-/?]", text) else text

    def code(found: re.Match[str]) -> str:
        return f"<code>{re.sub(r'[^ ]+', word, found[1])}</code>"

    return re.sub(r"<code>([^<]*)</code>", code, html)


def prose(html: str) -> str:
    """Mark the cells that hold a text or a few words, so that the style gives them a width."""

    def cell(found: re.Match[str]) -> str:
        length = len(unescape(re.sub(r"<[^>]*>", "", found[1])))
        kind = "prose" if length > PROSE else "words" if length > WORDS else ""
        return f'<td class="{kind}">{found[1]}</td>' if kind else found[0]

    return re.sub(r"<td>(.*?)</td>", cell, html, flags=re.DOTALL)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse a page that would load something from elsewhere."""
    for address in loaded(output):
        if re.match(r"(?:https?:)?//", address):
            raise PluginError(f"{page.file.src_uri} loads {address}")
    return output


def loaded(html: str) -> list[str]:
    """Return the addresses of everything that a browser fetches to show a page."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.extend(value for key, value in attributes if key == LOADED_BY.get(tag) and value)

    Reader().feed(html)
    return found


def generated_pages() -> Iterator[tuple[str, str]]:
    """Yield path and text of every generated page."""
    yield "reference/commands.md", commands()
    yield "reference/configuration.md", configuration()
    yield "reference/python.md", python()
    yield "reference/report.md", report()
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, page in STANDS_FOR.items():
            text = text.replace(f"]({other})", f"]({page})")
        yield STANDS_FOR[name], text
    yield from examples()


def commands() -> str:
    """Return every command with its arguments and options, as ``--help`` has them."""
    import typer.main

    import cli

    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    parts = ["# Commands", coded(str(group.help)), cli.EXIT_CODES]
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(["compress", name, *command.collect_usage_pieces(context)])
        records = [p.get_help_record(context) for p in command.get_params(context)]
        rows = [(f"`{flags}`", coded(text)) for flags, text in filter(None, records)]
        parts += [f"## compress {name}", coded(str(command.help)), f"```sh\n{usage}\n```"]
        parts.append(table(("option", "what it does"), rows))
    return "\n\n".join(parts) + "\n"


def coded(text: str) -> str:
    """Return a text of ``--help`` with its options as code."""
    return OPTION.sub(r"`\g<0>`", text)


def configuration() -> str:
    """Return every key of a run's configuration with its default and what it means."""
    from compress.config import RunConfig

    parts = [
        "# Configuration",
        "The keys of a run's TOML file, by section; `--set section.key=value` sets one. An unknown "
        "key is an error that names the nearest known one.",
    ]
    plain, sections = [], []
    for name, field in RunConfig.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None:
            plain.append((name, field))
        else:
            sections.append((f"## {name}", field.annotation.__doc__ or "", list(inner.items())))
    sections.insert(0, ("## At the top", "", plain))
    for heading, text, fields in sections:
        rows = [(f"`{key}`", shown(field), field.description or "") for key, field in fields]
        parts += [heading, " ".join(text.split()), table(("key", "default", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def shown(field: Any) -> str:
    """Return a default as TOML would have it."""
    from compress.config.pruning import Budget

    default = field.get_default(call_default_factory=True)
    if default is None or field.is_required():
        return ""
    if isinstance(default, Budget):
        default = str(default)  # as a run writes it
    elif hasattr(default, "model_dump"):
        default = default.model_dump(mode="json")
    return f"`{json.dumps(default, default=str)}`"


def python() -> str:
    """Return directives for the public names, in the order in which a script meets them."""
    import compress

    names = [name for name in compress.__all__ if not name.startswith("__")]
    blocks = [f"::: compress.{name}" for name in names]
    opening = (
        "What `import compress` offers. [The library](../library.md) shows every name at work."
    )
    return "\n\n".join(["# Python", opening, *blocks]) + "\n"


def report() -> str:
    """Return what a report holds, from its published schema."""
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8"))
    parts = [
        "# Report",
        "What `report.json` holds. The [JSON schema](../report.schema.json) says the same to a "
        "program.",
    ]
    for name, part in [("Report", schema), *schema["$defs"].items()]:
        rows = [
            (f"`{key}`", kind(value), value.get("description", ""))
            for key, value in part.get("properties", {}).items()
        ]
        if rows:
            parts += [f"## {name}", " ".join(part.get("description", "").split())]
            parts.append(table(("key", "type", "meaning"), rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def kind(value: dict[str, Any]) -> str:
    """Return the type of a value of the schema, as a link where it is a part of the report."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in value:
        return " or ".join(kind(each) for each in value["anyOf"])
    if "enum" in value:
        return " or ".join(f"`{each}`" for each in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if value.get("type") == "array" and value.get("items"):
        return f"list of {kind(value['items'])}"
    if value.get("type") == "object" and isinstance(value.get("additionalProperties"), dict):
        return f"mapping to {kind(value['additionalProperties'])}"
    return str(value.get("type", "any"))


def examples() -> Iterator[tuple[str, str]]:
    """Yield a page for each script of examples/, and one that lists them."""
    rows = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        said = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
        rows.append((f"[{path.name}]({path.stem}.md)", " ".join(said.split())))
        yield f"examples/{path.stem}.md", f"# {path.name}\n\n```python\n{source}```\n"
    opening = "Each runs as it is, in seconds, on data that it makes itself."
    listed = table(("script", "shows"), rows)
    yield "examples/index.md", f"# Examples\n\n{opening}\n\n{listed}\n"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; what is no code in it is text, whatever its signs."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(text: str) -> str:
    """Return a text as it stands in one cell of a table."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(p if p.startswith("`") else p.replace("<", "&lt;") for p in parts)
