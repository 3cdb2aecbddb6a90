"""Pages of the site that are made while it is built: they say what the code says, and nothing else.

The files under docs/ link to each other and, by ``../``, to the rest of the repository, as a forge
shows them. Here those links lead to the pages that stand for these files in the site.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
STANDS_FOR = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples": "examples/index.md",
}
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
    parts = ["# Commands", str(group.help), cli.EXIT_CODES]
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(["compress", name, *command.collect_usage_pieces(context)])
        records = [p.get_help_record(context) for p in command.get_params(context)]
        rows = [(f"`{flags}`", text) for flags, text in filter(None, records)]
        parts += [f"## compress {name}", str(command.help), f"```sh\n{usage}\n```"]
        parts.append(table(("option", "what it does"), rows))
    return "\n\n".join(parts) + "\n"


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
    default = field.get_default(call_default_factory=True)
    if default is None or field.is_required():
        return ""
    if hasattr(default, "model_dump"):
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
