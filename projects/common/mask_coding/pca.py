"""PCA of masks: of their logits, as the releases have it, and of their pixels, as the papers (ISTR, section 3.2)."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from querymask.common.mask_coding.base import LearnedMaskCoding
from querymask.common.precision import without_autocast

# A pixel's label is 1 - n or n with n = max(NOISE_SCALE * u, LEAST_NOISE) and u uniform in [0, 1)
NOISE_SCALE, LEAST_NOISE = 0.05, 0.01


def label_logits(masks: torch.Tensor, variates: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of softened labels: +-ln((1 - n) / n), within +-[2.944, 4.595].

    Args:
        masks: any shape; foreground is what is not 0.
        variates: u in [0, 1), same shape; None: 0.5 everywhere, which gives +-3.664.
    """
    if variates is None:
        variates = torch.full_like(masks, 0.5)
    noise = (NOISE_SCALE * variates).clamp(min=LEAST_NOISE)
    logits = torch.log((1 - noise) / noise)
    return torch.where(masks != 0, logits, -logits)


@dataclass
class PCABasis:
    """What ``tools/fit_mask_basis.py`` writes.

    Attributes:
        components: (K, S * S) orthonormal rows.
        mean: (S * S,), zeros for "pca_linear".
        explained_variance: (K,), about the mean.
        explained_variance_ratio: (K,), parts of the total variance.
        coding: what it was learned for: "pca", "pca_pixels" or "pca_linear".
    """

    components: np.ndarray
    mean: np.ndarray
    explained_variance: np.ndarray
    explained_variance_ratio: np.ndarray
    coding: str = "pca"

    # The names in the file, which are those of ISTR's release; arrays have a leading axis of 1
    _NAMES = {
        "components": "components_c",
        "mean": "mean_c",
        "explained_variance": "explained_variance_c",
        "explained_variance_ratio": "ratio_c",
    }

    def save(self, path: str | os.PathLike[str], **statistics: np.ndarray | float | int | str) -> None:
        """Write float32 arrays, and further entries under their names."""
        arrays = {name: getattr(self, key).astype(np.float32)[None] for key, name in self._NAMES.items()}
        with open(path, "wb") as file:
            np.savez(file, **arrays, coding=self.coding, **statistics)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PCABasis":
        """Read a file of ``save`` or of the release, whose basis is one for "pca".

        Raises:
            ValueError: the file is not one.
        """
        try:
            with np.load(path) as file:
                arrays = {key: file[name][0] for key, name in cls._NAMES.items()}
                return cls(**arrays, coding=str(file["coding"]) if "coding" in file else "pca")
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{path} is not a PCA basis ({error}): make one with tools/fit_mask_basis.py") from error


class _ComponentCoding(LearnedMaskCoding):
    """A coding by principal components: its sizes, and its constants ``names`` from a basis for the coding ``kind``.

    The constants are parameters without gradient, so that checkpoints hold them. Autocast does not change the
    precision.
    """

    def __init__(self, mask_size: int, length: int, basis: PCABasis | None, kind: str, names: Sequence[str]) -> None:
        super().__init__()
        if not 0 < length <= mask_size**2:
            raise ValueError(f"a {mask_size}x{mask_size} mask has {mask_size**2} principal components, not {length}")
        self.mask_size = mask_size
        self.length = length
        shapes = {"components": (length, mask_size**2), "explained_variances": (length,), "means": (mask_size**2,)}
        for name in names:
            value = torch.full(shapes[name], float("nan"))
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        if basis is None:
            return
        if basis.coding != kind:
            raise ValueError(
                f"the PCA basis is one for MODEL.MASK_CODING.NAME {basis.coding!r}, not {kind!r}: set NAME to that, or "
                f"fit another one with tools/fit_mask_basis.py --method {kind}"
            )
        values = {
            "components": basis.components,
            "explained_variances": basis.explained_variance,
            "means": basis.mean,
        }
        for name, value in values.items():
            if value.shape != shapes[name]:
                raise ValueError(
                    f"the PCA basis has {name} of shape {value.shape}, but vectors of {length} for masks of "
                    f"{mask_size}x{mask_size} need {shapes[name]}: set length and size of the config to those of the "
                    "basis, or fit another one"
                )
            if name in names:
                getattr(self, name).data.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def _witness(self) -> torch.Tensor:
        return self.components


class PCAMaskCoding(_ComponentCoding):
    """Whitened projections of a mask's logits on principal components: "pca".

    ``encode``: r = V (y - m) / sqrt(v); ``decode``: sigmoid(V^T (sqrt(v) r) + m), in (0, 1).

    Args:
        mask_size: side S of the masks.
        length: number of components K.
        basis: None leaves the constants nan until a checkpoint is loaded.
        noise: function (masks (n, S * S)) -> variates u of the same shape, drawn afresh in every call of ``encode``;
            None: u = 0.5, without noise.
    """

    def __init__(
        self,
        mask_size: int = 28,
        length: int = 60,
        basis: PCABasis | None = None,
        noise: Callable[[torch.Tensor], torch.Tensor] | None = torch.rand_like,
    ) -> None:
        super().__init__(mask_size, length, basis, "pca", ("components", "explained_variances", "means"))
        self.noise = noise

    @property
    def is_random(self) -> bool:  # type: ignore[override]
        """Whether labels are noisy."""
        return self.noise is not None

    def encode(self, masks: torch.Tensor, variates: torch.Tensor | None = None) -> torch.Tensor:
        """(n, S, S) -> (n, K).

        Args:
            variates: (n, S * S) to be used instead of drawing them.
        """
        self.require_basis()
        pixels = masks.flatten(1).to(self.components.dtype)
        if variates is None and self.noise is not None:
            variates = self.noise(pixels)
        with without_autocast(masks.device):
            centred = label_logits(pixels, variates) - self.means
            return centred @ self.components.T / self.explained_variances.sqrt()

    def decode_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, K) -> (n, S, S) before the sigmoid."""
        self.require_basis()
        scale, components, means = (
            x.to(vectors.dtype) for x in (self.explained_variances.sqrt(), self.components, self.means)
        )
        with without_autocast(vectors.device):
            return ((vectors * scale) @ components + means).view(-1, self.mask_size, self.mask_size)

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, K) -> (n, S, S) probabilities."""
        return self.decode_logits(vectors).sigmoid()


class PixelPCAMaskCoding(_ComponentCoding):
    """Projections of a mask's pixels, 0 or 1, on principal components, not whitened: "pca_pixels" and "pca_linear".

    ``encode``: r = V (x - m); ``decode``: V^T r + m, near 0 in the background and near 1 in the foreground. With m = 0
    it is the linear code of least squared error (ISTR, equation 3).

    Args:
        mask_size: side S of the masks.
        length: number of components K.
        basis: None leaves the constants nan until a checkpoint is loaded.
        centred: "pca_pixels", with the mean m of the masks; else "pca_linear", without.
    """

    def __init__(
        self, mask_size: int = 28, length: int = 60, basis: PCABasis | None = None, centred: bool = True
    ) -> None:
        names = ("components", "means") if centred else ("components",)
        super().__init__(mask_size, length, basis, "pca_pixels" if centred else "pca_linear", names)
        self.centred = centred

    def encode(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, S, S) -> (n, K)."""
        self.require_basis()
        pixels = masks.flatten(1).to(self.components.dtype)
        with without_autocast(masks.device):
            return (pixels - self.means if self.centred else pixels) @ self.components.T

    def decode(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, K) -> (n, S, S)."""
        self.require_basis()
        with without_autocast(vectors.device):
            maps = vectors @ self.components.to(vectors.dtype)
        if self.centred:
            maps = maps + self.means.to(vectors.dtype)
        return maps.view(-1, self.mask_size, self.mask_size)
