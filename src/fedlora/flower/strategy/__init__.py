"""For existing projects with Flower and PEFT: a strategy for the server, and two calls for the client."""
