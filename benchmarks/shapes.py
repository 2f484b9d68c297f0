"""The shapes of multi-task ViTs and encoders that kernels are compiled, tuned and measured for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer; the names are those of the axis legend in moe_mtl.routing.

    Attributes:
        name: what it stands for.
        tokens: m.
        dim: d.
        hidden: h of one expert.
        experts: e.
        k: experts per token.
        glu: SiLU-gated without bias, else GELU with bias.
        share: of the limit that training (forward and backward) should reach on a GPU; None where none is set.
    """

    name: str
    tokens: int
    dim: int
    hidden: int
    experts: int
    k: int
    glu: bool = False
    share: float | None = None

    @property
    def activation(self) -> str:
        return "silu" if self.glu else "gelu"

    @property
    def rows(self) -> int:
        """r: routed rows."""
        return self.tokens * self.k

    @property
    def wide(self) -> int:
        """What the first layer of an expert makes: h, or 2h with a gated unit."""
        return self.hidden * (1 + self.glu)

    @property
    def forward_flops(self) -> int:
        """Of the expert MLPs' products: 4 T k D H, or 6 T k D H with a gated unit. A backward does twice as many."""
        return 2 * self.rows * self.dim * (self.wide + self.hidden)

    def __str__(self) -> str:
        return f"T{self.tokens} D{self.dim} H{self.hidden} E{self.experts} k{self.k}" + " silu-glu" * self.glu


# reference: the study of limits these rows come from counts 16-bit numbers, two layers, no gated unit
SHAPES = (
    Shape("ViT-T M3ViT", 8064, 192, 192, 16, 4, share=0.5),
    Shape("ViT-S M3ViT", 8064, 384, 384, 16, 4, share=0.65),
    Shape("ViT-S 224, batch 8", 1576, 384, 1536, 16, 2, share=0.5),
    Shape("ViT-S 224, batch 256", 50432, 384, 1536, 16, 2, share=0.65),
    Shape("ViT-B M3ViT", 8064, 768, 768, 16, 4, share=0.75),
    Shape("BERT-base, ViT-B", 16384, 768, 3072, 8, 2, share=0.75),
    Shape("ViT-B, fine-grained", 50432, 768, 768, 64, 4, share=0.75),
    Shape("BERT-large, ViT-L", 32768, 1024, 4096, 32, 2, share=0.75),
    Shape("ViT-S, one image", 1008, 384, 384, 16, 4, share=0.5),
    Shape("ViT-S 224, batch 8, gated", 1576, 384, 1536, 16, 2, glu=True),
    Shape("ModernBERT-base, gated", 16384, 768, 1152, 16, 2, glu=True),
    Shape("ViT-S, one image, plain", 197, 384, 384, 16, 4),
    Shape("ViT-T, two images", 394, 192, 192, 16, 4),
    Shape("micro, one image", 64, 96, 96, 16, 4),
)
