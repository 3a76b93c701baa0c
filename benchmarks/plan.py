"""The sizes of `make bench-gpu`, on the GPU and in its dry run."""

from dataclasses import dataclass, replace

from benchmarks.shapes import MIXTRAL, Shape


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Layers: `layers` of the arms that are compared, `whole` of the whole model (most first), `loaded` of the checkpoint
    that is written and loaded.
    """

    device: str
    hidden: int
    intermediate: int
    rank: int
    vocabulary: int
    layers: int
    whole: tuple[int, ...]
    loaded: int
    tokens: tuple[int, ...]
    sequence: int
    matmul: int

    def shape(self, tokens: int) -> Shape:
        """The experts' shape of a step of `tokens`."""
        return replace(MIXTRAL, hidden=self.hidden, intermediate=self.intermediate, rank=self.rank, tokens=tokens)


H200 = Plan("cuda", 4096, 14336, 16, 32000, 2, (32, 4), 2, (4096, 16384), 4096, 8192)
DRY = Plan("cpu", 64, 96, 4, 512, 1, (2, 1), 2, (16, 32), 8, 64)
