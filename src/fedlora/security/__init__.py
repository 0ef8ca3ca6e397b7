"""Validation of uploads, robust aggregation, attacks, secure aggregation and differential privacy."""
