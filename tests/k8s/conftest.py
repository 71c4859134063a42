"""Fixtures of the manifests' tests."""

from tests.k8s.rendering import helm, kubectl, rendered  # noqa: F401  fixtures
