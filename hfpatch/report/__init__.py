"""Rows on disk to results.json, figures, Markdown and HTML."""
