"""The command line. One file per command: it adds its options; its `run` calls the library and prints."""

from fettle.cli.main import main, quiet_libraries

__all__ = ["main", "quiet_libraries"]
