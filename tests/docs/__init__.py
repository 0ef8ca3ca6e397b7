"""The docs, tested: blocks of code run, generated pages are up to date, the site builds and opens."""
