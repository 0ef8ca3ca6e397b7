"""Pretrained networks, and text that they generate."""
