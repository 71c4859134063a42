"""Share turns and places among tenants."""
