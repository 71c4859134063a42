"""Options shared by the stages' commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PerTask = Annotated[int, typer.Option(help="test questions of each task")]
NumTasks = Annotated[int, typer.Option(help="tasks, fewer for a trial")]
EncoderName = Annotated[str, typer.Option(help="the encoder: a name or folder")]
Root = Annotated[Path, typer.Option(help="the study's cache folder")]
