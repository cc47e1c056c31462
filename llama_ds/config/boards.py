"""The boards of a run: programs that show its metrics, their options, and the packages that they need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Annotated, ClassVar
from urllib.parse import urlsplit

from llama_ds.config.declare import Key, Section
from llama_ds.errors import UserError, listed

OPTIONS: dict[str, tuple[str, ...]] = {  # by board
    "tensorboard": (),
    "csv": (),
    "wandb": ("project", "entity", "offline"),
    "mlflow": ("project", "uri"),
    "prometheus": ("address", "port", "textfile"),
}
PACKAGES = ("tensorboard", "wandb", "mlflow")  # boards that need the package and the extra of their name


@dataclass(frozen=True)
class BoardConfig(Section):
    """A board: a program that shows the metrics of a run. Keys and passwords belong in the environment."""

    SECTION: ClassVar[str] = "logging.boards.N"

    name: Annotated[str, Key("The board.", choices=tuple(OPTIONS))]
    project: Annotated[str, Key('Project of wandb, experiment of mlflow; "": `llama_ds`.')] = ""
    entity: Annotated[str, Key('User or team of wandb; "": the user\'s default.')] = ""
    offline: Annotated[bool, Key("Whether wandb writes to the run's folder only, for `wandb sync`.")] = False
    uri: Annotated[
        str,
        Key(
            'Tracking URI of mlflow; "": that of `MLFLOW_TRACKING_URI`, or else mlflow.db in the run\'s folder.',
            rule="Without a password.",
        ),
    ] = ""
    address: Annotated[str, Key("Address of this host on which prometheus is served.")] = "0.0.0.0"
    port: Annotated[int, Key("Port of prometheus' HTTP endpoint /metrics; 0: none.", least=0, most=65535)] = 0
    textfile: Annotated[
        str,
        Key(
            'File for prometheus, in the folder of node_exporter\'s textfile collector; "": none.',
            rule="Ends in .prom.",
            is_path=True,
        ),
    ] = ""

    def check(self) -> None:
        permitted = ("name", *OPTIONS[self.name])
        for field in fields(self):
            if field.name not in permitted and getattr(self, field.name) != field.default:
                takes = listed(OPTIONS[self.name]) if OPTIONS[self.name] else "no options"
                raise self.broken(f"logging.boards.N.{field.name} is no option of {self.name}, which takes {takes}")
        if "@" in urlsplit(self.uri).netloc:
            raise self.broken(
                "logging.boards.N.uri holds a user or password, which the run's folder would record; set the whole URI "
                "as MLFLOW_TRACKING_URI, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment"
            )
        if self.textfile and not self.textfile.endswith(".prom"):
            raise self.broken(
                f"logging.boards.N.textfile = {self.textfile} does not end in .prom, so node_exporter would not read "
                "it; rename it"
            )
        if self.name == "prometheus" and not self.port and not self.textfile:
            raise self.broken(
                "logging.boards.N.port and logging.boards.N.textfile are not set, so prometheus would show nothing; "
                "set one"
            )


def check_packages(path: str, boards: Iterable[BoardConfig]) -> None:
    """Check that the packages of a run file's boards are installed.

    Raises:
        UserError: one is missing; the message says how to install it.
    """
    for board in boards:
        if board.name in PACKAGES and find_spec(board.name) is None:
            raise UserError(
                f"{path}: logging.boards: {board.name} needs the package {board.name}, which is not installed; "
                f"pip install 'llama_ds[{board.name}]', or take the board out"
            )
