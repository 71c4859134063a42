"""Options shared by the stages' commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PerTask = Annotated[int, typer.Option(help="test questions of each task")]
Root = Annotated[Path, typer.Option(help="the study's cache folder")]
