"""The groups of pods as Ray's autoscaler reads them."""

from __future__ import annotations

from collections.abc import Callable

from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.k8s.manifests import Manifests


def test_rays_own_autoscaler_reads_the_groups(rendered: Callable[[str], Manifests]) -> None:
    manifests = rendered("gpu-s3")
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": manifests.cluster}
    read = _derive_autoscaling_config_from_ray_cr(cluster)
    assert read["idle_timeout_minutes"] == 11
    nodes = read["available_node_types"]
    assert {name: (node["min_workers"], node["max_workers"]) for name, node in nodes.items()} == {
        "headgroup": (0, 0),
        "cpu": (2, 20),
        "gpu": (2, 4),
    }
    sizes = {name: (node["resources"]["CPU"], node["resources"].get("GPU", 0)) for name, node in nodes.items()}
    assert nodes["cpu"]["resources"]["cpu_pod"] == 1
    assert sizes == {"headgroup": (0, 0), "cpu": (4, 0), "gpu": (4, 1)}
