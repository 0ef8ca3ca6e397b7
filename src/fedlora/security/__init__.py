"""What an upload must be, what hostile clients do, what the server may not learn."""
