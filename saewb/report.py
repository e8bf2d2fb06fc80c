"""One page about an index for anyone with a browser."""
