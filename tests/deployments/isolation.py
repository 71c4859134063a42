"""Run a scenario of two tenants, and call a route as one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from tests.deployments.two_tenants import TwoTenants, two_tenants


def run(
    folder: Path, scenario: Callable[[TwoTenants], Coroutine[Any, Any, None]], num_private: int = 3, **options: Any
) -> None:
    async def main() -> None:
        async with two_tenants(folder, num_private, **options) as tenants:
            await scenario(tenants)

    asyncio.run(main())


Request = tuple[str, str, dict[str, Any]]  # method, path, JSON body


async def answer_to(tenants: TwoTenants, tenant: str, request: Request) -> httpx.Response:
    method, path, body = request
    return await tenants.ask(tenant, method, path, **({"json": body} if method in ("POST", "PATCH") else {}))
