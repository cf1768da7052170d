"""Element types by the names that TVM, numpy and result rows have for them."""

import ml_dtypes
import numpy as np


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a TVM dtype name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
