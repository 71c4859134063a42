"""Request and response types of the HTTP API, and the table of its errors."""
