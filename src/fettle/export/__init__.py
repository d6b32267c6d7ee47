"""Export: hand a trained model over in the form that others open."""

from fettle.export.checkpoint import export_safetensors
from fettle.export.merge import merge

__all__ = ["export_safetensors", "merge"]
