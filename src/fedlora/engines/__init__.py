"""Where `client_turn` and `server_turn` run; every engine gives the same bits."""
