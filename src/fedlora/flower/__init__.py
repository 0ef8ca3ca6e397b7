"""Federations of processes and machines, with Flower between them."""
