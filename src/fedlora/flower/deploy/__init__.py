"""A deployment over Flower: app, certificates, processes."""
