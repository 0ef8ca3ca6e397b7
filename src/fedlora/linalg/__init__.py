"""Low-rank algebra: products of factors, sums of many, their geometry, least squares, balancing."""
