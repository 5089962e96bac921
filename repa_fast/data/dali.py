"""A batch's encoded images decoded at once by DALI, on the CPU or the GPU.

Pixels compared with Pillow's, which `dataset.decode` gives, at 256x256 (photographs; JPEG quality
50 to 100; chroma 4:4:4, 4:2:2 and 4:2:0; baseline and progressive):

    PNG                equal; DALI decodes PNG on the CPU for "dali-gpu" too, and then copies
    JPEG, dali-cpu     equal: maximum and mean absolute difference 0 (both libjpeg-turbo: exact
                       DCT, smooth chroma); DALI's fast DCT would differ by up to 27, 1.7 on average
    JPEG, dali-gpu     nvJPEG rounds in its own way: at most GPU_MAX, on average at most GPU_MEAN,
                       levels of 256

So tokens are equal on the CPU. On the GPU those of a random ViT have a cosine of at least
TOKEN_COSINE with Pillow's; pixels off by up to 2 at random, 1.2 on average, leave as much.

Pillow stays the judge of what a bad image is. A batch goes through it row by row where an image is
bad, or is of a kind that DALI decodes in another way (16 bits, CMYK, neither JPEG nor PNG), or
where DALI refuses what Pillow takes (a PNG without its last bytes); the last two are logged.
"""

import functools
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from repa_fast.backend import dispatch
from repa_fast.data.dataset import Sample
from repa_fast.data.images import open_image
from repa_fast.data.official import OfficialFolder
from repa_fast.data.open import Dataset
from repa_fast.failure import Failure
from repa_fast.words import one_line

if TYPE_CHECKING:
    from nvidia.dali import Pipeline
    from nvidia.dali.tensors import TensorListCPU, TensorListGPU

Decode = Literal["auto", "dali-gpu", "dali-cpu", "torch"]

GPU_MAX, GPU_MEAN = 6, 1.0
"""Bounds for JPEG by nvJPEG: Y off by 1 and Cb or Cr by 2 (the DCT, and interpolated chroma) make
1 + 1.772 * 2 and a rounding to either side."""

TOKEN_COSINE = 0.998
MODES = {"JPEG": ("L", "RGB"), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA")}
JPEG_MARKER = np.ones(256, dtype=bool)  # by the byte after 0xff: neither data nor a restart
JPEG_MARKER[[0x00, 0xFF, *range(0xD0, 0xD8)]] = False
START_OF_SCAN, END_OF_IMAGE, PROGRESSIVE = 0xDA, 0xD9, 0xC2
BETWEEN_SCANS = (0xC4, 0xDA, 0xDB, 0xDD)  # tables and further scans of a progressive image
REFUSAL = re.compile(r"Failed to decode sample #\d+|nvImageCodec failure: '#\d+'")


def choose(decode: Decode, device: torch.device) -> tuple[Decode, str]:
    """Return who decodes for a run on `device`, and why; for "auto" it is logged once.

    Raises:
        ValueError: DALI is asked for and cannot be loaded, or asked for on a GPU without one.
    """
    on = "" if device.type == "cuda" else f"the run is on {device.type}, expected cuda"
    candidates = {
        "dali-gpu": lambda: on or why_not(gpu=True),
        "torch": dispatch.runs,
        "dali-cpu": lambda: why_not(gpu=False),
    }
    words = {"dali-gpu": "DALI on the GPU", "torch": "Pillow"}
    return dispatch.choose("decode", decode, candidates, words)


def why_not(*, gpu: bool) -> str:
    """Return why DALI cannot be used, with the package to install; "" if it can."""
    cuda = (torch.version.cuda or "13").partition(".")[0]
    package = f"nvidia-dali-cuda{cuda}0"
    try:
        import nvidia.dali
        import nvidia.dali.plugin.pytorch
    except (ImportError, OSError) as error:
        return f"DALI is not there ({error}): install {package} (nvidia-dali is an empty shell)"
    built = str(nvidia.dali.__cuda_version__)[:2]  # 13492 is 13.4.92
    if gpu and built != cuda:
        return f"DALI is built for CUDA {built} and torch for CUDA {cuda}: install {package}"
    return ""


class DaliDecoder:
    """Decodes one batch at a time; for one thread, which also closes it.

    The pipeline is built at the first batch, whose size is the largest, and again after a batch
    that DALI refused, since DALI's pipelines do not outlive an error.

    Args:
        resolution: R, in pixels.
        num_threads: of DALI's pool.
        device: a CUDA device, which then decodes and holds the result; None is the CPU.
    """

    def __init__(self, resolution: int, num_threads: int, device: torch.device | None) -> None:
        self.resolution = resolution
        self.num_threads = num_threads
        self.device = device
        self._pipeline: Pipeline | None = None
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> "DaliDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipeline = None

    def decode(
        self, dataset: Dataset, fetched: Iterable[tuple], run: Callable
    ) -> tuple[list[Sample], Tensor]:
        """Decode what `dataset.fetch` gave: samples without images, and images uint8 (B, 3, R, R).

        In memory the images are B, R, R, 3, as Pillow's are. `run` is a map that may use threads:
        for the files of a folder, since headers alone are read faster in one.

        Raises:
            ValueError: this batch has to be decoded row by row.
        """
        run = run if isinstance(dataset, OfficialFolder) else map
        parts = run(functools.partial(_parts, dataset, self.resolution), fetched)
        samples, encoded = zip(*parts, strict=True)
        name = f"{dataset.uri} rows {samples[0]['index']} ... {samples[-1]['index']}"
        return list(samples), self.pixels(list(encoded), name)

    def pixels(self, encoded: list[bytes], name: str = "images") -> Tensor:
        """Decode JPEG and PNG files to uint8 (B, 3, R, R), B not above the first batch's.

        Raises:
            ValueError: one is refused by DALI or has another size; `name` is in the message.
        """
        if self._pipeline is None:
            self._pipeline = self._build(len(encoded))
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        refused = ""
        try:
            (output,) = self._pipeline.run()
        except RuntimeError as error:
            refused = str(error)
        if refused:  # outside of except: the exception would keep the pipeline alive
            self._pipeline = None
            found = REFUSAL.search(refused)
            if found is None:
                raise Failure(f"{name}: {one_line(refused)}")
            raise ValueError(f"{name}: DALI refuses an image ({found[0]})")
        shape = (self.resolution, self.resolution, 3)
        if any(tuple(image) != shape for image in output.shape()):
            raise ValueError(f"{name}: images have shapes {output.shape()}, expected {shape}")
        return self._tensor(output)

    def _build(self, batch: int) -> "Pipeline":
        from nvidia.dali import Pipeline, fn, types

        options, device_id = {"device": "cpu"}, None
        if self.device is not None:
            self._stream = self._stream or torch.cuda.Stream(self.device)
            device_id = self._stream.device.index
            # affine would tie the threads of every process of a machine to the same cores
            options = {"device": "mixed", "affine": False}
        pipeline = Pipeline(batch, self.num_threads, device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            pixels = fn.decoders.image(
                encoded,
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                use_fast_idct=False,
                **options,
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline

    def _tensor(self, output: "TensorListCPU | TensorListGPU") -> Tensor:
        """Copy the output, on its device: DALI's own memory is the next batch's."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = output.as_tensor()
        if self._stream is None:
            pixels = feed_ndarray(dense, torch.empty(dense.shape(), dtype=torch.uint8))
        else:
            with torch.cuda.stream(self._stream):
                pixels = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
                feed_ndarray(dense, pixels, cuda_stream=self._stream)
            self._stream.synchronize()  # this thread waits, no step will have to
        return pixels.permute(0, 3, 1, 2)


def _parts(dataset: Dataset, resolution: int, fetched: tuple) -> tuple[Sample, bytes]:
    """Return a row, checked, without its image, and the image's file."""
    name = f"{dataset.uri} row {fetched[0]}"
    if isinstance(dataset, OfficialFolder):
        sample = dataset.decode((fetched[0], False))
        encoded = dataset.image_bytes(fetched[0])
    else:
        encoded = fetched.image
        sample = dataset.decode(fetched._replace(image=None))
    expect_usual(encoded, resolution, name)
    return sample, encoded


def expect_usual(data: bytes, resolution: int, name: str) -> None:
    """Raise ValueError unless DALI and Pillow agree about such a file, by its header and markers.

    Its pixels may still be damaged, which DALI finds where Pillow does.
    """
    image = open_image(data, name, resolution)
    kind, mode = image.format, image.mode
    usual = mode in MODES.get(kind, ())
    # a PNG's byte 24 is its bit depth
    if not usual or not (data[24] <= 8 if kind == "PNG" else well_formed(data)):
        raise ValueError(f"{name}: is an unusual {kind} of mode {mode}")


def well_formed(data: bytes) -> bool:
    """Return whether a JPEG's markers stand where they may, up to one end of image, at the end.

    A damaged scan may hold a marker: Pillow refuses it, libjpeg, and with it DALI, paints the
    rest grey.
    """
    view = np.frombuffer(data, np.uint8)
    leads = np.flatnonzero(view[:-1] == 0xFF)
    leads = leads[JPEG_MARKER[view[leads + 1]]]
    position, allowed, progressive = 2, None, False
    for lead in leads.tolist():
        if lead < position:  # in a segment
            continue
        code, position = data[lead + 1], lead + 2
        if code == END_OF_IMAGE:
            return position == len(data)
        if allowed is not None and code not in allowed:
            return False
        progressive |= code == PROGRESSIVE
        if code == START_OF_SCAN:
            allowed = BETWEEN_SCANS if progressive else ()
        position += int.from_bytes(data[position : position + 2], "big")
    return False
