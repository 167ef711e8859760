"""A file of ``timm-dfs export`` with the preparation of images and the classes that its metadata names; no torch."""

import io
import json
import math

import numpy as np
import onnxruntime
from PIL import Image, ImageOps, UnidentifiedImageError


class ExportedGraph:
    """ONNX Runtime on an exported ``model.onnx`` of the layout ``graph`` or ``last``.

    Args:
        file: The file.
        threads: Threads that one batch is computed with.

    Raises:
        ValueError: If the network takes images that :meth:`prepare` cannot make.
    """

    def __init__(self, file, threads=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # else it warns that thresholds may be overridden
        self.session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])
        about = self.session.get_modelmeta().custom_metadata_map
        channels, height, self.size = json.loads(about["input_size"])
        if channels != 3 or height != self.size or about["crop_mode"] != "center":
            raise ValueError(
                f"{file} takes {channels}x{height}x{self.size} images, crop_mode {about['crop_mode']!r}; "
                "this example prepares square RGB images by a centre crop only."
            )
        self.resized = math.floor(self.size / float(about["crop_pct"]))
        self.interpolation = Image.Resampling[about["interpolation"].upper()]
        self.mean, self.std = (np.array(json.loads(about[key]), np.float32) for key in ("mean", "std"))
        self.label_names = json.loads(about["label_names"])

    def prepare(self, content):
        """Prepare an image file's content as timm does for evaluation: float32 (C, H, W), resized, cropped, normalised.

        Raises:
            ValueError: If it is no image, is damaged or transparent, or does not have 8 bits for each channel.
        """
        try:
            image = Image.open(io.BytesIO(content))
            image.load()
        except UnidentifiedImageError:
            raise ValueError("This is not an image that Pillow can read; send a PNG or JPEG file.") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"The image is damaged or too large ({error}); save it again.") from error
        if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr") or image.has_transparency_data:
            raise ValueError(f"The image has the mode {image.mode}; convert it to RGB without transparency.")
        image = ImageOps.exif_transpose(image).convert("RGB")
        shorter = min(image.size)
        image = image.resize([int(self.resized * edge / shorter) for edge in image.size], self.interpolation)
        left, top = (round((edge - self.size) / 2) for edge in image.size)
        image = image.crop((left, top, left + self.size, top + self.size))
        return ((np.asarray(image, np.float32) / 255 - self.mean) / self.std).transpose(2, 0, 1)

    def predict(self, images):
        """Names of the classes (B,) and exits (B,) of prepared images (B, C, H, W); exits are -1 in the layout last."""
        scores, *exits = self.session.run(None, {"images": images})
        names = [self.label_names[k] for k in scores.argmax(1)]
        return names, exits[0] if exits else np.full(len(images), -1)
