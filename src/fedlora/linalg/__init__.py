"""Low-rank algebra: products, least squares, balancing."""
