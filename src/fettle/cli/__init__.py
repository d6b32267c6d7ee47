"""The command line. Each command is a file here: it adds its options, and its `run` calls the library and prints."""

from fettle.cli.main import main, quiet_libraries

__all__ = ["main", "quiet_libraries"]
