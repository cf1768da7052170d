"""Plans in a web browser: the engine that drives a page, the page and its server, what is written for it."""
