"""A network of two pixels whose logits are worked out in the head, as ONNX text."""

from pathlib import Path

import numpy as np
import onnx

from deploy.metadata import Metadata, write_metadata

# (N, 1, 1, 2) -> (N, 2): the two pixels a, b become a + 3b and 2a + 4b.
NETWORK = """
<ir_version: 10, opset_import: ["" : 20]>
network (float[batch, 1, 1, 2] images) => (float[batch, 2] logits)
<float[2, 2] weight = {1, 2, 3, 4}, int64[2] shape = {-1, 2}>
{
    pixels = Reshape(images, shape)
    logits = MatMul(pixels, weight)
}
"""

CASTS = NETWORK.replace("float[batch", "bfloat16[batch").replace(
    "pixels = Reshape(images, shape)\n    logits = MatMul(pixels, weight)",
    """wide = Cast<to = 1>(images)
    pixels = Reshape(wide, shape)
    product = MatMul(pixels, weight)
    logits = Cast<to = 16>(product)""",
)
"""The same with inputs and outputs in bfloat16, which computes in fp32."""


def images(*pixels: tuple[float, float]) -> dict[str, np.ndarray]:
    return {"images": np.array(pixels, np.float32).reshape(-1, 1, 1, 2)}


def described(path: Path, precision: str, target: str) -> Path:
    """Write our description of the network into the file."""
    model = onnx.load(path)
    about = Metadata(
        version="0",
        torch_version="0",
        image_shape=(1, 1, 2),
        classes=(),
        mean=(),
        std=(),
        checkpoint_sha256="",
        precision=precision,
        target=target,
        other={},
    )
    write_metadata(model, about)
    onnx.save(model, path)
    return path
