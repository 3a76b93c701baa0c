"""Floor 2: the run folder: what a run leaves behind, written as it goes, never half."""

from finetune.run.folder import RunFolder
from finetune.run.provenance import collect_provenance

__all__ = ["RunFolder", "collect_provenance"]
