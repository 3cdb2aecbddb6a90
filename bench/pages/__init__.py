"""Shows a report: tables, Markdown, the page and its plots."""
