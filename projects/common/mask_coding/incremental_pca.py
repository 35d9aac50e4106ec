"""PCA of more rows than fit into memory (Ross et al. 2008), one batch after the other."""

from collections.abc import Iterator

import numpy as np

from querymask.common.mask_coding.pca import PCABasis


class IncrementalPCA:
    """The leading components of everything seen so far, by an SVD of them together with the next batch.

    All in float64. The state is in ``state_dict``; the result does not depend on interruptions.

    Args:
        num_components: K.
        coding: what the basis is for. For "pca_linear" the mean is zero, whatever the rows' is.
    """

    def __init__(self, num_components: int, coding: str = "pca") -> None:
        self.num_components = num_components
        self.coding = coding
        self.count = 0
        self.mean = np.zeros(0)
        self.variance_sum = np.zeros(0)  # sum of squared differences from the mean, by column
        self.components = np.zeros((0, 0))
        self.singular_values = np.zeros(0)

    def update(self, rows: np.ndarray) -> None:
        """Take in a batch (b, D).

        Raises:
            ValueError: the first batch has fewer rows than components.
        """
        rows = np.asarray(rows, dtype=np.float64)
        number, seen = len(rows), self.count
        if not seen and number < self.num_components:
            raise ValueError(
                f"{number} rows do not suffice for {self.num_components} components: use more masks, a larger batch or "
                "fewer components"
            )
        batch_mean = np.zeros(rows.shape[1]) if self.coding == "pca_linear" else rows.mean(0)
        batch_variance_sum = ((rows - batch_mean) ** 2).sum(0)
        if not seen:
            stack = rows - batch_mean
            self.mean, self.variance_sum = batch_mean, batch_variance_sum
        else:
            weight = seen * number / (seen + number)
            shift = self.mean - batch_mean
            stack = np.vstack(
                (self.singular_values[:, None] * self.components, rows - batch_mean, np.sqrt(weight) * shift[None])
            )
            self.mean = self.mean - shift * number / (seen + number)
            self.variance_sum = self.variance_sum + batch_variance_sum + weight * shift**2
        _, values, vectors = np.linalg.svd(stack, full_matrices=False)
        vectors, values = vectors[: self.num_components], values[: self.num_components]
        largest = np.abs(vectors).argmax(1)
        vectors *= np.sign(vectors[np.arange(len(vectors)), largest])[:, None]
        self.components, self.singular_values = vectors, values
        self.count = seen + number

    def basis(self) -> PCABasis:
        """The result so far: variances with divisor n - 1, and their parts of the variance of the data."""
        squares = self.singular_values**2
        ratio = squares / self.variance_sum.sum()
        return PCABasis(self.components, self.mean, squares / (self.count - 1), ratio, self.coding)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything that ``load_state_dict`` needs to go on."""
        return {
            "count": np.array(self.count),
            "mean": self.mean,
            "variance_sum": self.variance_sum,
            "components": self.components,
            "singular_values": self.singular_values,
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Go on from ``state_dict``."""
        self.count = int(state["count"])
        for name in ("mean", "variance_sum", "components", "singular_values"):
            setattr(self, name, np.array(state[name]))


def batch_slices(count: int, batch_size: int, least: int) -> Iterator[slice]:
    """Consecutive slices of ``batch_size`` rows; the last one takes the rest where less than ``least`` would remain."""
    start = 0
    while start < count:
        end = start + batch_size
        if end + least > count:
            end = count
        yield slice(start, end)
        start = end


def fit(rows: np.ndarray, num_components: int, batch_size: int, coding: str = "pca") -> PCABasis:
    """PCA of rows (n, D) that are all there."""
    pca = IncrementalPCA(num_components, coding)
    for part in batch_slices(len(rows), batch_size, num_components):
        pca.update(rows[part])
    return pca.basis()
