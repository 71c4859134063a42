"""The HTTP application: routes, middleware, request bodies and streams."""
