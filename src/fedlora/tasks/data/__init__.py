"""Rows from files and hubs, labels, templates, tokens and images."""
