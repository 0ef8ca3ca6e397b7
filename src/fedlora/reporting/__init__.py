"""Runs made readable: tables, plots, progress."""
