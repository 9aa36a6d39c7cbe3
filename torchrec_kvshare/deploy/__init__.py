"""nginx, Redis and a local cluster round the server."""
