"""The program `rlhub`: its commands, and how errors end it."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import click

from rlhub.commands import INTERRUPTED
from rlhub.commands.bench import bench
from rlhub.commands.eval import evaluate
from rlhub.commands.experiment import experiment
from rlhub.commands.export import export
from rlhub.commands.lab import lab
from rlhub.commands.model import model
from rlhub.commands.pairs import pairs
from rlhub.commands.plan import plan
from rlhub.commands.report import report
from rlhub.commands.reward import reward
from rlhub.commands.sample import sample
from rlhub.commands.train import train
from rlhub.errors import UserError
from rlhub.extras import EXTRAS, not_installed


class OneLineErrors(click.Group):
    """A group whose errors are one line on stderr with exit code 2, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run the command line; never returns."""
        try:
            sys.exit(super().main(*args, **{"prog_name": "rlhub", **kwargs, "standalone_mode": False}))
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.ctx.get_help(), err=True)
            sys.exit(2)
        except click.NoSuchOption as error:
            fail(f"{error.format_message().rstrip('.')}; recipe keys are written key=value, without dashes (see --help)")
        except click.ClickException as error:
            fail(error.format_message())
        except UserError as error:
            # Ray hands on an error of a worker with the worker's traceback in its text; the cause is the error itself.
            fail(str(vars(error).get("cause", error)))
        except ModuleNotFoundError as error:
            if error.name not in EXTRAS:
                raise
            fail(not_installed(error.name))
        except (KeyboardInterrupt, click.Abort):
            click.echo("stopped", err=True)
            sys.exit(INTERRUPTED)


def fail(message: str) -> NoReturn:
    """Ends the program with one line."""
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rlhub")
def main() -> None:
    """Reinforcement-learning post-training for diffusion large language models.

    A run is described by a recipe (YAML) and lives in one folder. Start with `rlhub train recipes/sort.yaml`.
    """
    here = os.getcwd()
    if sys.path[0] in ("", here):  # as `python -m` has it
        sys.path.pop(0)
    if here not in sys.path:
        sys.path.append(here)  # a recipe may name modules of the user's; at the end, where they hide nothing that is installed


for command in (train, evaluate, sample, plan, pairs, export, report, experiment, bench, model, lab, reward):
    main.add_command(command)
