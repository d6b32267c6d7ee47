"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fettle-llm")
except PackageNotFoundError:  # run from its source folder, not installed
    __version__ = "0+source"  # a version that packaging can read, below every release
