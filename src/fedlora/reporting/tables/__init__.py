"""Tables of a run, of a comparison, of a sweep."""
