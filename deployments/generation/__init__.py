"""From a request to the plans and jobs that answer it."""
