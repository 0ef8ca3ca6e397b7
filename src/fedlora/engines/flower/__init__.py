"""Federations on Flower: the same two functions, with Flower's messages between them."""
