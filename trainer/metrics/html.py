"""Pieces of the report's page."""

from __future__ import annotations

from html import escape


def section(title: str, body: str, note: str = "") -> str:
    """A card with a heading, a line about it, and its content, which is HTML already."""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{body}</section>"


def wide(svg: str) -> str:
    """A picture over the whole width."""
    return f'<figure class="wide">{svg}</figure>'
