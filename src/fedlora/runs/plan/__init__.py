"""Bytes, memory and computation of a run, before it starts."""
