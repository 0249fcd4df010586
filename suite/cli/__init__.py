"""The command `suite`: one module a group of commands."""

from suite.cli.command import main as main
