"""One adapted network on this machine: attach, load, train, evaluate, PEFT folders."""
