"""Calls of the program that evaluates checkpoints, in this process."""

import pytest
from absl.testing import flagsaver

from hybrid_attn.programs import parse

TRUSTED = ("--trust_checkpoint_data",)  # the models' sources are files


def run(evaluate, *arguments, trust=TRUSTED):
    with flagsaver.flagsaver():
        evaluate.main(parse(["evaluate.py", *trust, *map(str, arguments)]))


def refused(evaluate, capsys, *arguments, trust=TRUSTED):
    """The one line and the exit code of a command that ends with an error."""
    with pytest.raises(SystemExit) as ended:
        run(evaluate, *arguments, trust=trust)
    (line,) = capsys.readouterr().err.splitlines()
    return line, ended.value.code
