"""The Ray Serve application: ingress, retriever, store and worker deployments, and the command line."""
