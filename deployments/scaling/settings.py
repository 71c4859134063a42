"""The options of one Serve deployment, in Serve's own words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, RootModel, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from deployments.field_problems import did_you_mean
from deployments.json_types import JsonMapping, JsonObject

AUTOSCALING, ACTOR = "autoscaling_config", "ray_actor_options"
_NOT_OURS = {"name", "user_config"}  # options of Serve that the application decides
_FIXED = ("CPU", "GPU", "memory")  # resources that have options of their own
# How long a replica that stops waits before it looks for requests in progress, and between two looks. Serve's own is 2,
# which a stop of the application takes three times: deployments stop before those that they call.
DRAIN_CHECK_S = 0.25


class ServeOptions(RootModel[dict[str, Any]]):
    """Options that Serve gives to one deployment: see `ray.serve.deployment`.

    Serve's own models check them. CPUs are logical: they place replicas and do not bind cores. Choose a group of
    machines by `ray_actor_options.num_gpus`, or by a custom resource that only these nodes have.
    """

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="after")
    def _check_by_serve(self) -> Self:
        if problems := list(_find_problems(self.root)):
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    @property
    def min_replicas(self) -> int:
        """The least number of replicas."""
        return int(self._bounds.get("min_replicas", 1))

    @property
    def max_replicas(self) -> int:
        """The largest number of replicas."""
        return int(self._bounds.get("max_replicas", 1))

    @property
    def num_cpus(self) -> float:
        """Logical CPUs that one replica reserves."""
        return float(self.root[ACTOR].get("num_cpus") or 0)

    @property
    def num_gpus(self) -> float:
        """GPUs that one replica reserves."""
        return float(self.root[ACTOR].get("num_gpus") or 0)

    @property
    def graceful_shutdown_timeout_s(self) -> float:
        """How long a removed replica has to end its streams."""
        return float(self.root["graceful_shutdown_timeout_s"])

    @property
    def _bounds(self) -> JsonObject:
        number = self.root.get("num_replicas", 1)
        bounds: JsonObject = self.root.get(AUTOSCALING) or {"min_replicas": number, "max_replicas": number}
        return bounds


def default_options(*, num_cpus: float = 0.2, target_ongoing_requests: float, **options: Any) -> JsonObject:
    """Return the options of a deployment whose group of settings names none, with those of a range of replicas."""
    return {
        "num_replicas": 1,
        AUTOSCALING: {
            "min_replicas": 1,
            "target_ongoing_requests": target_ongoing_requests,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,  # each removed worker loses a warm bank
            "look_back_period_s": 15,
            "metrics_interval_s": 5,
        },
        ACTOR: {"num_cpus": num_cpus},
        "max_ongoing_requests": 64,
        "max_queued_requests": 1024,
        "health_check_period_s": 10,
        "graceful_shutdown_timeout_s": 600,
        "graceful_shutdown_wait_loop_s": DRAIN_CHECK_S,
        **options,
    }


def with_defaults(given: JsonMapping, defaults: JsonMapping) -> JsonObject:
    """Return the given options with the defaults of what they leave out, also inside of Serve's mappings.

    `num_replicas` is the default, and a given `autoscaling_config` replaces it. Scaling from zero begins with one
    replica, so that a model that cannot be loaded is noticed at once. Serve begins again with this number when the
    options or the version change; `initial_replicas: None` keeps the number that runs.
    """
    given = {name: value for name, value in given.items() if value is not None}
    replaced = "num_replicas" if AUTOSCALING in given else AUTOSCALING
    options = deepcopy({name: value for name, value in defaults.items() if name != replaced}) | given
    for name in (AUTOSCALING, ACTOR):
        if isinstance(inner := given.get(name), Mapping):
            options[name] = dict(defaults.get(name, {})) | dict(inner)
    if isinstance(scaling := options.get(AUTOSCALING), dict) and scaling.get("min_replicas") == 0:
        scaling.setdefault("initial_replicas", 1)
    return options


def _find_problems(options: JsonMapping) -> Iterator[InitErrorDetails]:
    """Yield what Serve's models refuse, and the names that they would ignore."""
    from ray.serve.config import AutoscalingConfig  # imports Serve, which takes seconds
    from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema

    inner: dict[str, type[BaseModel]] = {AUTOSCALING: AutoscalingConfig, ACTOR: RayActorOptionsSchema}
    own = [name for name in DeploymentSchema.model_fields if name not in _NOT_OURS]
    places = {name: f"{group}.{name}" for group, model in inner.items() for name in model.model_fields}
    for name in options:
        if name not in own:
            yield _unknown(options, (name,), own, places)
    number = options.get("num_replicas", 1)
    if not isinstance(number, int) or number < 1:
        text = f"must be a whole number of at least 1, got {number!r}; for a range set {AUTOSCALING}"
        yield _problem(("num_replicas",), number, text)
        return
    if "num_replicas" in options and AUTOSCALING in options:
        text = f"cannot be combined with {AUTOSCALING}; set one of them"
        yield _problem(("num_replicas",), number, text)
    for group, model in inner.items():
        given = options.get(group, {})
        if not isinstance(given, Mapping):
            yield _problem((group,), given, f"must be an object with named fields, got {given!r}")
            return
        for name in given:
            if name not in model.model_fields:
                yield _unknown(given, (group, name), model.model_fields)
        known = {name: value for name, value in given.items() if name in model.model_fields}
        yield from _refused(model, known, (group,))
    rest = {name: value for name, value in options.items() if name in own and not isinstance(value, Mapping)}
    yield from _refused(DeploymentSchema, {"name": "any", **rest}, ())
    resources = options.get(ACTOR, {}).get("resources", {})
    for name, amount in resources.items() if isinstance(resources, Mapping) else ():
        if not isinstance(amount, int | float):
            yield _problem((ACTOR, "resources"), amount, f"{name!r} must be a number above 0, got {amount!r}")
        elif name in _FIXED or amount <= 0:
            text = f"{name!r}: {amount} is not a custom resource; set CPUs and GPUs by num_cpus and num_gpus"
            yield _problem((ACTOR, "resources"), amount, text)


def _refused(model: type[BaseModel], given: JsonMapping, place: tuple[str, ...]) -> Iterator[InitErrorDetails]:
    try:
        # Ray takes the options of an actor as they are, so '1' is no number there.
        model.model_validate(dict(given), strict=place == (ACTOR,) or None)
    except ImportError as exc:  # Serve imports the function of a policy
        yield _problem(place, given, f"cannot be used: {exc}")
    except ValidationError as exc:
        for error in exc.errors(include_url=False):
            yield InitErrorDetails(
                type=error["type"], loc=(*place, *error["loc"]), input=error["input"], ctx=error.get("ctx", {})
            )


def _unknown(
    options: JsonMapping, place: tuple[str, ...], known: Any, places: Mapping[str, str] = {}
) -> InitErrorDetails:
    """Say that an option is unknown, and which one of Serve's it may be: one of a mapping, or one of a like name."""
    name = str(place[-1])
    near = difflib.get_close_matches(name, places, n=1)
    if name not in places and (hint := did_you_mean(name, known)):
        text = f"unknown{hint}"
    else:
        text = f"unknown here; {places[near[0]]}?" if near else "unknown"
    return _problem(place, options[place[-1]], text)


def _problem(place: tuple[str, ...], given: object, text: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("serve_option", "{text}", {"text": text}), loc=place, input=given)
