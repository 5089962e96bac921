"""DiT (arXiv 2212.09748): SiT's architecture that predicts noise and its variance at integer times.

Parameter names, shapes and order are those of the original checkpoints, besides the heads of
alignment.
"""

from repa_fast.models.sit import SiT


class DiT(SiT):
    """SiT with 2C output channels: the predicted noise and the v of the variance.

    Arguments as for SiT. Times are 0..999, of any dtype.
    """

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments, learn_sigma=True)
