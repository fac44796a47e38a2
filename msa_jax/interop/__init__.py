"""Bridges to other frameworks and formats."""
