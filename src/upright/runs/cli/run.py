"""Run Lightning's commands, with their warnings and errors rewritten for users."""

import logging
import time
import warnings

from lightning.fabric.utilities.exceptions import MisconfigurationException

from upright.errors import UprightError, UserError, one_line
from upright.runs.cli.evaluation import Evaluation
from upright.runs.cli.fit import fit
from upright.runs.cli.parser import user_error
from upright.runs.folder import is_first_process
from upright.runs.interruption import Interrupted
from upright.runs.process import keep_freed_memory, leave_a_core

EXPECTED_WARNINGS = (
    ".*LeafSpec.*",  # Lightning 2.6 uses a class that torch 2.13 deprecates
    "You requested to overfit",  # Lightning does not see that our loader does not shuffle with overfit_batches
    "The ``noload`` loader strategy is deprecated",  # MLflow 3 asks for what SQLAlchemy 2.1 deprecates
    "Checkpoint directory .* exists and is not empty",  # a resumed run continues in its own folder
    "Be aware that when using `ckpt_path`",  # a resumed run may drop the option that saves within epochs
)


def run(command: str, arguments: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        The exit code: 0, or 128 plus the number of the signal that stopped the run.
    """
    keep_freed_memory()
    leave_a_core()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Lightning 2.6 calls functions that jsonargparse 5 will not have; the version is pinned below 5.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.pytorch.cli")
        warnings.filterwarnings("ignore", message=".*jsonargparse.*", category=DeprecationWarning)
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            if command == "fit":
                fit(arguments)
            else:
                Evaluation(command, arguments).evaluate()
        except Interrupted as stop:
            # A launcher of several processes reports the first process that ends with an error as the failed one.
            return stop.exit_code if is_first_process() else 0
        except MisconfigurationException as error:
            raise UserError(one_line(error)) from error
        except UnicodeDecodeError as error:
            raise UserError(f"A config must be YAML in UTF-8: {error}.") from error
        except ValueError as error:
            raise user_error(error) or error from None
        except UprightError:
            if not is_first_process():
                # The first process reports the same error, and the launcher then ends all processes.
                time.sleep(10)
            raise
    return 0
