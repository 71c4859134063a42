"""Plan requests, make jobs of them, and put their answers together."""
