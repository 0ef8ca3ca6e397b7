"""Flower for users: a federation as an app, its processes and keys, and a strategy for apps that are there already."""
