"""For projects that have Flower and PEFT already: a strategy for the server, and two calls for the client."""
