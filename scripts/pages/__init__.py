"""Pages and figures of the docs that are made from the code and from measured results; ``python -m scripts.pages``."""
